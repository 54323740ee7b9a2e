"""A recipe's language model: loaded from the hub, a local folder or a GGUF file, with a tokenizer that was checked.

A GGUF file holds no tokenizer, only its vocabulary, from which transformers rebuilds one; how text is cut before
that, and which pieces join first, it has to guess from the kind of model. :func:`check_tokenizer` compares what it
made with the file.
"""

import importlib.util
import json
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from optimum.exporters.tasks import TasksManager
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.utils import cached_file

from pipeline.errors import InputError
from pipeline.models.adapters import check_finite, check_model_type
from pipeline.models.loading import hash_model
from pipeline.models.packaged_gguf import locate_gguf
from pipeline.recipe import CausalLanguageModel, LanguageModel, PackagedGGUFModel

TOKENIZER_SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf größere Straßen führen über die Brücke.",
    "L'été dernier, nous étions à la plage près d'Arcachon.",
    "El niño comió piñas y bebió agua en el jardín.",
    "Сегодня в Москве идёт дождь, завтра будет солнечно.",
    "今日は図書館で日本語を勉強しました。",
    "中国的首都是北京，人口超过两千万。",
    "오늘은 날씨가 좋아서 공원에 갔습니다.",
    "ذهبت إلى السوق لشراء الخبز والحليب.",
    "भारत की राजधानी नई दिल्ली है।",
    "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.",
    "x = [i**2 for i in range(10)]\n\nprint(sum(x), 3.14159, 2024)",
    "Two  spaces, a tab\tand a rare sign: 𒀀 🙂.",
)
"""Text in many scripts, with numbers, code, white space and characters that few vocabularies have."""

_CHECKPOINT_ERRORS = (
    StrictDataclassError, TypeError, ValueError, LookupError, OSError, RuntimeError, SafetensorError, struct.error,
)  # fmt: skip
# scaled_dot_product_attention has no soft cap of the scores, which these models need.
_ATTENTION = {"gemma2": "eager"}
# Kinds of a token in `tokenizer.ggml.token_type`.
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6
_SPACE = "\u2581"
_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
# What files say whose text is cut the way GPT-2 does it; transformers does so for every name that it does not know.
_GPT2_SPLITS = ("default", "gpt-2")


@dataclass(frozen=True)
class LoadedLanguageModel:
    """A dense causal language model in evaluation mode, float32, without gradients.

    ``model(input_ids=int64 [B, T]).logits`` is float32 [B, T, vocabulary]. ``source_hash``: SHA-256 of configuration
    and weights, wherever they came from.
    """

    model: nn.Module
    tokenizer: Any
    source_hash: str


def load_tokenizer(section: LanguageModel) -> Any:
    """The tokenizer of a recipe's language model. Raises InputError when it is not found, or is rebuilt from a GGUF
    file and does not do what the file says (:func:`check_tokenizer`)."""
    source = _Source.of(section)
    tokenizer = source.load(AutoTokenizer.from_pretrained)
    for key in ("is_local", "local_files_only"):  # how it was found; would be saved with it
        tokenizer.init_kwargs.pop(key, None)
    if source.gguf_file is not None:
        check_tokenizer(tokenizer, source.gguf_path())
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            check_saved_tokenizer(tokenizer, Path(folder))
    return tokenizer


def load_language_config(section: LanguageModel) -> Any:
    """The configuration of a recipe's language model, its weights unread. Raises InputError when it is not found or
    its MLPs are not known."""
    source = _Source.of(section)
    if source.gguf_file is not None:
        _check_rotary_embeddings(source.gguf_path())
    config = source.load(AutoConfig.from_pretrained)
    check_model_type(config.model_type, "text-generation")
    _forget_source(config)
    return config


def load_language_model(section: LanguageModel, tokenizer: Any = None) -> LoadedLanguageModel:
    """The dense language model of a recipe and its tokenizer, which is loaded too unless it is given.

    Attention is scaled_dot_product_attention where the model can have it. Raises InputError when the model cannot be
    found or built, lacks weights, or has weights that are not finite.
    """
    source = _Source.of(section)
    config = load_language_config(section)
    model, loading = source.load(
        language_model_class().from_pretrained,
        config=config,
        dtype=torch.float32,
        attn_implementation=_ATTENTION.get(config.model_type, "sdpa"),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that we can name them
    )
    missing = sorted({*loading["missing_keys"], *(str(entry[0]) for entry in loading["mismatched_keys"])})
    if missing:
        raise InputError(
            f"{source.where}: the checkpoint lacks weights of {type(model).__name__}, or has them in another shape: "
            f"{', '.join(missing)}; is it a whole causal language model?"
        )
    if source.gguf_file is not None:
        _forget_quantization(model)
    _forget_source(model.config)
    model.config.architectures = [type(model).__name__]  # as it is written when the model is saved
    model.eval().requires_grad_(False)
    check_finite(model)
    if tokenizer is None:
        tokenizer = load_tokenizer(section)
    return LoadedLanguageModel(model, tokenizer, hash_model(model))


