"""Files of an artefact, whose names and contents are not to be trusted."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from fips_ort.errors import ArtifactError

MANIFEST = "fips.json"
"""The file that names all others."""
_HUB_REPOSITORY = ("models--", "datasets--", "spaces--")
_LONGEST_PATH = 1024


def inside(folder: Path, relative: str) -> Path:
    """The path of ``relative`` (with slashes) in ``folder``, links not followed.

    Raises ArtifactError if it is not written in the one plain way, is absolute, or leads outside by ``..`` or a
    symbolic link. In a snapshot of the Hugging Face cache (``models--ORG--NAME/snapshots/REVISION``), where every file
    is a link, links may lead to the ``blobs`` of the same repository.
    """
    where = f"{folder / MANIFEST}: path {quoted(relative)}"
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in relative or ":" in relative:
        raise ArtifactError(f"{where} leads outside the artefact's folder")
    if not relative.isprintable() or pure.as_posix() != relative or len(relative) > _LONGEST_PATH:
        raise ArtifactError(f"{where} is no plain relative path")
    path = folder / relative
    try:
        resolved, own = path.resolve(), folder.resolve()
        allowed = resolved.is_relative_to(own) or resolved.parent == _blobs_of_snapshot(own)
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a zero byte
        raise ArtifactError(f"{where} cannot be followed: {error}") from None
    if not allowed:
        raise ArtifactError(f"{where} leads outside the artefact's folder")
    return path


def _blobs_of_snapshot(folder: Path) -> Path | None:
    """The folder of the files' contents, if ``folder`` (resolved) is in a snapshot of the Hugging Face cache."""
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith(_HUB_REPOSITORY):
            blobs = repository / "blobs"
            return None if blobs.is_symlink() else blobs
    return None


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Raises ArtifactError for a larger one, before it is
    read, for anything that is no regular file (without waiting for it), and if it cannot be read."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"{path}: is no regular file")
            if status.st_size > limit:
                raise ArtifactError(f"{path}: file has {status.st_size:,} bytes, at most {limit:,} are read")
            return file.read(limit)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: file is missing") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None


def file_size(path: Path) -> int:
    """Size of a regular file in bytes, links followed. Raises ArtifactError if it is missing or none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ArtifactError(f"{path}: file is missing") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path}: is no regular file")
    return status.st_size


def quoted(value: object) -> str:
    """``value`` as Python writes it, cut to 80 characters, or its type: for messages about what others wrote."""
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:79]}…"


def some_of(names: Iterable[str]) -> str:
    """The first few of ``names`` that others chose, for a message."""
    shown = [name if name.isprintable() and 0 < len(name) <= 80 else quoted(name) for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
