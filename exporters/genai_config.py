"""Configuration and tokenizer files of a language model's artefact, for onnxruntime-genai and for transformers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from torch import nn
from transformers import AutoTokenizer

from exporters.artifact import MODEL
from exporters.genai_builder import new_builder, silent
from exporters.merges import derivation_merges
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


_PLACES = ("{0}a", "a{0}", "a{0}b", "a {0} b", " {0}", "{0} ", "{0}{0}", "{0} {0}", "a\n{0}\nb", "1{0}2", ".{0}.")
"""Where a token may stand in a text: at its ends and inside; beside letters, digits, white space and itself."""
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
"""What an added token may ask of the text around it; onnxruntime-genai 0.18 does not heed all of it."""
_UNKNOWN_FLAGS = ("lstrip", "single_word")

_END_OF_TEXT_REMEDY = (
    "set eos_token_id in config.json or generation_config.json of a copy of the model, or eos_token in its "
    "tokenizer_config.json"
)

_BYTE_PAIRS = "BPE"
"""The type of tokenizers that onnxruntime-genai reads, as tokenizer.json calls it."""


class TokenizerError(ValueError):
    """Raised if two tokenizers of one model make different tokens of a text, or onnxruntime-genai cannot use one."""


def save_causal_lm_config(folder: Path, model: nn.Module, tokenizer: Any, max_length: int) -> None:
    """Write configuration, tokenizer and ``genai_config.json`` into the folder of an artefact.

    ``model`` and ``max_length`` are those given to :func:`exporters.causal_lm.export_causal_lm`. ``genai_config.json``
    names the file of the native library, which :func:`exporters.artifact.write_artifact` puts into the folder. Raises
    TokenizerError if what was saved makes other tokens than ``tokenizer`` (:func:`check_tokenizers`), or if no token
    ends a text.
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
    try:
        with silent():
            builder.make_genai_config(config.__class__.from_pretrained(folder), {"local_files_only": True}, str(folder))
    except ValueError as error:  # says which token it lacks
        raise TokenizerError(f"{error}; {_END_OF_TEXT_REMEDY}") from None
    path = folder / GENAI_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["decoder"]["session_options"]["custom_ops_library"] = library_path().name
    content["search"]["chunk_size"] = PREFILL_TOKENS
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _check_end_of_text(content["model"])
    check_tokenizers(folder, tokenizer)