def language_model_class() -> Any:
    """The class of causal language models, as optimum resolves the task."""
    return TasksManager.get_model_class_for_task("text-generation")


def leading_token(tokenizer: Any) -> int | None:
    """The ``<bos>`` that ``tokenizer`` puts before a text; None when it puts none."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None


# --- source ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where a model is, in transformers' terms; ``where`` names it in errors."""

    path: str
    revision: str | None
    gguf_file: str | None
    where: str

    @classmethod
    def of(cls, section: LanguageModel) -> "_Source":
        gguf_file = section.file if isinstance(section, PackagedGGUFModel) else section.gguf_file
        if gguf_file is not None:
            absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
            if absent:
                raise InputError(f"model: GGUF files need {' and '.join(absent)}: pip install 'fips-onnx[gguf]'")
        if isinstance(section, CausalLanguageModel):
            where = f"model.path: {section.path}" + (f", {gguf_file}" if gguf_file else "")
            return cls(section.path, section.revision, gguf_file, where)
        path = locate_gguf(section.package, section.file)
        return cls(str(path.parent), None, path.name, f"model.package: {section.package}, {section.file}")

    def load(self, load: Callable[..., Any], **options: Any) -> Any:
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        try:
            return load(self.path, revision=self.revision or "main", **options)
        except _CHECKPOINT_ERRORS as error:
            raise self._not_loaded(error) from None

    def gguf_path(self) -> Path:
        try:
            return Path(cached_file(self.path, self.gguf_file, revision=self.revision or "main"))
        except _CHECKPOINT_ERRORS as error:
            raise self._not_loaded(error) from None

    def _not_loaded(self, error: Exception) -> InputError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return InputError(f"{self.where}: cannot load it from a local folder or the Hugging Face hub: {reason}")


def _forget_source(config: Any) -> None:
    """Take out of a configuration where its model was found, which is no part of the model."""
    config.name_or_path = ""
    if hasattr(config, "_model_name_or_path"):  # of a GGUF file: its title
        del config._model_name_or_path


def _forget_quantization(model: Any) -> None:
    """Make a model whose weights came from GGUF, in float32 by now, one that transformers can save."""
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None


def _check_rotary_embeddings(gguf: Path) -> None:
    """Raise InputError for scaled rotary embeddings, which transformers leaves out without a word."""
    metadata, tensors = _read_metadata(gguf, ())
    scaled = [key for key, value in metadata.items() if ".rope.scaling." in key and value != "none"]
    scaled += [name for name in tensors if name.startswith("rope_freqs")]
    if scaled:
        raise InputError(
            f"{gguf.name}: its rotary embeddings are scaled ({', '.join(scaled)}), which transformers does not read "
            "from GGUF; take the model's checkpoint in safetensors, without gguf_file"
        )


