"""The command ``fips`` measuring speed only briefly, for the run that tests share."""

from pipeline.plumbing.environment import prepare_process

prepare_process()

import gc  # noqa: E402

from run_samples import SHORT_BENCH_SECONDS  # noqa: E402

from pipeline.cli import main  # noqa: E402
from pipeline.tasks import image_classification  # noqa: E402

image_classification.BENCH_SECONDS = SHORT_BENCH_SECONDS
# What is imported stays: runs collect garbage after each stage, and need not look there.
gc.freeze()
main()
