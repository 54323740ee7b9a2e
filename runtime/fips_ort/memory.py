"""Resident memory of an artefact's session, measured in a process of its own: ``python -m fips_ort.memory FOLDER``."""

import json
import subprocess
import sys
from pathlib import Path

from fips_ort.causal_lm import complete_inputs
from fips_ort.golden import read_array
from fips_ort.load import load
from fips_ort.manifest import read_manifest


def measure_memory(folder: Path, *, native: bool = True) -> dict[str, int]:
    """Load and run the artefact once in a new process.

    Returns ``load_rss_bytes``, by which loading the session raised the resident set (memory-mapped weights count once
    they are read), and ``peak_rss_bytes``, the process's largest resident set, Python included. Linux only. Raises
    RuntimeError with the child's last line if it fails.
    """
    command = [sys.executable, "-m", "fips_ort.memory", str(folder), "native" if native else "portable"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"measuring memory of {folder} failed: {child.stderr.strip().splitlines()[-1:]}")
    result: dict[str, int] = json.loads(child.stdout)
    return result


def _measure(folder: Path, native: bool) -> dict[str, int]:
    manifest = read_manifest(folder)
    manifest.check_files(folder, hashes=False)  # what it takes, Python keeps for the check in `load`
    before = process_memory("VmRSS")
    session = load(folder, native=native, verify=False)
    loaded = process_memory("VmRSS")
    inputs = {name: read_array(folder, file)[:1] for name, file in manifest.golden.inputs.items()}
    session.run(None, complete_inputs(session, inputs))
    return {"load_rss_bytes": loaded - before, "peak_rss_bytes": process_memory("VmHWM")}


def process_memory(field: str) -> int:
    """Read bytes of this process from /proc/self/status: ``VmRSS``, its resident set, or ``VmHWM``, the largest so
    far."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), sys.argv[2] == "native")))
