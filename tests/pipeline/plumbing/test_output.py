"""Output never kills a command and never changes its exit status, wherever it goes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = r"""
import sys
from pipeline.plumbing.output import forgiving_output
with forgiving_output():
    for number in range(20_000):
        print("3 → 2 bits \udcff", number)
    print("said", file=sys.stderr)
    opened = open(sys.argv[1], "w")
    print("more")
    sys.exit(3)
"""


def run(tmp_path: Path, *, shell: str = "{}", **environment: str) -> subprocess.CompletedProcess[str]:
    """The program above behind a line of shell; what it opens is ``tmp_path/opened``."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = f'"{sys.executable}" "{tmp_path}/program.py" "{tmp_path}/opened"'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell.format(command)}"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, **environment},
    )


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    ended = run(tmp_path, PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (3, "said\n")
    first, *_, last = ended.stdout.splitlines()
    assert (first, last) == ("3 \\u2192 2 bits \\udcff 0", "more")


def test_text_that_can_be_written_is_written_as_it_is(tmp_path: Path) -> None:
    ended = run(tmp_path, PYTHONIOENCODING="utf-8")
    assert (ended.returncode, ended.stderr) == (3, "said\n")
    assert ended.stdout.splitlines()[0] == "3 → 2 bits \\udcff 0"


@pytest.mark.parametrize(
    ("shell", "stderr"),
    [
        ("{} | head -n 1 > /dev/null", "said\n"),
        ("{} > /dev/full", "said\nstandard output could not be written: No space left on device\n"),
        ("{} >&-", "said\n"),
        ("{} <&- >&- 2>&-", ""),
        ("{} 2>&- > /dev/null", ""),
        ("{} 2> /dev/full > /dev/null", ""),
    ],
)
def test_output_that_cannot_be_written_is_dropped(tmp_path: Path, shell: str, stderr: str) -> None:
    ended = run(tmp_path, shell=shell)
    assert (ended.returncode, ended.stderr) == (3, stderr)
    # A descriptor that was closed is not given to the next file, which would get the output.
    assert (tmp_path / "opened").read_bytes() == b""


@pytest.fixture
def nonblocking_pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    os.set_blocking(write, False)
    yield read, write
    os.close(read)


def test_a_slow_reader_gets_everything(tmp_path: Path, nonblocking_pipe: tuple[int, int]) -> None:
    read, write = nonblocking_pipe
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    child = subprocess.Popen([sys.executable, tmp_path / "program.py", tmp_path / "opened"], stdout=write)
    os.close(write)
    with open(read, "rb", closefd=False) as file:
        lines = file.read().splitlines()
    assert child.wait() == 3
    assert len(lines) == 20_001
