"""One thread a test process: tensors here are tiny, and the suite is spread over processes."""

import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import subprocess
import sys

import pytest
import torch
from finished_run import FinishedRun

torch.set_num_threads(1)
# Thousands of empty records for every export, which pytest would collect and show.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """``fips run`` on the tiny recipe in a new process, measuring speed only briefly."""
    from run_samples import SHORT_BENCH_SECONDS, write_recipe  # here: it imports the whole pipeline

    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder)
    program = (
        "from pipeline.plumbing.environment import prepare_process; prepare_process()\n"
        "from pipeline.tasks import image_classification\n"
        f"image_classification.BENCH_SECONDS = {SHORT_BENCH_SECONDS}\n"
        "from pipeline.cli import main; main()"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, "run", str(recipe), "--out", str(folder / "run")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr
    return FinishedRun(recipe, folder / "run", child.stdout, child.stderr)
