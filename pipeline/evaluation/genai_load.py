"""What loading a folder takes in onnxruntime-genai, measured in a process of its own, which imports nothing else:
``python -m pipeline.evaluation.genai_load FOLDER``."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

LENGTH = 1024
"""Tokens for which the key-value cache has room. Less than a sliding window is refused."""
_PROMPT = range(3, 11)
"""Token ids that every vocabulary has."""


@dataclass(frozen=True, slots=True)
class GenaiLoad:
    """``base_rss_bytes``: resident memory of a process that has imported onnxruntime-genai and loaded nothing;
    ``load_rss_bytes``: by how much loading the model raises it; ``run_rss_bytes``: by how much it is raised once the
    model has generated two tokens, with a key-value cache for :data:`LENGTH` tokens at most; ``seconds``: how long
    loading takes."""

    base_rss_bytes: int
    load_rss_bytes: int
    run_rss_bytes: int
    seconds: float


def measure_load(folder: Path) -> GenaiLoad:
    """Load and run the model in ``folder`` in a new process. The seconds depend on whether the system has its files in
    the cache, as it most likely has. Raises RuntimeError with the last line of a process that fails."""
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
    parameters = onnxruntime_genai.GeneratorParams(model)
    limit = int(parameters.get_search_options()["max_length"])
    parameters.set_search_options(max_length=min(LENGTH, limit), do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens([list(_PROMPT)])
    for _ in range(2):
        generator.generate_next_token()
    used = process.memory_info().rss
    del generator, model
    return GenaiLoad(base, loaded - base, used - base, seconds)


if __name__ == "__main__":
    print(json.dumps(asdict(_load(sys.argv[1]))))
