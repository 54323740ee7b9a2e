"""A recipe that runs in seconds, and ways to run it: in this process, or in one that can be killed."""

import contextlib
import gc
import hashlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline import cli
from pipeline.evaluation.measurements import NATIVE, ArtifactMemory, Benchmark, ImageSpeed, ImageSpeedRow
from pipeline.plumbing import training_loop
from pipeline.plumbing.files import read_json
from pipeline.plumbing.progress import Advance, Progress
from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import Recipe
from pipeline.run import ARTIFACT, run
from pipeline.stages import deliver

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "source": "scratch",
        "model_type": "vit",
        "config": {
            "image_size": 8,
            "patch_size": 4,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        "training": {"steps": 60, "batch_size": 64, "learning_rate": 3e-3},
    },
    "data": {"source": "digits", "image_size": 8},
    "calibration": {"samples": 128},
    "compression": {
        "groups": [[0, 1], [2]],
        "budget": 0.6,
        "pattern": "bitmap",
        "sparsity": 0.5,
        "sparsifier": {"algorithm": "gmp", "update_every": 5},
    },
    "fit": {"steps": 20, "batch_tokens": 128, "learning_rate": 3e-3},
    "quantization": {
        "basis": {"bits": 4, "block_size": 16},
        "projections": {"bits": 3, "block_size": 16},
        "training": [
            {"objective": "local", "steps": 10, "batch_tokens": 128},
            {"objective": "distill", "steps": 5, "batch_size": 32},
        ],
    },
    "evaluation": {"samples": 200},
}
SHORT_BENCH_SECONDS = 0.2

TINY_LANGUAGE: dict[str, Any] = {
    "name": "tiny-language",
    "calibration": {"samples": 24, "batch_size": 8},
    "compression": {
        "groups": 2,
        "budget": 0.5,
        "pattern": "bitmap",
        "sparsity": 0.5,
        "sparsifier": {"algorithm": "static", "ranking": "group", "saliency": "activation"},
    },
    "fit": {"steps": 20, "batch_tokens": 128, "learning_rate": 3e-3},
    "quantization": {
        "start": "gptq",
        "basis": {"bits": 4, "block_size": 16},
        "projections": {"bits": 2, "block_size": 16, "levels": "midrise"},
        "training": [
            {"objective": "local", "steps": 10, "batch_tokens": 256, "learning_rate": 3e-3},
            {
                "objective": "distill",
                "steps": 20,
                "batch_size": 8,
                "learning_rate": 3e-3,
                "precision": "bfloat16",
                "train_rest": True,
            },
        ],
        "rest": {"linear_bits": 4, "embedding_bits": 4, "block_size": 16},
    },
    "evaluation": {"samples": 10, "batch_size": 4},
}
"""Needs ``model`` and ``data``: :func:`language_recipe`."""


def tiny_recipe(**changes: Any) -> Recipe:
    """The tiny recipe with some top-level keys replaced."""
    return parse_recipe({**TINY, **changes}, "tiny.yaml")


def language_recipe(model: Path, text: Path, **changes: Any) -> Recipe:
    """The tiny recipe of language models with some top-level keys replaced, or left out (None); its windows are
    twice as long as the models' sliding windows."""
    content = {
        **TINY_LANGUAGE,
        "model": {"source": "causal_lm", "path": str(model)},
        "data": {
            "source": "text",
            "train": str(text / "train.txt"),
            "test": str(text / "test.jsonl"),
            "context": 32,
        },
        **changes,
    }
    return parse_recipe({key: value for key, value in content.items() if value is not None}, "tiny-language.yaml")


def quantization_of_language(**changes: Any) -> dict[str, Any]:
    """Section ``quantization`` of the tiny recipe of language models with some keys replaced, or left out (None)."""
    changed = {**TINY_LANGUAGE["quantization"], **changes}
    return {key: value for key, value in changed.items() if value is not None}


