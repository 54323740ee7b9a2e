"""Progress bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int, str], None]
OnProgress = Callable[[int, int, str], None]
"""Called with the steps done so far, the steps in all, and a remark."""


class Progress:
    """Says what a run is doing, on standard error: bars on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Print one line."""
        self.console.print(message, markup=False)

    @contextmanager
    def counter(self, label: str, total: int) -> Iterator[OnProgress]:
        """Begin a task of ``total`` steps for code that counts them itself: call the result with (done, total,
        remark)."""
        with self.task(label, total) as advance:
            done = 0

            def report(now: int, _total: int, remark: str) -> None:
                nonlocal done
                advance(now - done, remark)
                done = now

            yield report

    @contextmanager
    def task(self, label: str, total: int, *, start: int = 0) -> Iterator[Advance]:
        """Begin a task of ``total`` steps of which ``start`` are done; call the result with (steps done, remark)."""
        if self.console.is_terminal:
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[remark]}"),
            )
            with RichProgress(*columns, console=self.console, transient=True) as bars:
                task = bars.add_task(label, total=total, completed=start, remark="")

                def move(steps: int, remark: str = "") -> None:
                    bars.update(task, advance=steps, remark=remark)

                yield move
            return
        done, spoken_at = start, time.monotonic()

        def advance(steps: int, remark: str = "") -> None:
            nonlocal done, spoken_at
            done += steps
            if time.monotonic() - spoken_at > _SECONDS_BETWEEN_LINES:
                spoken_at = time.monotonic()
                print(f"  {label}: {done}/{total} {remark}".rstrip(), file=sys.stderr, flush=True)

        yield advance
