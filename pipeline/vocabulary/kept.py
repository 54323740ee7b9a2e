"""Which tokens of a vocabulary stay.

Always: byte tokens and the unknown token, by which every text stays text; special tokens and all others that were added
to a tokenizer, but for placeholders (``<unused7>``). Beside them, tokens by the scripts of their letters, or those most
frequent in a text, or both.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import regex

from exporters.merges import Derivations
from pipeline.data.token_bytes import byte_tokens, is_byte_level, token_bytes
from pipeline.plumbing.errors import InputError

_PLACEHOLDER = re.compile(r"[<\[|]*(unused|reserved|reserved_token|reserved_special_token)[_-]?\d+[|>\]]*")
"""Names of tokens that models have in reserve, as Gemma's ``<unused7>`` and Llama 3's ``<|reserved_special_token_7|>``.
"""
_OF_ALL_SCRIPTS = ("Common", "Inherited")
"""Unicode's names for what no script has of its own: digits, signs, spaces and emoji; accents that combine."""
_LAST_CHARACTER = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)


def always_kept(content: Mapping[str, Any], rows: int, named: Collection[int]) -> set[int]:
    """Ids that stay whatever a recipe says.

    ``content``: of a ``tokenizer.json``. ``rows``: of the model's table; tokens with ids from there on go. ``named``:
    ids that configurations name, as the end of a text, which stay even if they are called like placeholders.
    """
    vocabulary: Mapping[str, int] = content["model"]["vocab"]
    needed = [*byte_tokens(content), content["model"].get("unk_token")]
    kept = {vocabulary[token] for token in needed if token in vocabulary}
    kept |= {token["id"] for token in content["added_tokens"] if not _PLACEHOLDER.fullmatch(token["content"])}
    return {index for index in kept.union(named) if index < rows}


def hardly_counted(content: Mapping[str, Any], rows: int, named: Collection[int]) -> set[int]:
    """Ids on which texts hang though none has them, or few: special and added tokens but for placeholders, and the
    bytes that a vocabulary falls back to (at byte level, bytes are tokens like others). Arguments: of
    :func:`always_kept`."""
    found = always_kept(content, rows, named)
    if is_byte_level(content):
        vocabulary: Mapping[str, int] = content["model"]["vocab"]
        found -= {vocabulary[token] for token in byte_tokens(content) if token in vocabulary}
    return found


def written_in(content: Mapping[str, Any], scripts: Sequence[str]) -> set[int]:
    """Ids of the tokens that hold characters of these scripts alone (Unicode's names), and of none.

    A part of a character, as byte-level vocabularies have them, counts as one of all characters that it is a part of.
    Any part of a token that is in here is in here too, if it is a token, so text in these scripts is cut as before.
    """
    pattern = regex.compile("[" + "".join(rf"\p{{Script={name}}}" for name in (*scripts, *_OF_ALL_SCRIPTS)) + "]*")
    texts = token_bytes(content)
    whole, parted = {}, {}
    for index, text in texts.items():
        try:
            whole[index] = text.decode()
        except UnicodeDecodeError:
            parted[index] = _cut_characters(text)
    kept = {index for index, text in whole.items() if pattern.fullmatch(text)}
    if parted:
        parts = _parts_of_characters(pattern)
        for index, (before, middle, after) in parted.items():
            if before in parts and after in parts and middle is not None and pattern.fullmatch(middle):
                kept.add(index)
    return kept


def most_frequent(
    content: Mapping[str, Any], order: Iterable[int], always: Collection[int], candidates: Collection[int], keep: int
) -> set[int]:
    """Ids of at most ``keep`` tokens: ``always`` and those of ``candidates`` that come first in ``order``, that of all
    ids from the most frequent one on (:func:`pipeline.vocabulary.frequency.frequency_order`).

    A token comes with its ancestors (:class:`Derivations`); if all of them do not fit any more, it is passed over.
    Raises InputError if ``always`` is more than ``keep``.
    """
    if keep < len(always):
        raise InputError(
            f"vocabulary.keep: {keep}: {len(always)} tokens stay in any case: single bytes, special and added tokens; "
            f"give at least {len(always)}"
        )
    vocabulary: Mapping[str, int] = content["model"]["vocab"]
    tokens = {index: token for token, index in vocabulary.items()}
    derivations = Derivations.of(content["model"])
    allowed, kept = set(candidates), set(always)
    for index in order:
        if len(kept) == keep:
            break
        if index in kept or index not in allowed or index not in tokens:
            continue
        wanted = {vocabulary[part] for part in derivations.ancestors(tokens[index])} - kept
        if wanted <= allowed and len(kept) + len(wanted) <= keep:
            kept |= wanted
    return kept


def _cut_characters(text: bytes) -> tuple[bytes, str | None, bytes]:
    """(end of a character, whole characters, beginning of one) of a token of bytes; None for what is not UTF-8."""
    start, end = 0, len(text)
    while start < end and _is_continuation(text[start]):
        start += 1
    lead = end - 1
    while lead >= start and _is_continuation(text[lead]):
        lead -= 1
    if lead >= start and end - lead < _length_of_character(text[lead]):
        end = lead
    try:
        return text[:start], text[start:end].decode(), text[end:]
    except UnicodeDecodeError:
        return text[:start], None, text[end:]


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _length_of_character(lead: int) -> int:
    """Bytes of the character that begins with the byte ``lead``."""
    return 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)


def _parts_of_characters(pattern: Any) -> set[bytes]:
    """Every run of bytes inside the UTF-8 of a character that ``pattern`` matches, the empty one too."""
    characters = "".join(chr(code) for code in range(_LAST_CHARACTER + 1) if code not in _SURROGATES)
    return {part for run in pattern.findall(characters) for character in run for part in _runs(character.encode())}


def _runs(encoded: bytes) -> Iterator[bytes]:
    for start in range(len(encoded)):
        for end in range(start, len(encoded) + 1):
            yield encoded[start:end]