def _read_metadata(gguf: Path, string_arrays: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        return read_gguf_metadata(str(gguf), string_arrays)
    except (ValueError, LookupError, OSError, struct.error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{gguf}: not a readable GGUF file (cut short?): {reason}") from None


# --- tokenizer -------------------------------------------------------------------------------------------------


def check_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Raise InputError unless ``tokenizer``, rebuilt from a GGUF file, does what the file says.

    - every token has the file's id;
    - SentencePiece vocabularies: the ids of texts in many languages are those of joining the file's own pieces by
      the file's own scores, done here independently;
    - byte-level vocabularies: the merges are the file's, and the way that text is cut is one that transformers knows;
    - decoding gives the text back;
    - ``<bos>`` leads where the file says so.
    """
    metadata, _ = _read_metadata(gguf, (_TOKENS, _MERGES))
    tokens: list[str] = metadata[_TOKENS]
    kind = metadata["tokenizer.ggml.model"]
    problems = []
    vocabulary = tokenizer.get_vocab()
    if kind == "gpt2":
        problems += _byte_level_problems(tokenizer, metadata)
    else:
        respelled = {token.replace(" ", _SPACE): index for index, token in enumerate(tokens)}
        differing = [token for token, index in respelled.items() if vocabulary.get(token) != index]
        if differing:
            problems.append(f"{len(differing)} tokens have other ids, {differing[0]!r} for one")
        if kind == "llama":
            problems += _sentencepiece_problems(tokenizer, metadata, respelled)
    for text in TOKENIZER_SAMPLES:
        decoded = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        if decoded != text:
            problems.append(f"{text!r} comes back as {decoded!r}")
    # SentencePiece files from before the flag mean yes; llama.cpp reads them so.
    leads = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    bos = metadata.get("tokenizer.ggml.bos_token_id") if leads else None
    if leading_token(tokenizer) != bos:
        problems.append(f"the leading token is {leading_token(tokenizer)}, not {bos}")
    if problems:
        shown = "; ".join(problems[:3]) + (f"; {len(problems) - 3} more" if len(problems) > 3 else "")
        raise InputError(
            f"{gguf.name}: the tokenizer that transformers rebuilds from this file is not the file's: {shown}; take "
            "the model's checkpoint in safetensors, which has its tokenizer beside it"
        )


def check_saved_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raise InputError unless the tokenizer that was saved in ``folder`` gives the same ids as ``tokenizer``."""
    saved = AutoTokenizer.from_pretrained(folder)
    for text in TOKENIZER_SAMPLES:
        ids, saved_ids = tokenizer(text)["input_ids"], saved(text)["input_ids"]
        if ids != saved_ids:
            raise InputError(f"{folder}: the tokenizer changes when it is saved: {text!r} is {ids}, then {saved_ids}")


def _byte_level_problems(tokenizer: Any, metadata: Mapping[str, Any]) -> list[str]:
    problems = []
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    if merges != metadata.get(_MERGES):
        problems.append("it joins other pieces, or in another order")
    tokens = metadata[_TOKENS]
    differing = [token for token, index in model["vocab"].items() if tokens[index] != token]
    if differing:
        problems.append(f"{len(differing)} tokens have other ids, {differing[0]!r} for one")
    split = metadata.get("tokenizer.ggml.pre", "default")
    if split not in GGUF_PRE_TOKENIZER_SPLITS and split not in _GPT2_SPLITS:
        problems.append(f"transformers does not know how it cuts text into words (tokenizer.ggml.pre: {split})")
    return problems


def _sentencepiece_problems(tokenizer: Any, metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[str]:
    pieces = SentencePieces(
        vocabulary,
        metadata["tokenizer.ggml.scores"],
        metadata["tokenizer.ggml.token_type"],
        prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
    )
    problems = []
    for text in TOKENIZER_SAMPLES:
        ids, expected = tokenizer(text, add_special_tokens=False)["input_ids"], pieces.encode(text)
        if ids != expected:
            problems.append(f"{text!r} is cut into {len(ids)} tokens instead of {len(expected)}, or others")
    return problems


class SentencePieces:
    """Byte-pair encoding as SentencePiece does it: the two neighbours whose joint piece scores highest join first.

    ``vocabulary``: ids by piece, spaces as ``▁``. ``scores`` and ``types`` by id, as GGUF files have them. ``prefix``:
    a space goes before the text. Meant for checks: it takes quadratic time.
    """

    def __init__(
        self, vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int], *, prefix: bool
    ) -> None:
        self._ids = {piece: index for piece, index in vocabulary.items() if types[index] == _NORMAL}
        # Pieces that were given, not learned, are cut out whole before anything joins, the longest first.
        given = [piece for piece, index in vocabulary.items() if types[index] == _USER_DEFINED]
        self._given = {piece: vocabulary[piece] for piece in sorted(given, key=len, reverse=True)}
        self._bytes = {piece: index for piece, index in vocabulary.items() if types[index] == _BYTE}
        self._scores = scores
        self._prefix = prefix

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens."""
        rest = (_SPACE if self._prefix else "") + text.replace(" ", _SPACE)
        ids: list[int] = []
        plain = ""
        while rest:
            piece = next((piece for piece in self._given if rest.startswith(piece)), None)
            if piece is None:
                plain, rest = plain + rest[0], rest[1:]
                continue
            ids += [*self._join(plain), self._given[piece]]
            plain, rest = "", rest[len(piece) :]
        return ids + self._join(plain)

    def _join(self, text: str) -> list[int]:
        pieces = list(text)
        while True:
            joint = [self._ids.get(left + right) for left, right in pairwise(pieces)]
            scored = [(self._scores[index], -place) for place, index in enumerate(joint) if index is not None]
            if not scored:
                break
            place = -max(scored)[1]
            pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
        return [index for piece in pieces for index in self._lookup(piece)]

    def _lookup(self, piece: str) -> list[int]:
        if piece in self._ids:
            return [self._ids[piece]]
        return [self._bytes[f"<0x{byte:02X}>"] for byte in piece.encode("utf-8")]
