"""One thread a test process: tensors here are tiny, and the suite is spread over processes."""

import fcntl
import gc
import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import subprocess
import sys

import pytest
import torch
from finished_run import FinishedRun
from places import ROOT, SAMPLES

torch.set_num_threads(1)
# For benchmarks/, which is not installed. At the end: packages are tested as they are installed.
sys.path.append(str(ROOT))
# Thousands of empty records for every export, which pytest would collect and show.
logging.getLogger("torch.__trace").propagate = False

LONGEST = (
    "test_sweep.py",
    "test_language_run.py",
    "test_every_key.py",
    "test_run.py",
    "test_widths.py",
    "test_architectures.py",
    "test_sanitizers.py",
    "test_cli.py",
    "test_hub_recipes.py",
    "test_extreme_values.py",
    "test_native_kernels.py",
    "test_pruned_models.py",
    "test_allocate.py",
    "test_export.py",
)
"""Files by falling time, all of ten seconds and more. (xdist goes by their number of tests if it may choose.)"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: at the end, a process would wait for one that was left to the other."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True, scope="module")
def what_is_imported_stays() -> None:
    """Hide it from the garbage collector, which a run calls after each of its stages, and PyTorch's exporter now and
    then: a million objects of torch and transformers took half of every run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """``fips run`` on the tiny recipe in a new process, measuring speed only briefly; one run for all test processes,
    of which the first that needs it makes it."""
    from run_samples import write_recipe  # here: it imports the whole pipeline

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished_run"
    folder.mkdir(exist_ok=True)
    out, stdout, stderr = folder / "run", folder / "stdout", folder / "stderr"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stderr.exists():
            child = subprocess.run(
                [sys.executable, "-m", "quick_cli", "run", str(write_recipe(folder)), "--out", str(out)],
                capture_output=True,
                text=True,
                check=False,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(SAMPLES), os.environ.get("PYTHONPATH", "")]),
                },
            )
            assert child.returncode == 0, child.stderr
            stdout.write_text(child.stdout, encoding="utf-8")
            stderr.write_text(child.stderr, encoding="utf-8")
    said, complained = (path.read_text(encoding="utf-8") for path in (stdout, stderr))
    return FinishedRun(folder / "tiny.yaml", out, said, complained)
