"""Speed and memory of language models in onnxruntime-genai: interleaved runs, medians."""

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median, median_high
from typing import Any

import onnx_ir as ir
from torch import nn

from exporters.causal_lm import export_causal_lm
from exporters.genai_config import GENAI_CONFIG, save_causal_lm_config
from exporters.nbits import with_nbits
from pipeline.evaluation.genai_folder import without_code
from pipeline.evaluation.genai_load import GenaiLoad, measure_load
from pipeline.evaluation.measurements import NATIVE, TokenSpeed, TokenSpeedRow
from pipeline.evaluation.read_speed import read_bandwidth
from pipeline.evaluation.turns import wait_until_idle
from pipeline.evaluation.weights_read import weight_bytes_per_token
from pipeline.models.causal_lm import load_language_model
from pipeline.plumbing.errors import InputError, first_line
from pipeline.recipe.schema import LanguageModelSection, Recipe

INT4 = "int4, onnxruntime-genai's builder"
INT4_BLOCK = 32
"""Block size of this int4 model, at most: the builder's default. Ratios are to it."""
INT4_BLOCKS = {INT4: INT4_BLOCK, "int4, blocks of 128": 128}
"""Names of the int4 models that an artefact is measured beside, and their block sizes."""
MEASURED_LENGTH = 1024
"""Tokens for which models make room: more than are measured, as less than a sliding window is refused."""
PROMPT_TOKENS = 128
GENERATED_TOKENS = 32
ROUNDS = 5
"""Turns that each model has."""
LOADS = 3
"""Processes in which each model is loaded."""
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
) -> tuple[TokenSpeed, dict[str, GenaiLoad]]:
    """Time an artefact beside ``dense`` at int4 (:data:`INT4_BLOCKS`). Returns the speed, and by backend what loading
    it takes: the median of the seconds, and of the bytes.

    ``prompt``: token ids, at least one. ``beside``: folders for onnxruntime-genai to measure in the same run, under
    their paths as names. ``trust_libraries``: load the native libraries of all these folders (:func:`without_code`).
    Whatever is wrong with an int4 model, the artefact is measured: the speed says why that is left out.
    """
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        given = {NATIVE: artifact} | {str(folder): folder for folder in beside}
        loadable = {
            name: stack.enter_context(without_code(folder, trust_libraries=trust_libraries))
            for name, folder in given.items()
        }
        folders = {NATIVE: loadable.pop(NATIVE)}
        for name, block_size in INT4_BLOCKS.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            try:
                export_int4(folder, dense, tokenizer, block_size)
                time_generation({name: folder}, prompt, 2, threads, 0)
                folders[name] = folder
            except Exception as error:
                left_out[name] = first_line(error)
        folders |= loadable
        weight_bytes = {name: weight_bytes_per_token(folder) for name, folder in folders.items()}
        seconds = time_generation(folders, prompt, GENERATED_TOKENS, threads, ROUNDS)
        bandwidth = read_bandwidth(threads, weight_bytes[NATIVE])
        loads = {}
        for name, folder in folders.items():
            try:
                loads[name] = _median_load(folder)
            except RuntimeError as error:
                if name not in INT4_BLOCKS:
                    raise
                left_out[f"memory of {name}"] = first_line(error)
    int4_prefill, int4_decode = seconds.get(INT4, (None, None))
    rows = tuple(
        TokenSpeedRow(
            backend=name,
            prefill_tokens_per_second=len(prompt) / prefill,
            decode_tokens_per_second=1 / decode,
            prefill_ratio_to_int4=None if int4_prefill is None else int4_prefill / prefill,
            decode_ratio_to_int4=None if int4_decode is None else int4_decode / decode,
            load_seconds=loads[name].seconds if name in loads else None,
            weight_bytes=weight_bytes[name],
            read_fraction=weight_bytes[name] / bandwidth / decode,
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
        read_bytes_per_second=bandwidth,
    )
    return speed, loads


def _median_load(folder: Path) -> GenaiLoad:
    """The medians of :data:`LOADS` loads, each in a process of its own."""
    loads = [measure_load(folder) for _ in range(LOADS)]
    return GenaiLoad(
        base_rss_bytes=median_high(load.base_rss_bytes for load in loads),
        load_rss_bytes=median_high(load.load_rss_bytes for load in loads),
        run_rss_bytes=median_high(load.run_rss_bytes for load in loads),
        seconds=median(load.seconds for load in loads),
    )


def bench_recipe(
    artifact: Path, recipe: Recipe, threads: int, beside: Sequence[Path] = (), *, trust_libraries: bool = False
) -> tuple[TokenSpeed, dict[str, GenaiLoad]]:
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


def export_int4(folder: Path, dense: nn.Module, tokenizer: Any, block_size: int = INT4_BLOCK) -> None:
    """Export the dense model into ``folder`` as the builder does at int4: MatMulNBits (accuracy_level 4) and
    GatherBlockQuantized with blocks of ``block_size`` at most, rounded to nearest."""
    model = with_nbits(dense, block_size, accuracy_level=4)
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
