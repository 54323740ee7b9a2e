"""Commands as processes of their own: what is said of those that end badly."""

from pathlib import Path

import pytest

from pipeline.plumbing.engines import Command, run_command

ENDS = {
    "refuses": ("sys.exit(print('error: recipe x: key: bad\\nmend it', file=sys.stderr) or 2)", 2),
    "fails": ("sys.exit(print('failed: parity', file=sys.stderr) or 1)", 1),
    "dies": ("os.kill(os.getpid(), signal.SIGKILL)", -9),
    "is_stopped": ("os.kill(os.getpid(), signal.SIGTERM)", -15),
    "raises": ("raise RuntimeError('what')", 1),
}
MESSAGES = {
    "refuses": "error: recipe x: key: bad\nmend it",
    "fails": "failed: parity",
    "dies": "killed by SIGKILL (out of memory?)\nlast line: step 3",
    "is_stopped": "killed by SIGTERM\nlast line: step 3",
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ended_a_command_is_named(name: str, tmp_path: Path) -> None:
    end, status = ENDS[name]
    program = f"import os, signal, sys\nprint('qat\\n  step 3', file=sys.stderr, flush=True)\n{end}\n"
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    said: list[str] = []
    outcome = run_command(Command(name, ("program",), Path("log.txt"), tmp_path), 1, said.append)
    assert outcome.status == status
    assert said[0] == f"{name}: qat"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").startswith("qat\n  step 3\n")
    if name == "raises":
        assert outcome.message.endswith("RuntimeError: what")
    else:
        assert outcome.message == MESSAGES[name]
