"""Which folders and files are ours: only what carries our mark is ever replaced or deleted."""

import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import writing

MARK = ".made-by-fips"
"""Name of the empty file that marks a folder: the command fips has made it, and replaces its own results there. It is
created while nothing else is there that we would replace or delete."""


def check_mine(folder: Path, where: str, names: Iterable[str] | None = None) -> None:
    """Raise InputError, which ``where`` begins, if ``folder`` holds what we have not made; nothing is written.

    ``names``: the entries that we would replace, where others may be there too; all entries if not given.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{where}: {folder} is no folder and is left untouched; move it away, or choose another")
    with writing(folder):
        if not os.path.lexists(folder) or (folder / MARK).is_file():
            return
        there = {*os.listdir(folder)}
    foreign = sorted(there if names is None else there & {*names})
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"{where}: {folder / foreign[0]}{more} was not made by fips and is left untouched; move it away, or choose "
            "another folder"
        )


def claim(folder: Path, where: str, names: Iterable[str] | None = None) -> None:
    """Make ``folder`` ours: create and mark it, unless it is marked already. Raises InputError as :func:`check_mine`
    does."""
    check_mine(folder, where, names)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARK).is_file():
            (folder / MARK).touch()
