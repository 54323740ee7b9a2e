"""Speed and memory of language models in onnxruntime-genai: interleaved runs, medians.

``python -m pipeline.evaluation.text_speed FOLDER`` prints by how much loading a folder raises a new process's memory.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import onnx_ir as ir
import psutil
from torch import nn

from exporters.causal_lm import export_causal_lm
from exporters.genai_config import GENAI_CONFIG, save_causal_lm_config
from exporters.nbits import with_nbits
from pipeline.evaluation.genai_folder import without_code
from pipeline.evaluation.measurements import NATIVE, TokenSpeed, TokenSpeedRow
from pipeline.evaluation.turns import wait_until_idle
from pipeline.models.causal_lm import load_language_model
from pipeline.plumbing.errors import InputError, first_line
from pipeline.recipe.schema import LanguageModelSection, Recipe

INT4 = "int4, onnxruntime-genai's builder"
INT4_BLOCK = 32
"""Block size of the int4 model, at most: the builder's default."""
MEASURED_LENGTH = 1024
"""Tokens for which models make room: more than are measured, as less than a sliding window is refused."""
PROMPT_TOKENS = 128
GENERATED_TOKENS = 32
ROUNDS = 5
"""Turns that each model has."""
PROMPT = "The river rises in the hills and flows through three countries before it reaches the sea. "


def bench_causal_lm(
    artifact: Path,
    dense: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    threads: int,
    beside: Sequence[Path] = (),
    *,
    trust_libraries: bool = False,
) -> tuple[TokenSpeed, dict[str, int]]:
    """Time an artefact beside ``dense`` at int4. Returns the speed, and by backend the bytes by which loading it raises
    the resident memory.

    ``prompt``: token ids, at least one. ``beside``: folders for onnxruntime-genai to measure in the same run, under
    their paths as names. ``trust_libraries``: load the native libraries of all these folders (:func:`without_code`).
    Whatever is wrong with the int4 model, the artefact is measured: the speed says why that is left out.
    """
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        given = {NATIVE: artifact} | {str(folder): folder for folder in beside}
        loadable = {
            name: stack.enter_context(without_code(folder, trust_libraries=trust_libraries))
            for name, folder in given.items()
        }
        folders = {NATIVE: loadable.pop(NATIVE), INT4: Path(temporary), **loadable}
        try:
            export_int4(folders[INT4], dense, tokenizer)
            time_generation({INT4: folders[INT4]}, prompt, 2, threads, 0)
        except Exception as error:
            left_out[INT4] = first_line(error)
            del folders[INT4]
        seconds = time_generation(folders, prompt, GENERATED_TOKENS, threads, ROUNDS)
        memory = {}
        for name, folder in folders.items():
            try:
                memory[name] = load_rss(folder)
            except RuntimeError as error:
                if name != INT4:
                    raise
                left_out[f"memory of {INT4}"] = first_line(error)
    int4_prefill, int4_decode = seconds.get(INT4, (None, None))
    rows = tuple(
        TokenSpeedRow(
            backend=name,
            prefill_tokens_per_second=len(prompt) / prefill,
            decode_tokens_per_second=1 / decode,
            prefill_ratio_to_int4=None if int4_prefill is None else int4_prefill / prefill,
            decode_ratio_to_int4=None if int4_decode is None else int4_decode / decode,
        )
        for name, (prefill, decode) in seconds.items()
    )
    speed = TokenSpeed(
        unit="tokens/s",
        prompt_tokens=len(prompt),
        generated_tokens=GENERATED_TOKENS,
        threads=threads,
        rows=rows,
        left_out=left_out,
    )
    return speed, memory


