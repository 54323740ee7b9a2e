"""The bytes of text that each token of a tokenizer stands for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.plumbing.errors import InputError

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_FIRST_STAND_IN = 256


def _byte_characters() -> tuple[str, ...]:
    """The character that byte-level vocabularies write for each byte: printable ones as they are in Latin-1, the others
    as characters from number 256 on (Radford et al., GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(byte if byte in printable else _FIRST_STAND_IN + others.index(byte)) for byte in range(256))


BYTE_CHARACTERS = _byte_characters()
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""The token that vocabularies with a fallback to bytes have for each byte."""


def content_of(tokenizer: Any) -> dict[str, Any]:
    """The content of the ``tokenizer.json`` of transformers' ``tokenizer``. Raises InputError if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"the model's tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json; save it as a fast "
            "tokenizer in a copy of the model"
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def is_byte_level(content: Mapping[str, Any]) -> bool:
    """Whether the tokens of a ``tokenizer.json`` are written as bytes, a character for each."""
    return any("ByteLevel" in set(_types(content.get(part))) for part in ("pre_tokenizer", "decoder"))


def byte_tokens(content: Mapping[str, Any]) -> Sequence[str]:
    """The tokens by which a ``tokenizer.json`` can spell single bytes, by byte; it may lack some of them."""
    return BYTE_CHARACTERS if is_byte_level(content) else BYTE_PIECES


def token_bytes(content: Mapping[str, Any]) -> dict[int, bytes]:
    """The text of every token of a ``tokenizer.json`` by its id, in UTF-8; parts of a character may stand alone.

    Of the tokens of a text these add up to what the tokenizer's ``normalizer`` makes of the text, with spaces as they
    are.
    """
    byte_of = {token: byte for byte, token in enumerate(byte_tokens(content))}
    by_byte = is_byte_level(content)
    found = {}
    for token, index in _vocabulary(content).items():
        if by_byte and all(character in byte_of for character in token):
            found[index] = bytes(byte_of[character] for character in token)
        elif not by_byte and token in byte_of:
            found[index] = bytes([byte_of[token]])
        else:
            found[index] = token.replace(SPACE, " ").encode()
    return found | {token["id"]: token["content"].encode() for token in content["added_tokens"]}


def _vocabulary(content: Mapping[str, Any]) -> Mapping[str, int]:
    """Ids by token; tokenizers of type Unigram list tokens with their scores."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):
        return {token: index for index, (token, _) in enumerate(vocabulary)}
    found: Mapping[str, int] = vocabulary
    return found


def _types(part: Any) -> Iterator[str]:
    """The types of a part of a ``tokenizer.json``, and of those that it is a sequence of."""
    if isinstance(part, Mapping):
        yield str(part.get("type"))
        for inner in (*part.get("pretokenizers", ()), *part.get("decoders", ())):
            yield from _types(inner)
