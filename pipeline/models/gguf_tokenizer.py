"""Tokenizers that transformers rebuilds from GGUF files, checked against those files.

A GGUF file holds no tokenizer, only its vocabulary; how text is cut before that, and which pieces join first,
transformers has to guess from the kind of model.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pipeline.data.text import leading_token
from pipeline.plumbing.errors import InputError

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

# Kinds of a token in `tokenizer.ggml.token_type`.
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6
_SPACE = "\u2581"
_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
# What files say whose text is cut the way GPT-2 does it; transformers does so for every name that it does not know.
_GPT2_SPLITS = ("default", "gpt-2")


def read_metadata(gguf: Path, string_arrays: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the metadata of a GGUF file by key, and the names of its tensors. Of arrays of strings, only those called in
    ``string_arrays`` are read.

    Raises InputError for a file that cannot be read.
    """
    with reading_gguf(gguf):
        return read_gguf_metadata(str(gguf), string_arrays)


@contextmanager
def reading_gguf(gguf: Path) -> Iterator[None]:
    """Turn errors of reading a GGUF file into InputError, which names it."""
    try:
        yield
    except (ValueError, LookupError, OSError, struct.error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{gguf}: not a readable GGUF file (cut short?): {reason}") from None


def check_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Raise InputError unless ``tokenizer``, rebuilt from a GGUF file, does what the file says.

    - every token has the file's id;
    - SentencePiece vocabularies: the ids of texts in many languages are those of joining the file's own pieces by
      the file's own scores, done here independently;
    - byte-level vocabularies: the merges are the file's, and the way that text is cut is one that transformers knows;
    - decoding gives the text back;
    - ``<bos>`` leads where the file says so.
    """
    metadata, _ = read_metadata(gguf, (_TOKENS, _MERGES))
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
