"""Text from an artefact's language model, with onnxruntime-genai."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from exporters.genai_config import GENAI_CONFIG
from fips_ort.manifest import MANIFEST
from pipeline.plumbing.errors import InputError

onnxruntime_genai.disable_telemetry_events()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn: the most likely one, unless ``temperature`` is above 0; then from the smallest
    set of tokens whose probabilities add up to ``top_p``."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(folder: Path, prompt: str, max_new_tokens: int, sampling: Sampling | None = None) -> Iterator[str]:
    """Continue ``prompt`` with the language model in ``folder``, piece by piece as tokens come.

    Ends at the model's end-of-text token or after ``max_new_tokens``. ``<bos>`` is put in front where the model's
    tokenizer does so. Raises InputError if the folder holds no language model, sampling options make no sense, or
    prompt and answer are longer than the model was exported for.
    """
    model, limit = _load(folder)
    tokenizer = onnxruntime_genai.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")
    prompt_tokens = [int(token) for token in tokenizer.encode(prompt)]
    generator = _start(model, prompt_tokens, max_new_tokens, limit, _search_options(sampling or Sampling()))
    return _decode(tokenizer, _tokens(generator))


def greedy_tokens(folder: Path, token_ids: Sequence[int], count: int) -> list[int]:
    """The ``count`` most likely tokens after ``token_ids``, one by one; fewer if the text ends, its end included.

    Raises InputError as :func:`generate` does.
    """
    model, limit = _load(folder)
    return list(_tokens(_start(model, list(token_ids), count, limit, _search_options(Sampling()))))


def _load(folder: Path) -> tuple[Any, int]:
    """The model, and the most tokens it can be run on."""
    if not (folder / GENAI_CONFIG).is_file():
        what = "an image classifier's artefact" if (folder / MANIFEST).is_file() else "no artefact"
        raise InputError(
            f"{folder}: {what}, it has no {GENAI_CONFIG}; give the folder `artifact` of a language model's run"
        )
    try:
        model = onnxruntime_genai.Model(str(folder))
    except Exception as error:  # onnxruntime-genai raises plain RuntimeErrors, and others of its bindings
        raise InputError(f"{folder}: onnxruntime-genai cannot load it: {error}; try `fips validate {folder}`") from None
    limit: int = onnxruntime_genai.GeneratorParams(model).get_search_options()["max_length"]
    return model, int(limit)


def _search_options(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature < 0:
        raise InputError(f"temperature: {sampling.temperature} is below 0; 0 takes the most likely token")
    if not 0 < sampling.top_p <= 1:
        raise InputError(f"top_p: {sampling.top_p} is not a probability above 0")
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "random_seed": sampling.seed,
    }


def _start(model: Any, prompt: list[int], count: int, limit: int, options: dict[str, Any]) -> Any:
    """A generator that has read the prompt."""
    if not prompt:
        raise InputError("prompt: it has no tokens; give at least one word")
    if count < 1:
        raise InputError(f"max_new_tokens: {count} is below 1; ask for at least one token")
    if len(prompt) + count > limit:
        raise InputError(
            f"max_new_tokens: prompt ({len(prompt)} tokens) and answer ({count}) are longer than the {limit} tokens "
            "that the model was exported for; ask for less"
        )
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, **options)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    return generator


def _tokens(generator: Any) -> Iterator[int]:
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


def _decode(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    stream = tokenizer.create_stream()
    for token in tokens:
        if token not in tokenizer.eos_token_ids:
            yield stream.decode(token)
