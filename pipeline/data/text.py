"""Text for language models: documents split into train and test, then cut into windows of tokens.

The split is of documents, before they become tokens, and no text is on both sides. Each side's documents follow one
another, a blank line between two, and are cut into windows wherever these happen to end. Only as many documents are
tokenized as the wanted windows need.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.hub import check_splits_differ, load_split, reading_split, split_name
from pipeline.data.packages import package_file
from pipeline.data.samples import Indices, shuffled_order
from pipeline.data.text_files import read_json_file, read_text_file, records_in, text_in
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import HubTextData, LocalTextData, PackagedTextData, TextDataSection

SEPARATOR = "\n\n"
_DOCUMENTS_AT_ONCE = 128
_NAMED = 5
_PIECE = 1 << 17
"""Characters after which a long document is cut for the tokenizer, at the next line."""


@dataclass(frozen=True)
class TextSplit:
    """Windows of ``context`` token ids on one stream of text.

    ``tokens``: int32 [n], the text. ``bos``: the id every window begins with, in addition to the text; None where the
    tokenizer adds none. ``step``: tokens of text between the starts of two windows; less than a window and they
    overlap.
    """

    tokens: Tensor
    context: int
    bos: int | None
    step: int

    @property
    def width(self) -> int:
        """How many tokens of text a window holds."""
        return self.context - (self.bos is not None)

    def __len__(self) -> int:
        return max(0, 1 + (len(self.tokens) - self.width) // self.step)

    def batch(self, indices: Indices) -> Tensor:
        """Windows, int64 [B, context]. Raises IndexError for one that is not there."""
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise IndexError(f"windows {int(chosen.min())} to {int(chosen.max())} of {len(self)}")
        windows = self.tokens[chosen[:, None] * self.step + torch.arange(self.width)].long()
        if self.bos is None:
            return windows
        return torch.cat([windows.new_full((len(chosen), 1), self.bos), windows], dim=1)

    def predicted(self) -> Tensor:
        """How many tokens at the end of each window are there to be predicted, int64 [windows].

        Each token of the text counts once, where most text goes before it: all of the first window that have a
        token before them, then the last ``step`` of each.
        """
        counts = torch.full((len(self),), min(self.step, self.context - 1))
        counts[:1] = self.context - 1
        return counts

    def strided(self, stride: int | None) -> "TextSplit":
        """Return this text in windows that start every ``stride`` tokens, or side by side if it is None. Raises
        InputError for a stride that leaves out text."""
        if stride is not None and not 1 <= stride <= self.width:
            raise InputError(
                f"evaluation.stride: got {stride}; windows of data.context: {self.context} hold {self.width} tokens of "
                "text, so it should be at least 1 and at most that"
            )
        return replace(self, step=stride or self.width)


@dataclass(frozen=True)
class TextData:
    """The text of a recipe, as windows of tokens.

    ``hash``: SHA-256 of the token ids of both splits, the window length and the tokenizer's vocabulary.
    ``train_documents``, ``test_documents``: how many documents were tokenized.
    """

    train: TextSplit
    test: TextSplit
    hash: str
    train_documents: int
    test_documents: int


def load_text_data(
    section: TextDataSection,
    tokenizer: Any,
    seed: int,
    train_samples: int | None = None,
    test_samples: int | None = None,
) -> TextData:
    """The train (calibration) and test splits of a recipe's text, which have no document in common.

    Packaged and local documents are in an order drawn from ``seed``; those of the hub, which are streamed, and given
    test files in their own. ``train_samples`` and ``test_samples`` keep only that many windows. Raises InputError for
    text that is not found or not readable, a missing field, a split with less text than one window.
    """
    train: Iterable[str]
    test: Iterable[str]
    if isinstance(section, PackagedTextData):
        where = f"data: {section.package}/{section.file}"
        train, test = _split(_packaged_documents(section), section.test_fraction, seed, where)
    elif isinstance(section, LocalTextData):
        train, test = _local_documents(section, seed)
        where = f"data: {section.train}"
    else:
        check_splits_differ(section)
        train, test = _hub_documents(section, section.train), _hub_documents(section, section.test)
        where = f"data: {section.path}"
    bos = leading_token(tokenizer)
    width = section.context - (bos is not None)
    # Test first: what the train documents must not repeat is known then.
    test_tokens, test_digests = _tokenize(test, tokenizer, _wanted(test_samples, width), frozenset())
    train_tokens, train_digests = _tokenize(train, tokenizer, _wanted(train_samples, width), test_digests)
    assert not train_digests & test_digests
    splits = []
    for name, tokens in (("train", train_tokens), ("test", test_tokens)):
        whole = len(tokens) // width * width
        if whole == 0:
            raise InputError(
                f"{where}: the {name} text has {len(tokens)} tokens, less than one window of data.context: "
                f"{section.context}; give more text, or a smaller context"
            )
        splits.append(TextSplit(tokens[:whole], section.context, bos, width))
    digest = hashlib.sha256(json.dumps([section.context, bos]).encode())
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for split in splits:
        digest.update(len(split.tokens).to_bytes(8, "little") + split.tokens.numpy().astype("<i4").tobytes())
    return TextData(splits[0], splits[1], digest.hexdigest(), len(train_digests), len(test_digests))


# --- packaged and local ----------------------------------------------------------------------------------------


def _packaged_documents(section: PackagedTextData) -> list[str]:
    path = package_file(section.package, section.file, "data")
    return records_in(read_json_file(path), section.field, path)


def _local_documents(section: LocalTextData, seed: int) -> tuple[Iterable[str], Iterable[str]]:
    """Documents of (train, test). The lines of a plain text count as documents only where it has to be split."""
    paths = [Path(file) for file in (section.train, section.test) if file is not None]
    if len(paths) == 2 and all(path.exists() for path in paths) and paths[0].samefile(paths[1]):
        raise InputError(f"data: train and test are the same file, {paths[0]}; leave out test to have it split")
    files = [read_text_file(path, section.field) for path in paths]
    if all(file.is_plain for file in files) and section.field != LocalTextData.model_fields["field"].default:
        raise InputError(f"data.field: {section.field}: {paths[0]} is plain text, which has no fields; leave it out")
    if len(files) == 2:
        return _shuffled(files[0].documents, seed), files[1].documents
    documents = files[0].documents[0].splitlines() if files[0].is_plain else files[0].documents
    return _split(documents, section.test_fraction, seed, f"data: {paths[0]}")


def _split(documents: Iterable[str], test_fraction: float, seed: int, where: str) -> tuple[list[str], list[str]]:
    """Distinct documents of (train, test), both in an order drawn from ``seed``."""
    distinct = list(dict.fromkeys(document.strip() for document in documents))
    ordered = _shuffled([document for document in distinct if document], seed)
    if len(ordered) < 2:
        raise InputError(f"{where}: {len(ordered)} documents cannot be split into train and test; give test")
    tested = min(max(1, round(test_fraction * len(ordered))), len(ordered) - 1)
    return ordered[tested:], ordered[:tested]


def _shuffled(documents: list[str], seed: int) -> list[str]:
    return [documents[index] for index in shuffled_order(len(documents), seed)]


# --- hub -------------------------------------------------------------------------------------------------------


def _hub_documents(section: HubTextData, split: str) -> Iterator[str]:
    """The first documents of a split, streamed."""
    with reading_split(section, split):
        rows = load_split(section, split, streaming=True)
        for number, row in enumerate(islice(rows, section.documents)):
            yield text_in(row, section.field, f"{split_name(section, split)}: row {number}")


# --- tokens ----------------------------------------------------------------------------------------------------


def _wanted(windows: int | None, width: int) -> int | None:
    return None if windows is None else windows * width


def _tokenize(
    documents: Iterable[str], tokenizer: Any, wanted: int | None, excluded: frozenset[bytes]
) -> tuple[Tensor, frozenset[bytes]]:
    """Token ids of ``documents`` one after another, int32 [n], and the SHA-256 of each one's text.

    At least ``wanted`` ids if there is as much text, all of it if None. Blank documents are left out, and so are
    repeated ones and those whose SHA-256 is ``excluded``.
    """
    used: set[bytes] = set()
    parts: list[NDArray[np.int32]] = []
    count = 0
    pending: list[str] = []

    def tokenize_pending() -> None:
        nonlocal count
        if not pending:  # which tokenizers do not take
            return
        for ids in tokenizer(pending, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.asarray(ids, dtype=np.int32))
            count += len(ids)
        pending.clear()

    for document in documents:
        text = document.strip()
        digest = hashlib.sha256(text.encode()).digest()
        if not text or digest in used or digest in excluded:
            continue
        if used:
            # Belongs to the document before it: tokenizers may join a full stop and what ends its line.
            pending[-1] += SEPARATOR
        if len(pending) >= _DOCUMENTS_AT_ONCE:
            last = pending.pop()
            tokenize_pending()
            pending.append(last)
            if wanted is not None and count >= wanted:
                break
        used.add(digest)
        for piece in _pieces(text):
            pending.append(piece)
    tokenize_pending()
    tokens = torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int32)
    return tokens if wanted is None else tokens[:wanted], frozenset(used)


def _pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of bounded length that end with a line, each before a line that does not start blank: no
    tokenizer we know joins across such a place."""
    start = 0
    while len(text) - start > _PIECE:
        end = re.compile(r"\n(?=\S)").search(text, start + _PIECE)
        if end is None:
            break
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


