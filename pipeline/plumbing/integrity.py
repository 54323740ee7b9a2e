"""Files of a stage that is not finished yet, and what shows that they are whole when a later process goes on from them.

Beside a file stands a note of its SHA-256. Files of finished stages need none: ``stage.json`` lists theirs.
"""

from pathlib import Path

from fips_ort.manifest import sha256
from pipeline.plumbing.files import digest, read_json, write_json

_KEPT = 16
"""Hashes that a note keeps: that of the file, and of those it has replaced."""


def note_hash(path: Path, *, of: Path | None = None) -> None:
    """Note the hash of ``path``; or of the file ``of``, which is to be moved there in one step.

    Hashes noted before hold too: a kill before that step leaves what was there.
    """
    before = [] if of is None else _noted(path)
    write_json(_note(path), [sha256(path if of is None else of), *before][:_KEPT])


def is_whole(path: Path) -> bool:
    """Whether a file is there as it was when its hash was noted."""
    try:
        return path.is_file() and sha256(path) in _noted(path)
    except OSError:
        return False


def forget(path: Path) -> None:
    """Remove the note of a file."""
    _note(path).unlink(missing_ok=True)


def write_sealed(path: Path, content: object) -> None:
    """Write JSON with its hash in the same file."""
    write_json(path, {"sha256": digest(content), "content": content})


def read_sealed(path: Path) -> object | None:
    """The content that :func:`write_sealed` has written; None if the file is missing or damaged."""
    try:
        sealed = read_json(path)
        return sealed["content"] if digest(sealed["content"]) == sealed["sha256"] else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _noted(path: Path) -> list[str]:
    try:
        noted = read_json(_note(path))
    except (OSError, ValueError, RecursionError):
        return []
    return [value for value in noted if isinstance(value, str)] if isinstance(noted, list) else []
