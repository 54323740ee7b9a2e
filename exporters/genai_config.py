"""Configuration and tokenizer files of a language model's artefact, for onnxruntime-genai and for transformers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from exporters.artifact import MODEL
from exporters.genai_builder import new_builder, silent
from fips_ort.causal_lm import PREFILL_TOKENS
from fips_ort.native import library_path

GENAI_CONFIG = "genai_config.json"
SAMPLE_TEXTS = (
    "The quick brown fox doesn't jump over 1,234.56 lazy dogs.",
    "Größenwahnsinnige Zwölf-Töne-Straßenmusik, 3½ €!",
    "L'été, où es-tu ? À bientôt, garçon œuvré.",
    "¿Cuántos años? El niño comió piñas y güisqui.",
    "東京は日本の首都です。カタカナ、ひらがな。",
    "北京是中华人民共和国的首都。",
    "Москва — столица России, население 13 миллионов.",
    "مرحبا بالعالم، كيف حالك؟",
    "👩‍👩‍👧‍👦 🇩🇪 naïve ☕️ 😀😀",
    "def f(x):\n\tif x >= 10:\n        return {'a': [1, 2]}  # ok\n",
    "  two  spaces   three\n\n\nnewlines\t\ttabs ",
    " ",
)
"""Texts of what tokenizers have been seen to disagree on: scripts, accents, joined emoji, code, runs of white space."""


class TokenizerError(ValueError):
    """Raised if two tokenizers of one model make different tokens of a text."""


def save_causal_lm_config(folder: Path, model: nn.Module, tokenizer: Any, max_length: int) -> None:
    """Write configuration, tokenizer and ``genai_config.json`` into the folder of an artefact.

    ``model`` and ``max_length`` are those given to :func:`exporters.causal_lm.export_causal_lm`. ``genai_config.json``
    names the file of the native library, which :func:`exporters.artifact.write_artifact` puts into the folder. Raises
    TokenizerError if what was saved makes other tokens than ``tokenizer`` (:func:`check_tokenizers`).
    """
    config: Any = model.config
    config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    _save_tokenizer(folder, tokenizer)
    builder = new_builder(type(model).__name__, config, max_length)
    # The builder reads special tokens from the files beside it, and writes its result there.
    builder.model_name_or_path, builder.filename = str(folder), MODEL
    with silent():
        builder.make_genai_config(config.__class__.from_pretrained(folder), {"local_files_only": True}, str(folder))
    path = folder / GENAI_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["decoder"]["session_options"]["custom_ops_library"] = library_path().name
    content["search"]["chunk_size"] = PREFILL_TOKENS
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    check_tokenizers(folder, tokenizer)


def check_tokenizers(folder: Path, tokenizer: Any, texts: Sequence[str] = SAMPLE_TEXTS) -> None:
    """Compare the tokenizer in ``folder``, read by transformers and by onnxruntime-genai, with ``tokenizer``.

    All must make the same token ids of every text, ``<bos>`` included where the tokenizer adds it. Raises
    TokenizerError with the first difference.
    """
    import onnxruntime_genai

    onnxruntime_genai.disable_telemetry_events()
    saved = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    runtime = onnxruntime_genai.Tokenizer(str(folder))
    runtime.update_options(add_special_tokens="true")
    for text in texts:
        expected = list(tokenizer(text)["input_ids"])
        found = {
            "the saved tokenizer": list(saved(text)["input_ids"]),
            "onnxruntime-genai's tokenizer": [int(token) for token in runtime.encode(text)],
        }
        for name, tokens in found.items():
            if tokens != expected:
                raise TokenizerError(_describe_difference(name, text, tokens, expected))


def _describe_difference(name: str, text: str, tokens: list[int], expected: list[int]) -> str:
    pairs = zip(tokens, expected, strict=False)
    place = next((i for i, (token, wanted) in enumerate(pairs) if token != wanted), min(len(tokens), len(expected)))
    return (
        f"{name} makes other tokens of {text!r} than the model's own: from token {place} on "
        f"{tokens[place : place + 8]}, expected {expected[place : place + 8]}"
    )


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Save ``tokenizer`` with its vocabulary file in compact form, which takes a third of the indented one."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = content["model"].get("merges")
    if merges and not any(" " in part for pair in merges for part in pair):
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
