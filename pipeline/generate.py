"""Text from an artefact's language model, with onnxruntime-genai."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from exporters.genai_config import GENAI_CONFIG
from fips_ort.manifest import MANIFEST
from pipeline.evaluation.genai_folder import without_code
from pipeline.plumbing.errors import InputError

onnxruntime_genai.disable_telemetry_events()


def generate(folder: Path, prompt: str, max_new_tokens: int, *, trust_libraries: bool = False) -> Iterator[str]:
    """Continue ``prompt`` with the language model in ``folder``, piece by piece as tokens come; each token is the most
    likely one.

    Ends at the model's end-of-text token or after ``max_new_tokens``. ``<bos>`` is put in front where the model's
    tokenizer does so. The folder's own native library is loaded only with ``trust_libraries``; without, the installed
    one is (:mod:`pipeline.evaluation.genai_folder`). Raises InputError if the folder holds no language model or names
    other code, or prompt and answer are longer than the model was exported for, and ArtifactError if it is damaged.
    """
    with _opened(folder, trust_libraries=trust_libraries) as (model, limit):
        tokenizer = onnxruntime_genai.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")
    prompt_tokens = [int(token) for token in tokenizer.encode(prompt)]
    return _decode(tokenizer, _tokens(_start(model, prompt_tokens, max_new_tokens, limit)))


def greedy_tokens(folder: Path, token_ids: Sequence[int], count: int) -> list[int]:
    """The ``count`` most likely tokens after ``token_ids``, one by one; fewer if the text ends, its end included.

    Raises InputError as :func:`generate` does.
    """
    with _opened(folder) as (model, limit):
        pass
    return list(_tokens(_start(model, list(token_ids), count, limit)))


@contextmanager
def _opened(folder: Path, *, trust_libraries: bool = False) -> Iterator[tuple[Any, int]]:
    """The model, and the most tokens it can be run on. While the context lasts, its tokenizer can be loaded too."""
    if not os.path.isfile(folder / GENAI_CONFIG):
        what = "an image classifier's artefact" if os.path.isfile(folder / MANIFEST) else "no artefact"
        raise InputError(
            f"{folder}: {what}, it has no {GENAI_CONFIG}; give the folder `artifact` of a language model's run"
        )
    with without_code(folder, trust_libraries=trust_libraries) as loadable:
        try:
            model = onnxruntime_genai.Model(str(loadable))
            limit: int = onnxruntime_genai.GeneratorParams(model).get_search_options()["max_length"]
            yield model, int(limit)
        except Exception as error:  # onnxruntime-genai raises plain RuntimeErrors, and others of its bindings
            reason = str(error).replace(str(loadable), str(folder))
            raise InputError(
                f"{folder}: onnxruntime-genai cannot load it: {reason}; try `fips validate {folder}`"
            ) from None


def _start(model: Any, prompt: list[int], count: int, limit: int) -> Any:
    """A generator that has read the prompt and takes the most likely token each time."""
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
    params.set_search_options(max_length=len(prompt) + count, do_sample=False)
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
