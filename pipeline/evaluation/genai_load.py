"""What loading a folder takes in onnxruntime-genai, measured in a process of its own, which imports nothing else:
``python -m pipeline.evaluation.genai_load FOLDER``."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class GenaiLoad:
    """``base_rss_bytes``: resident memory of a process that has imported onnxruntime-genai and loaded nothing;
    ``load_rss_bytes``: by how much loading the model raises it; ``seconds``: how long that takes."""

    base_rss_bytes: int
    load_rss_bytes: int
    seconds: float


def measure_load(folder: Path) -> GenaiLoad:
    """Load the model in ``folder`` in a new process. Files are most likely in the system's cache, which the seconds
    depend on. Raises RuntimeError with the last line of a process that fails."""
    command = [sys.executable, "-m", "pipeline.evaluation.genai_load", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"measuring memory of {folder} failed: {child.stderr.strip().splitlines()[-1:]}")
    return GenaiLoad(**json.loads(child.stdout))


def _load(folder: str) -> GenaiLoad:
    import onnxruntime_genai

    process = psutil.Process()
    base = process.memory_info().rss
    begin = time.perf_counter()
    model = onnxruntime_genai.Model(folder)
    seconds = time.perf_counter() - begin
    loaded = process.memory_info().rss
    del model
    return GenaiLoad(base, loaded - base, seconds)


if __name__ == "__main__":
    print(json.dumps(asdict(_load(sys.argv[1]))))
