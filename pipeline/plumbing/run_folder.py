"""The folder of a run: results of stages, each under the key of everything it depends on.

A stage's result is a folder ``work/STAGE`` with a ``stage.json`` that holds the key; it is written last, so a
killed stage leaves none and is run again (long training continues from its checkpoint, which carries the
same key). It also lists the result's files with their sizes and SHA-256: a result that lost some, or in which a bit has
changed, is computed anew. Only successes are kept. A key covers: the stage's name and settings, the keys of the stages
that it reads, our own source code and the versions of the libraries that compute.

``work/`` carries a mark (:mod:`pipeline.plumbing.ownership`), ``work/.stages/`` has an empty file for every stage that
was ever begun, and nothing else is replaced or deleted.

Runs that have stages in common (a sweep's) can share a folder of results by key: whoever comes first computes, the
others wait, and all link the same files.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from fips_ort.manifest import sha256
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import digest, writing
from pipeline.plumbing.ownership import check_mine, claim
from pipeline.plumbing.peak_memory import give_back_memory, peak_rss_bytes
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.records import Record, find_record, read_record, write_record

LIBRARIES = ("fips-onnx", "fips-ort", "torch", "torchao", "transformers", "numpy", "onnx", "onnx-ir", "onnxruntime")
NOT_INSTALLED = "unknown"
"""Version of a library that is used without being installed, from its sources or its build folder."""

ROOMS = (
    "vocabulary", "model", "evaluate", "calibrate", "sensitivities", "allocate", "factorize", "fit", "finetune", "qat",
    "pack", "export", "validate", "bench",
)  # fmt: skip
"""First parts of the names of all stages: what else lies in ``work/`` is in no stage's way and is left alone."""
_DONE, _STARTED, _REGISTER = "stage.json", "started.json", ".stages"


@dataclass(frozen=True)
class StageResult:
    """What a stage left: its ``folder``, and the ``key`` of everything that it depends on."""

    folder: Path
    key: str


class _Started(Record):
    """Content of ``started.json``, which marks a stage that is being computed, or was when the process was killed."""

    key: str


class _File(Record):
    bytes: NonNegativeInt
    sha256: str


class _Done(Record):
    """Content of ``stage.json``, which marks a finished stage. ``files``: every file of the result, by path."""

    key: str
    seconds: NonNegativeFloat
    peak_rss_bytes: PositiveInt
    files: dict[str, _File]


