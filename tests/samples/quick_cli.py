"""The command ``fips`` measuring speed only briefly, for points of sweeps, which run in processes of their own."""

from pipeline.plumbing.environment import prepare_process

prepare_process()

from run_samples import SHORT_BENCH_SECONDS  # noqa: E402

from pipeline.cli import main  # noqa: E402
from pipeline.tasks import image_classification  # noqa: E402

image_classification.BENCH_SECONDS = SHORT_BENCH_SECONDS
main()
