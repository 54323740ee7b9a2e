"""The folder of a run: results of stages, each under the key of everything it depends on.

A stage's result is a folder ``work/STAGE`` with a ``stage.json`` that holds the key; it is written last, so a
killed stage leaves none and is run again (long training continues from its checkpoint, which carries the
same key). Only successes are kept. A key covers: the stage's name and settings, the key of the stage before,
our own source code and the versions of the libraries that compute.
"""

import hashlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.files import digest, read_json, write_json
from pipeline.progress import Progress

LIBRARIES = ("fips-onnx", "fips-ort", "torch", "torchao", "transformers", "numpy", "onnx", "onnx-ir", "onnxruntime")


class RunFolder:
    """``folder``: where artefact, report and ``work/`` go. Use as a context: it is locked against a second run."""

    def __init__(self, folder: Path, progress: Progress, *, fresh: bool = False) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        try:
            if fresh:
                shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {folder}: cannot make the folder: {error.strerror}") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Refuse a second run in the same folder. The system lifts the lock when the process ends, however it ends."""
        import fcntl

        with (self.work / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"--out {self.folder}: another run is working in this folder; wait or choose another") from None
            yield

    def stage(
        self,
        name: str,
        settings: Any,
        before: str,
        compute: Callable[[Path], None],
        is_valid: Callable[[Path], bool] = lambda _: True,
    ) -> str:
        """Run ``compute(folder)`` unless its result is there already; returns the stage's key.

        ``compute`` gets ``work/NAME`` and writes its result into it; what a killed attempt with the same key left
        there (checkpoints) is still there. ``is_valid(folder)`` says whether an earlier result still holds.
        """
        key = stage_key(name, settings, before)
        folder = self.work / name
        done, started = folder / "stage.json", folder / "started.json"
        if done.exists() and _key_in(done) == key and is_valid(folder):
            self.seconds[name] = read_json(done)["seconds"]
            self.reused.append(name)
            self.progress.say(f"{name}: unchanged, taken from {folder}")
            return key
        if not started.exists() or _key_in(started) != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(started, {"key": key})
        done.unlink(missing_ok=True)
        self.progress.say(f"{name}")
        begin = time.monotonic()
        compute(folder)
        self.seconds[name] = round(time.monotonic() - begin, 3)
        write_json(done, {"key": key, "seconds": self.seconds[name]})
        started.unlink()
        return key


def stage_key(name: str, settings: Any, before: str) -> str:
    return digest({"stage": name, "settings": settings, "before": before, "code": code_digest(), "versions": versions()})


def _key_in(path: Path) -> str | None:
    try:
        return str(read_json(path)["key"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


@cache
def code_digest() -> str:
    """SHA-256 over the source files of our packages."""
    import exporters
    import fips_ort
    import qat

    import pipeline

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