def bench_recipe(
    artifact: Path, recipe: Recipe, threads: int, beside: Sequence[Path] = (), *, trust_libraries: bool = False
) -> tuple[TokenSpeed, dict[str, int]]:
    """Time an artefact beside the dense model that its recipe names, on a text of our own (:func:`bench_causal_lm`).

    Raises InputError if a folder of ``beside`` has no genai_config.json.
    """
    for folder in beside:
        if not os.path.isfile(folder / GENAI_CONFIG):
            raise InputError(f"--beside {folder}: it has no {GENAI_CONFIG}; give a folder that onnxruntime-genai loads")
    assert isinstance(recipe.model, LanguageModelSection)
    loaded = load_language_model(recipe.model)
    tokens = loaded.tokenizer(PROMPT)["input_ids"]
    # Ids for all of them: where one has a smaller vocabulary, another text, in which as much is computed.
    fewest = min(_vocabulary_size(folder) for folder in (artifact, *beside))
    prompt = [token % fewest for token in [*tokens, *tokens[1:] * PROMPT_TOKENS][:PROMPT_TOKENS]]
    return bench_causal_lm(
        artifact, loaded.model, loaded.tokenizer, prompt, threads, beside, trust_libraries=trust_libraries
    )


def _vocabulary_size(folder: Path) -> int:
    return int(json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]["vocab_size"])


def export_int4(folder: Path, dense: nn.Module, tokenizer: Any) -> None:
    """Export the dense model into ``folder`` as the builder does at int4: MatMulNBits (accuracy_level 4) and
    GatherBlockQuantized with blocks of 32, rounded to nearest."""
    model = with_nbits(dense, INT4_BLOCK, accuracy_level=4)
    graph = export_causal_lm(model, MEASURED_LENGTH)
    ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")
    save_causal_lm_config(folder, model, tokenizer, MEASURED_LENGTH)
    path = folder / GENAI_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["model"]["decoder"]["session_options"]["custom_ops_library"]  # it needs none, and has none
    path.write_text(json.dumps(config), encoding="utf-8")


def time_generation(
    folders: Mapping[str, Path], prompt: Sequence[int], count: int, threads: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Measure the median seconds of (the whole prompt, one generated token) by name, of at least two tokens. The models
    take turns, after one round to warm up; no ``rounds`` find out whether they run, and measure nothing."""
    import onnxruntime_genai

    models = {}
    for name, folder in folders.items():
        config = onnxruntime_genai.Config(str(folder))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        models[name] = onnxruntime_genai.Model(config)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            parameters = onnxruntime_genai.GeneratorParams(model)
            # Not shorter than a sliding window, which GroupQueryAttention refuses, nor longer than the model permits.
            limit = int(parameters.get_search_options()["max_length"])
            parameters.set_search_options(max_length=min(MEASURED_LENGTH, limit), do_sample=False)
            generator = onnxruntime_genai.Generator(model, parameters)
            wait_until_idle()
            begin = time.perf_counter()
            generator.append_tokens([list(prompt)])
            generator.generate_next_token()
            first = time.perf_counter()
            for _ in range(count - 1):
                generator.generate_next_token()
            end = time.perf_counter()
            times[name].append((first - begin, (end - first) / (count - 1)))
            del generator
    return {
        name: (median(pair[0] for pair in pairs[1:]), median(pair[1] for pair in pairs[1:]))
        for name, pairs in times.items()
        if rounds
    }


def load_rss(folder: Path) -> int:
    """Measure the bytes by which loading the model in ``folder`` raises the resident memory of a new process. Raises
    RuntimeError if that process fails."""
    command = [sys.executable, "-m", "pipeline.evaluation.text_speed", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"measuring memory of {folder} failed: {child.stderr.strip().splitlines()[-1:]}")
    return int(child.stdout)


def _measure_load(folder: str) -> int:
    import onnxruntime_genai

    process = psutil.Process()
    before = process.memory_info().rss
    model = onnxruntime_genai.Model(folder)
    after = process.memory_info().rss
    del model
    return after - before


if __name__ == "__main__":
    print(_measure_load(sys.argv[1]))
