"""The command ``fips`` without measuring speed, for points of sweeps, which run in processes of their own."""

from pipeline.plumbing.environment import prepare_process

prepare_process()

import gc  # noqa: E402

from run_samples import no_bench  # noqa: E402

from pipeline.cli import main  # noqa: E402
from pipeline.tasks.image_classification import ImageClassificationTask  # noqa: E402

ImageClassificationTask.bench = no_bench  # type: ignore[method-assign, assignment]
# What is imported stays: runs collect garbage after each stage, and need not look there.
gc.freeze()
main()