def check_tokenizers(folder: Path, tokenizer: Any, texts: Sequence[str] = SAMPLE_TEXTS) -> None:
    """Compare the tokenizer in ``folder``, read by transformers and by onnxruntime-genai, with ``tokenizer``.

    All must make the same token ids of every text, and of every added token in many places of a text, with what the
    tokenizer puts around a text (``<bos>``, say) and without it. Raises TokenizerError with the first difference, or if
    onnxruntime-genai cannot read the tokenizer.
    """
    tokenizers = _Tokenizers(folder, tokenizer)
    added = [token for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    # There may be thousands: all places of a token in one text, which is taken apart where it differs.
    in_places = ["\n".join(place.format(token.content) for place in (*_PLACES, "{0}")) for token in added]
    for add_special in (True, False):
        difference = tokenizers.first_difference(texts, add_special)
        if difference is not None:
            raise TokenizerError(difference.description)
        difference = tokenizers.first_difference(in_places, add_special)
        if difference is not None:
            token = added[difference.index]
            apart = [place.format(token.content) for place in ("{0}", *_PLACES)]
            difference = tokenizers.first_difference(apart, add_special) or difference
            raise TokenizerError(f"{difference.description}; {_describe_flags(token)}")


@dataclass(frozen=True)
class _Difference:
    """The text number ``index`` of a list, of which two tokenizers make different tokens."""

    index: int
    description: str


class _Tokenizers:
    """A tokenizer beside those that transformers and onnxruntime-genai read from a folder."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        import onnxruntime_genai

        onnxruntime_genai.disable_telemetry_events()
        self._own = tokenizer
        self._saved = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        kind = _kind(folder)
        if kind != _BYTE_PAIRS:
            # Not asked: of some kinds it reads what is not there, and ends the process now and then.
            raise TokenizerError(
                f"onnxruntime-genai cannot read the tokenizer: it is of type {kind}, not {_BYTE_PAIRS}; take a model "
                "whose tokenizer.json says model: type: BPE"
            )
        try:
            self._runtime = onnxruntime_genai.Tokenizer(str(folder))
        except Exception as error:  # plain RuntimeErrors, and others of its bindings
            reason = " ".join(str(error).split())
            raise TokenizerError(f"onnxruntime-genai cannot read the tokenizer: {reason}") from None

    def first_difference(self, texts: Sequence[str], add_special: bool) -> _Difference | None:
        """The first of ``texts`` that is not the same token ids to all three; None if all are."""
        if not texts:
            return None
        self._runtime.update_options(add_special_tokens=str(add_special).lower())
        expected = self._own(list(texts), add_special_tokens=add_special, verbose=False)["input_ids"]
        saved = self._saved(list(texts), add_special_tokens=add_special, verbose=False)["input_ids"]
        for index, text in enumerate(texts):
            found = {
                "the saved tokenizer": saved[index],
                "onnxruntime-genai's tokenizer": [int(token) for token in self._runtime.encode(text)],
            }
            for name, tokens in found.items():
                if tokens != expected[index]:
                    return _Difference(index, _describe_difference(name, text, tokens, expected[index]))
        return None


def _describe_difference(name: str, text: str, tokens: list[int], expected: list[int]) -> str:
    pairs = zip(tokens, expected, strict=False)
    place = next((i for i, (token, wanted) in enumerate(pairs) if token != wanted), min(len(tokens), len(expected)))
    return (
        f"{name} makes other tokens of {text!r} than the model's own: from token {place} on "
        f"{tokens[place : place + 8]}, expected {expected[place : place + 8]}"
    )


def _describe_flags(token: AddedToken) -> str:
    """An added token and the flags that it has, which say how it is found in a text."""
    flags = [name for name in _FLAGS if getattr(token, name)]
    described = f"tokenizer.json: added_tokens: {token.content!r} has {', '.join(f'{name}: true' for name in flags)}"
    unknown = [name for name in flags if name in _UNKNOWN_FLAGS]
    if not unknown:
        return described if flags else f"tokenizer.json: added_tokens: {token.content!r}"
    return (
        f"{described}; onnxruntime-genai does not heed {' and '.join(unknown)}: set it to false in a copy of the "
        "model, or take a model without"
    )


def _kind(folder: Path) -> str:
    """The type of the tokenizer that was saved in ``folder``, by its tokenizer.json, which only fast ones have."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "none that has a tokenizer.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["model"].get("type"))


def _check_end_of_text(described: Mapping[str, Any]) -> None:
    """Raise TokenizerError if no token of the model's vocabulary ends a text, by what genai_config.json says."""
    end = described["eos_token_id"]
    ids = end if isinstance(end, list) else [end]
    if not ids or not all(0 <= token < described["vocab_size"] for token in ids):
        raise TokenizerError(
            f"eos_token_id: {end} is no token of the model's vocabulary of {described['vocab_size']}, and nothing else "
            f"would end a text; {_END_OF_TEXT_REMEDY}"
        )


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Save ``tokenizer`` with its vocabulary file in compact form, which takes a quarter of the indented one."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    path.write_text(compact_tokenizer(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


def compact_tokenizer(content: Mapping[str, Any]) -> str:
    """Write the content of a ``tokenizer.json`` in compact form, without the merges that encoding never uses: of Gemma
    3's they are more than half, and its file shrinks by a third."""
    model = dict(content["model"])
    if model.get("merges"):
        merges = derivation_merges(model)
        is_plain = not any(" " in part for pair in merges for part in pair)
        model["merges"] = [" ".join(pair) for pair in merges] if is_plain else merges
    return json.dumps({**content, "model": model}, ensure_ascii=False, separators=(",", ":"))
