"""The folder of a run: results of stages, each under the key of everything it depends on.

A stage's result is a folder ``work/STAGE`` with a ``stage.json`` that holds the key; it is written last, so a
killed stage leaves none and is run again (long training continues from its checkpoint, which carries the
same key). It also lists the result's files with their sizes: a result that lost some is computed anew. Only
successes are kept. A key covers: the stage's name and settings, the keys of the stages that it reads,
our own source code and the versions of the libraries that compute.

Runs that have stages in common (a sweep's) can share a folder of results by key: whoever comes first computes, the
others wait, and all link the same files.
"""

import hashlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import digest, writing
from pipeline.plumbing.peak_memory import give_back_memory, peak_rss_bytes
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.records import Record, find_record, read_record, write_record

LIBRARIES = ("fips-onnx", "fips-ort", "torch", "torchao", "transformers", "numpy", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class StageResult:
    """What a stage left: its ``folder``, and the ``key`` of everything that it depends on."""

    folder: Path
    key: str


class _Started(Record):
    """Content of ``started.json``, which marks a stage that is being computed, or was when the process was killed."""

    key: str


class _Done(Record):
    """Content of ``stage.json``, which marks a finished stage. ``files``: bytes of every file of the result, by
    path."""

    key: str
    seconds: NonNegativeFloat
    peak_rss_bytes: PositiveInt
    files: dict[str, NonNegativeInt]


class RunFolder:
    """The folder of a run, in which stages are computed or found; :meth:`lock` it against a second run.

    ``folder``: where artefact, report and ``work/`` go. ``shared``: folder of results by key, on the same file system,
    for runs that have stages in common.
    """

    def __init__(self, folder: Path, progress: Progress, *, fresh: bool = False, shared: Path | None = None) -> None:
        self.folder = folder
        self.shared = shared
        self.work = folder / "work"
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.peak_rss_bytes: dict[str, int] = {}
        self.reused: list[str] = []
        self.fresh = fresh

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Refuse a second run in the same folder. The system lifts the lock when the process ends, however it ends.

        With ``fresh``, the results of earlier runs are deleted.
        """
        with writing(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
        with only_one(self.work / "lock", f"--out {self.folder}: another run works in this folder"):
            if self.fresh:
                for folder in filter(Path.is_dir, self.work.iterdir()):
                    shutil.rmtree(folder)
            yield

    def stage(
        self,
        name: str,
        settings: Any,
        inputs: Sequence[StageResult],
        compute: Callable[[Path], None],
        is_valid: Callable[[Path], bool] = lambda _: True,
    ) -> StageResult:
        """Run ``compute(folder)`` unless its result is there already.

        The result depends on ``settings`` (a JSON-serialisable value) and ``inputs``. ``compute`` gets ``work/NAME``
        and writes its result into it; what a killed attempt with the same key left there (checkpoints) is still there.
        ``is_valid(folder)`` says whether an earlier result still holds.
        """
        result = self.expected(name, settings, inputs)
        folder, key = result.folder, result.key
        if self._has(result) and is_valid(folder):
            self._reuse(name)
            self.progress.say(f"{name}: unchanged, taken from {folder}")
            return result
        with self._wait_for_others(name, key):
            if self.shared is not None and (self.shared / key / "stage.json").exists():
                with writing(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                    _link_tree(self.shared / key, folder)
                if self._has(result) and is_valid(folder):
                    self._reuse(name)
                    self.progress.say(f"{name}: shared, taken from {self.shared}")
                    return result
            self._compute(name, key, folder, compute)
            if self.shared is not None:
                with writing(self.shared):
                    _publish(folder, self.shared / key)
        return result

    def expected(self, name: str, settings: Any, inputs: Sequence[StageResult]) -> StageResult:
        """Return what :meth:`stage` returns with these arguments, whether it is there or not."""
        return StageResult(self.work / name, stage_key(name, settings, inputs))

    def has(self, name: str, settings: Any, inputs: Sequence[StageResult]) -> bool:
        """Whether the result of a stage is there already, whole."""
        return self._has(self.expected(name, settings, inputs))

    def _has(self, result: StageResult) -> bool:
        done = find_record(_Done, result.folder / "stage.json")
        return done is not None and done.key == result.key and done.files == _file_sizes(result.folder)

    def _compute(self, name: str, key: str, folder: Path, compute: Callable[[Path], None]) -> None:
        done, started = folder / "stage.json", folder / "started.json"
        if find_record(_Started, started) != _Started(key=key):
            with writing(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            write_record(started, _Started(key=key))
        done.unlink(missing_ok=True)
        self.progress.say(name)
        begin = time.monotonic()
        with writing(folder):
            compute(folder)
        seconds = self.seconds[name] = round(time.monotonic() - begin, 3)
        peak = self.peak_rss_bytes[name] = peak_rss_bytes()
        write_record(done, _Done(key=key, seconds=seconds, peak_rss_bytes=peak, files=_file_sizes(folder)))
        started.unlink()
        give_back_memory()

    def _reuse(self, name: str) -> None:
        """Count a result that is there already, with what it took to compute."""
        done = read_record(_Done, self.work / name / "stage.json")
        self.seconds[name] = done.seconds
        self.peak_rss_bytes[name] = done.peak_rss_bytes
        self.reused.append(name)

    def _wait_for_others(self, name: str, key: str) -> AbstractContextManager[None]:
        """Hold a stage that other runs may want as well, so that it is computed once."""
        if self.shared is None:
            return nullcontext()
        with writing(self.shared):
            self.shared.mkdir(parents=True, exist_ok=True)
        waiting = f"{name}: waiting for another run that is at it"
        return one_after_another(self.shared / f"{key}.lock", lambda: self.progress.say(waiting))


@contextmanager
def only_one(path: Path, complaint: str) -> Iterator[None]:
    """Hold the lock file ``path``, or raise InputError with ``complaint``. The system lifts it when the process ends,
    however it ends."""

    def refuse() -> None:
        raise InputError(f"{complaint}; wait, or choose another") from None

    with one_after_another(path, refuse):
        yield


@contextmanager
def one_after_another(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file ``path``; ``wait`` is called if another process holds it, before waiting for that one."""
    import fcntl

    with writing(path):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _link_tree(source: Path, target: Path) -> None:
    """Make hard links of all files, which is safe: results are only ever replaced, never written over."""
    shutil.copytree(source, target, copy_function=os.link)


def _publish(folder: Path, target: Path) -> None:
    """Link a finished stage's files to where others look for them, in one step."""
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    _link_tree(folder, aside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


def stage_key(name: str, settings: Any, inputs: Sequence[StageResult]) -> str:
    """SHA-256 of everything that the result of a stage depends on."""
    keys = [result.key for result in inputs]
    return digest(
        {"stage": name, "settings": settings, "inputs": keys, "code": code_digest(), "versions": versions()}
    )


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a stage's result, by path."""
    own = {folder / "stage.json", folder / "started.json"}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in own)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@cache
def code_digest() -> str:
    """SHA-256 over the source files of our packages."""
    import exporters
    import fips_ort
    import pipeline
    import qat

    sha256 = hashlib.sha256()
    for package in (pipeline, exporters, qat, fips_ort):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            sha256.update(f"{package.__name__}/{file.relative_to(root)}".encode() + file.read_bytes())
    return sha256.hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
