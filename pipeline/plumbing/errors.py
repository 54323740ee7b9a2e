"""Errors that end a command with one clear message and no traceback; that of what nobody has foreseen is kept."""

import tempfile
import traceback
from pathlib import Path

_LONGEST = 300
"""Characters of an unforeseen error that are shown."""


class InputError(ValueError):
    """Bad input, the user's to mend: the message names file, key, value and remedy. Exit status 2."""


class StageError(RuntimeError):
    """A run that could not reach what it promised (a parity failure, say): exit status 1, no traceback."""


class UnforeseenError(StageError):
    """What nobody has foreseen, its cause, in a run. ``stage``: what was being computed. ``folder``: where to keep the
    traceback."""

    def __init__(self, stage: str | None, folder: Path) -> None:
        super().__init__(f"{stage or 'between two stages'}: an error that was not foreseen")
        self.stage = stage
        self.folder = folder


def one_line(error: BaseException) -> str:
    """An error's kind and its whole message, in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def describe_unforeseen(error: BaseException) -> str:
    """Describe an error that nobody has foreseen in one line, and keep its traceback in a file that the line names."""
    where, folder, cause = "", None, error
    if isinstance(error, UnforeseenError) and error.__cause__ is not None:
        where, folder, cause = f"{error.stage}: " if error.stage else "", error.folder, error.__cause__
    said = one_line(cause)
    if isinstance(cause, MemoryError):
        said += " (out of memory)"
    if len(said) > _LONGEST:
        said = f"{said[:_LONGEST]}…"
    text = "".join(traceback.format_exception(cause))
    kept = _keep(text, folder)
    traced = f"the traceback is in {kept}" if kept else f"and no disk takes the traceback:\n{text}"
    return f"{where}{said}; this was not foreseen, {traced}"


def _keep(text: str, folder: Path | None) -> Path | None:
    """Write a traceback into a new file in ``folder``, else where temporary files go; None if neither takes it."""
    for place in (folder, None) if folder is not None else (None,):
        try:
            descriptor, name = tempfile.mkstemp(dir=place, prefix="failure-", suffix=".txt")
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return Path(name)
        except OSError:
            continue
    return None
