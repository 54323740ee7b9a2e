"""Where independent commands run: side by side on this machine, or as Ray tasks on several.

A command is a process of its own everywhere, with the same number of threads: the numbers that come out do not depend
on the engine, one that crashes takes no other with it, and its memory is its own.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.plumbing.environment import EXIT_WITH_PARENT
from pipeline.plumbing.errors import InputError

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class Command:
    """A command to run: ``arguments`` after ``python -m``. What it says on standard error goes to the file ``log``. It
    is run in the folder that this process is in, on whatever machine."""

    name: str
    arguments: tuple[str, ...]
    log: Path
    folder: Path = field(default_factory=Path.cwd)


@dataclass(frozen=True)
class Outcome:
    """How a command ended. ``status``: exit status; negative: the signal that killed it. ``message``: of a command that
    failed, its last lines from the complaint on, or what killed it."""

    name: str
    status: int
    message: str


def run_command(command: Command, threads: int, say: Callable[[str], None]) -> Outcome:
    """Run a command to its end; ``say`` gets the lines that begin a stage, with the command's name in front."""
    count = str(threads)
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        EXIT_WITH_PARENT: "1",
    }
    lines: list[str] = []
    log_path = command.folder / command.log
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", *command.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            cwd=command.folder,
        )
        with child:
            assert child.stderr is not None
            try:
                for line in child.stderr:
                    log.write(line)
                    log.flush()
                    lines.append(line.rstrip())
                    if line[:1].isalpha():
                        say(f"{command.name}: {line.rstrip()}")
            except BaseException:
                child.kill()
                raise
    return Outcome(command.name, child.returncode, "" if child.returncode == 0 else _complaint(child.returncode, lines))


def run_side_by_side(
    commands: Sequence[Command], at_once: int, threads: int, say: Callable[[str], None]
) -> Iterator[Outcome]:
    """Run ``at_once`` commands at a time on this machine; yields outcomes as they come."""
    stop = threading.Event()

    def run(command: Command) -> Outcome | None:
        return None if stop.is_set() else run_command(command, threads, say)

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run, command) for command in commands]
        try:
            for future in as_completed(futures):
                outcome = future.result()
                if outcome is not None:
                    yield outcome
        finally:
            stop.set()


def run_on_ray(commands: Sequence[Command], threads: int, say: Callable[[str], None]) -> Iterator[Outcome]:
    """Run commands on the Ray cluster at ``RAY_ADDRESS``, or one started on this machine; yields outcomes as they come.

    Every machine needs the folders of the commands at the same paths, and this package. Raises InputError without Ray.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray: the package ray is missing; pip install 'fips-onnx[ray]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=True, include_dashboard=False, configure_logging=False)
    try:
        remote = ray.remote(num_cpus=threads, max_retries=0)(run_command)
        waiting = {remote.remote(command, threads, _print_line): command for command in commands}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            command = waiting.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as error:
                yield Outcome(command.name, 1, f"Ray: {' '.join(str(error).split())}")
            say(f"{command.name}: done, {len(waiting)} to go")
    finally:
        if started_here:
            ray.shutdown()


def _print_line(line: str) -> None:
    """Print a line on a Ray worker, which passes its output on. (Ray puts a function of its own in the place of
    ``print`` while it starts, and the one that was there before cannot be pickled then.)"""
    print(line, flush=True)


def _complaint(status: int, lines: Sequence[str]) -> str:
    if status < 0:
        # Nobody else says so: the process had no time to, and its last line is about what it did before.
        killer = f"killed by {_signal_name(-status)}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
        return "\n".join([killer, *(f"last line: {line.strip()}" for line in lines[-1:])])
    begins = [index for index, line in enumerate(lines) if line.startswith(("error: ", "failed: "))]
    return "\n".join(lines[begins[-1] :] if begins else lines[-3:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