# --- vocabulary ------------------------------------------------------------------------------------------------


def tokens_beyond(tokenizer: Any, rows: int) -> dict[str, int]:
    """The tokens, by rising id, for which a model whose table of tokens has ``rows`` rows has none."""
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    return dict(sorted(beyond.items(), key=lambda entry: entry[1]))


def check_vocabulary(data: TextData, tokenizer: Any, rows: int) -> None:
    """Raise InputError where the text has tokens that a model whose table of tokens has ``rows`` rows does not know."""
    for name, split in (("train", data.train), ("test", data.test)):
        ids = torch.unique(split.tokens)
        held = ids[ids >= rows].tolist()
        if split.bos is not None and split.bos >= rows:
            held.append(split.bos)
        if held:
            tokens = dict(zip(tokenizer.convert_ids_to_tokens(held), held, strict=True))
            raise InputError(
                f"data: the {name} text holds {describe_tokens(tokens)}, and the model's table of tokens has {rows} "
                f"rows (vocab_size), for ids up to {rows - 1}; take them out of the text, or take the tokenizer "
                "that belongs to the model, or a model whose table was resized (resize_token_embeddings) for them"
            )


def describe_tokens(tokens: dict[str, int]) -> str:
    """The first of ``tokens`` with their ids, and how many they are if there are more."""
    named = ", ".join(f"{token!r} (id {index})" for token, index in list(tokens.items())[:_NAMED])
    return f"{named}, … ({len(tokens)} tokens)" if len(tokens) > _NAMED else named


def leading_token(tokenizer: Any) -> int | None:
    """The ``<bos>`` that ``tokenizer`` puts before a text; None when it puts none."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None
