"""Files written aside and moved into place, arrays written through memory, and digests."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from safetensors import SafetensorError

from pipeline.plumbing.errors import InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make what goes wrong with writing ``path`` (a full disk, no permission) an InputError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary sibling of ``path``, then move it into place in one step.

    If writing fails, whatever stood at ``path`` stays as it was, and an InputError says why.
    """
    _write_aside(path, lambda: path.with_name(f".{path.name}.tmp"), write)


def write_beside_others(path: Path, write: Callable[[Path], object]) -> None:
    """As :func:`write_aside`, where other processes may be writing the same file: each under a name of its own."""

    def new_file() -> Path:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        return Path(name)

    _write_aside(path, new_file, write)


def _write_aside(path: Path, temporary_of: Callable[[], Path], write: Callable[[Path], object]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_of()
        try:
            write(temporary)
            os.replace(temporary, path)
        except RuntimeError as error:  # what torch.save makes of an OSError
            hidden = error.__context__
            raise hidden if isinstance(hidden, OSError) else OSError(f"{error}; is the disk full?") from None
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_aside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=False) + "\n")


def create_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Create a file (.npy) of float32 zeros that is written through memory.

    Raises OSError if the disk has no room for it.
    """
    array = open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with path.open("r+b") as opened:  # otherwise a full disk kills the process when the memory is written
        os.posix_fallocate(opened.fileno(), 0, path.stat().st_size)
    return array


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def digest(content: Any) -> str:
    """SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
