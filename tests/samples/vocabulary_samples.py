"""Tokenizers with scripts to choose from: one at byte level, one of SentencePiece's kind with a fallback to bytes."""

import functools
import json
from typing import Any

from language_samples import SPECIAL
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.data.token_bytes import BYTE_CHARACTERS, BYTE_PIECES, SPACE

WORDS = ("the", "there", "other", "für", "Straße", "мир", "мира", "世界", "12", "日本", "—", "é", "ẽ", "🙂")
"""Words that are tokens of their own, with all their beginnings."""
PLACEHOLDERS = ("<unused0>", "<unused1>")


def _joined(characters: list[str], vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Add a word, and all its beginnings, to a vocabulary."""
    for end in range(1, len(characters)):
        pair = "".join(characters[:end]), characters[end]
        if pair not in merges:
            merges.append(pair)
            vocabulary.setdefault("".join(pair), len(vocabulary))


@functools.cache
def byte_level_scripts() -> Any:
    """A tokenizer at byte level that has whole words, and parts of characters, of many scripts. Not to be changed."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *PLACEHOLDERS, *BYTE_CHARACTERS))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for text in (word, f" {word}"):
            _joined([BYTE_CHARACTERS[byte] for byte in text.encode()], vocabulary, merges)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_specials(tokenizer)


@functools.cache
def byte_fallback_scripts() -> Any:
    """A tokenizer like Gemma's of the same words, which spells all others by bytes. Not to be changed."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *PLACEHOLDERS, *BYTE_PIECES))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for text in (word, SPACE + word):
            for character in text:
                vocabulary.setdefault(character, len(vocabulary))
            _joined(list(text), vocabulary, merges)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_specials(tokenizer)


def _with_specials(tokenizer: Any) -> Any:
    bos = SPECIAL.index("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*SPECIAL, *PLACEHOLDERS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def content(tokenizer: Any) -> dict[str, Any]:
    """The content of the ``tokenizer.json`` of a tokenizer."""
    read: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return read


TOKENIZERS = {"byte_level": byte_level_scripts, "byte_fallback": byte_fallback_scripts}
