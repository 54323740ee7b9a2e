"""What the fixture ``finished_run`` gives: tests that only read a whole run share one."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FinishedRun:
    """A run of the tiny recipe by the command; not to be changed (copy it)."""

    recipe: Path
    folder: Path
    stdout: str
    stderr: str