class RunFolder:
    """The folder of a run, in which stages are computed or found; :meth:`lock` it against a second run.

    ``folder``: where artefact, report and ``work/`` go. ``shared``: folder of results by key, on the same file system,
    for runs that have stages in common. ``computing``: the stage that is being computed, or was when it failed.
    """

    def __init__(self, folder: Path, progress: Progress, *, fresh: bool = False, shared: Path | None = None) -> None:
        self.folder = folder
        self.shared = shared
        self.work = folder / "work"
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.peak_rss_bytes: dict[str, int] = {}
        self.reused: list[str] = []
        self.computing: str | None = None
        self.fresh = fresh
        self._hashes: dict[tuple[str, int, int, int], str] = {}

    def check(self) -> None:
        """Raise InputError if what is not ours stands where the run writes. Nothing is written."""
        where = f"--out {self.folder}"
        with writing(self.folder):
            if self.folder.exists():
                os.listdir(self.folder)
        check_mine(self.work, where)
        for room in ROOMS:
            self._refuse_foreign(self.work / room)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Refuse a second run in the same folder. The system lifts the lock when the process ends, however it ends.

        With ``fresh``, the results of earlier runs are deleted, and nothing else. Raises InputError as :meth:`check`
        does.
        """
        claim(self.work, f"--out {self.folder}")
        with only_one(self.work / "lock", f"--out {self.folder}: another run works in this folder"):
            self.check()
            self._check_shared()
            if self.fresh:
                self.clear()
            yield

    def clear(self) -> None:
        """Delete the results of all stages."""
        for registered in (self.work / _REGISTER).glob("*"):
            folder = self.work / registered.name.replace("%", "/")
            with writing(folder):
                if folder.exists():
                    shutil.rmtree(folder)
                registered.unlink()
            if folder.parent != self.work:
                with suppress(OSError):  # other groups, or nothing
                    folder.parent.rmdir()

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
        self.computing = name
        with self._wait_for_others(name, key):
            if self.shared is not None and find_record(_Done, self.shared / key / _DONE) is not None:
                self._take_shared(self.shared / key, key, folder)
                if self._has(result) and is_valid(folder):
                    self._reuse(name)
                    self.progress.say(f"{name}: shared, taken from {self.shared}")
                    return result
            self._compute(name, key, folder, compute)
            if self.shared is not None:
                with writing(self.shared):
                    _publish(folder, self.shared / key)
        self.computing = None
        return result

    def expected(self, name: str, settings: Any, inputs: Sequence[StageResult]) -> StageResult:
        """Return what :meth:`stage` returns with these arguments, whether it is there or not."""
        assert name.partition("/")[0] in ROOMS, f"{name} is in none of the ROOMS"
        return StageResult(self.work / name, stage_key(name, settings, inputs))

    def has(self, name: str, settings: Any, inputs: Sequence[StageResult]) -> bool:
        """Whether the result of a stage is there already, whole."""
        return self._has(self.expected(name, settings, inputs))

    def _has(self, result: StageResult) -> bool:
        done = find_record(_Done, result.folder / _DONE)
        if done is None or done.key != result.key:
            return False
        try:
            files = {result.folder / path: file for path, file in done.files.items()}
            # All sizes before the first SHA-256: what is truncated is found at once.
            return all(path.stat().st_size == file.bytes for path, file in files.items()) and all(
                self._sha256(path) == file.sha256 for path, file in files.items()
            )
        except OSError:
            return False

    def _sha256(self, path: Path) -> str:
        """SHA-256 of a file, computed once while it stays as it is."""
        found = path.stat()
        state = (str(path), found.st_ino, found.st_size, found.st_mtime_ns)
        if state not in self._hashes:
            self._hashes[state] = sha256(path)
        return self._hashes[state]

    def _compute(self, name: str, key: str, folder: Path, compute: Callable[[Path], None]) -> None:
        done, started = folder / _DONE, folder / _STARTED
        if find_record(_Started, started) != _Started(key=key):
            self._begin(key, folder)
        done.unlink(missing_ok=True)
        self.progress.say(name)
        begin = time.monotonic()
        with writing(folder):
            compute(folder)
        seconds = self.seconds[name] = round(time.monotonic() - begin, 3)
        peak = self.peak_rss_bytes[name] = peak_rss_bytes()
        with writing(folder):
            files = {
                path: _File(bytes=(folder / path).stat().st_size, sha256=self._sha256(folder / path))
                for path in _files(folder)
            }
        write_record(done, _Done(key=key, seconds=seconds, peak_rss_bytes=peak, files=files))
        started.unlink()
        give_back_memory()

    def _begin(self, key: str, folder: Path) -> None:
        """Empty the folder of a stage and mark it as started."""
        self._refuse_foreign(folder)
        with writing(folder):
            (self.work / _REGISTER).mkdir(parents=True, exist_ok=True)
            self._registered(folder).touch()
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        write_record(folder / _STARTED, _Started(key=key))

    def _registered(self, folder: Path) -> Path:
        """The empty file that says that the stage with this folder is, or was, one of ours."""
        return self.work / _REGISTER / folder.relative_to(self.work).as_posix().replace("/", "%")

    def _refuse_foreign(self, folder: Path) -> None:
        """Raise InputError if there are files at or below ``folder``, where stages are, that none of them has left."""
        foreign = self._foreign(folder)
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise InputError(
                f"--out {self.folder}: {foreign[0]}{more} is no result of a run, and in the way of one; it is left "
                "untouched: move it away"
            )

    def _foreign(self, path: Path) -> list[Path]:
        try:
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                return [path]
            if self._registered(path).is_file():
                # What a killed or damaged stage has left is not listed anywhere.
                done = None if (path / _STARTED).is_file() else find_record(_Done, path / _DONE)
                return [] if done is None else [path / name for name in _files(path) if name not in done.files]
            return [found for inner in sorted(path.glob("*")) for found in self._foreign(inner)]
        except FileNotFoundError:  # a run that is at work has just deleted it
            return []

    def _take_shared(self, source: Path, key: str, folder: Path) -> None:
        self._begin(key, folder)
        with writing(folder):
            _link_files(source, folder)
            (folder / _STARTED).unlink()

    def _reuse(self, name: str) -> None:
        """Count a result that is there already, with what it took to compute."""
        done = read_record(_Done, self.work / name / _DONE)
        self.seconds[name] = done.seconds
        self.peak_rss_bytes[name] = done.peak_rss_bytes
        self.reused.append(name)
        self.computing = None

    def _wait_for_others(self, name: str, key: str) -> AbstractContextManager[None]:
        """Hold a stage that other runs may want as well, so that it is computed once."""
        if self.shared is None:
            return nullcontext()
        waiting = f"{name}: waiting for another run that is at it"
        return one_after_another(self.shared / f"{key}.lock", lambda: self.progress.say(waiting))

    def _check_shared(self) -> None:
        """Raise InputError unless ``shared`` is a folder whose files can be linked into ``work``."""
        if self.shared is None:
            return
        with writing(self.shared):
            self.shared.mkdir(parents=True, exist_ok=True)
            if self.shared.stat().st_dev != self.work.stat().st_dev:
                raise InputError(
                    f"--shared {self.shared}: is on another file system than {self.work}, so results cannot be linked "
                    "between them; take a folder on the same one"
                )


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
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        file = path.open("a")  # whatever it is, it keeps its content
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def clear_shared(shared: Path) -> None:
    """Delete the results that runs have left in the folder ``shared`` for others, and nothing else."""
    with writing(shared):
        for path in shared.iterdir() if shared.is_dir() else ():
            if re.fullmatch(r"[0-9a-f]{64}(\.[0-9]+\.tmp)?", path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif re.fullmatch(r"[0-9a-f]{64}\.lock", path.name) and path.is_file():
                path.unlink()


def _link_files(source: Path, target: Path) -> None:
    """Make hard links of all files of a finished stage, its mark last. That is safe: results are only ever replaced,
    never written over."""
    for name in [*_files(source), _DONE]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(source / name, target / name)


def _publish(folder: Path, target: Path) -> None:
    """Link a finished stage's files to where others look for them, in one step."""
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    for path in (aside, target):
        if path.is_dir():
            # A target that is there is damaged: it would have been taken.
            shutil.rmtree(path)
    aside.mkdir()
    _link_files(folder, aside)
    os.replace(aside, target)


def stage_key(name: str, settings: Any, inputs: Sequence[StageResult]) -> str:
    """SHA-256 of everything that the result of a stage depends on."""
    keys = [result.key for result in inputs]
    return digest(
        {"stage": name, "settings": settings, "inputs": keys, "code": code_digest(), "versions": versions()}
    )


def _files(folder: Path) -> list[str]:
    """Paths of the files below a stage's folder that are not its marks."""
    own = {folder / name for mark in (_DONE, _STARTED) for name in (mark, f".{mark}.tmp")}
    found = sorted(path for path in folder.rglob("*") if (path.is_symlink() or not path.is_dir()) and path not in own)
    return [path.relative_to(folder).as_posix() for path in found]


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
    """Versions of the libraries that a result depends on.

    Distributions of one library under several names (``onnxruntime-gpu``, ``onnxruntime-qnn``, ``torch`` builds) count
    as the library; the name is beside the version then.
    """
    return {name: _version(name) for name in LIBRARIES}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        module = library.replace("-", "_")
        others = sorted({*importlib.metadata.packages_distributions().get(module, ())})
        found = [f"{importlib.metadata.version(name)} ({name})" for name in others]
        return ", ".join(found) or NOT_INSTALLED
