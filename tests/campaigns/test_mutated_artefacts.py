"""The campaign itself, for a minute: tries of every way, and none fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

from packed_samples import sample, write_sample
from places import ROOT

CAMPAIGN = ROOT / "tests" / "campaigns" / "mutated_artefacts.py"


def test_forty_mutated_artefacts(tmp_path: Path) -> None:
    write_sample(tmp_path / "samples" / "vit", sample("vit", "1:4"))
    command = [sys.executable, str(CAMPAIGN), "--count", "40", "--jobs", "1", "--samples", str(tmp_path / "samples")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert child.returncode == 0, child.stdout + child.stderr
    assert "40 tries in" in child.stdout
    assert "0 failed" in child.stdout
    assert {"verified", "unverified", "signed", "validated"} <= set(re.findall(r"^\| (\w+) \|", child.stdout, re.M))