def write_recipe(folder: Path, content: Any = TINY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- in this process -------------------------------------------------------------------------------------------


class StopRun(BaseException):
    """Raised by :class:`StoppingProgress`."""


class StoppingProgress(Progress):
    """Collects what a run says, and stops it when it says ``at``."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)
        if message == self.at:
            raise StopRun


def stages_run_for(recipe: Recipe, folder: Path, *, until: str = "bench") -> list[str]:
    """Run in ``folder`` up to the stage ``until`` (before the bench the artefact is complete); which stages before
    it were computed, not taken from earlier runs."""
    progress = StoppingProgress(until)
    try:
        run(recipe, folder, progress)
    except StopRun:
        progress.lines.pop()
    return [line for line in progress.lines if not line.startswith(" ") and "unchanged" not in line]


def no_bench(*_: Any) -> Benchmark:
    """Speed and memory in the place of ``ImageClassificationTask.bench``, for tests of anything else: to measure them,
    a run exports the dense model twice, half of what a tiny one takes."""
    row = ImageSpeedRow(backend=NATIVE, images_per_second=1.0, ratio_to_float32=1.0)
    speed = ImageSpeed(unit="images/s", batch=8, threads=1, rows=(row,))
    return Benchmark(speed=speed, memory=ArtifactMemory(load_rss_bytes=1, peak_rss_bytes=1))


# --- in another process ----------------------------------------------------------------------------------------

# A server that has imported everything once forks a fresh process for each run. (It finds installed modules only,
# so it could not import this one.)
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "pipeline.cli",
        "pipeline.run",
        "sklearn.datasets",
        "sklearn.model_selection",
        "transformers.models.vit.modeling_vit",
        "transformers.models.vit.image_processing_pil_vit",
        "pipeline.tasks.causal_lm",
        "transformers.models.gemma3.modeling_gemma3",
    ]
)


@dataclass(frozen=True)
class KillAt:
    """Where a process kills itself with SIGKILL: as stage ``line`` begins; or, where given, at ``step`` of the
    training labelled ``task``; or before its ``replace``-th file is moved into place."""

    line: str | None = None
    task: str | None = None
    step: int = 0
    replace: int | None = None


class _KillingProgress(Progress):
    def __init__(self, at: KillAt) -> None:
        super().__init__()
        self.at = at

    def say(self, message: str) -> None:
        if message == self.at.line:
            _kill()

    @contextmanager
    def task(self, label: str, total: int, *, start: int = 0) -> Iterator[Advance]:
        done = start

        def advance(steps: int, remark: str = "") -> None:
            nonlocal done
            done += steps
            if label == self.at.task and done == self.at.step:
                _kill()

        yield advance


def _prepare_child() -> None:
    torch.set_num_threads(1)
    # What was imported before the fork stays: runs collect garbage after each stage, and need not look there.
    gc.freeze()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_in_process(recipe: Recipe, folder: Path, kill_at: KillAt) -> int:
    """Run up to the bench in a process of its own, with a checkpoint after every step of training; its exit code,
    which is -9 if it killed itself."""
    process = _PROCESSES.Process(target=_run_until_bench, args=(recipe, folder, kill_at))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run_until_bench(recipe: Recipe, folder: Path, kill_at: KillAt) -> None:
    _prepare_child()
    training_loop.CHECKPOINT_SECONDS = -1.0
    if kill_at.replace is not None:
        _kill_at_replace(kill_at.replace)

    def stop(*_: Any) -> None:
        raise StopRun

    deliver.bench = stop
    try:
        run(recipe, folder, _KillingProgress(kill_at))
    except StopRun:
        sys.exit(0)


def _kill_at_replace(last: int) -> None:
    move, count = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == last:
            _kill()
        move(source, target)

    os.replace = replace  # type: ignore[assignment]


class _StoppingProgress(Progress):
    def __init__(self, until: str) -> None:
        super().__init__()
        self.until = until

    def say(self, message: str) -> None:
        if message == self.until:
            raise StopRun


def memory_of_stages(recipe: Recipe, folder: Path, until: str) -> dict[str, int]:
    """Run up to the stage ``until`` in a process of its own: largest resident memory of each stage, in bytes."""
    process = _PROCESSES.Process(target=_run_until, args=(recipe, folder, until))
    process.start()
    process.join()
    assert process.exitcode == 0
    work = folder / "work"
    return {
        path.parent.relative_to(work).as_posix(): read_json(path)["peak_rss_bytes"] for path in work.rglob("stage.json")
    }


def _run_until(recipe: Recipe, folder: Path, until: str) -> None:
    with contextlib.suppress(StopRun):
        run(recipe, folder, _StoppingProgress(until))


def fips(arguments: list[str], *, file_limit: int | None = None) -> tuple[int, str]:
    """The command ``fips`` in a process of its own: exit status and what it wrote to standard error.

    ``file_limit``: largest size in bytes of a file it can write, a disk that is full.
    """
    reader, writer = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_fips, args=(arguments, writer, file_limit))
    process.start()
    writer.close()
    with open(reader.fileno(), encoding="utf-8", closefd=False) as file:
        text = file.read()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, text


def _fips(arguments: list[str], stderr: Connection, file_limit: int | None) -> None:
    os.dup2(stderr.fileno(), 2)
    _prepare_child()
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["fips", *arguments]
    cli.main()


def artifact_hashes(folder: Path) -> dict[str, str]:
    return hashes(folder / ARTIFACT)
