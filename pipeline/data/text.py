"""Text for language models: documents split into train and test, then cut into windows of tokens.

What a window has to predict is said in terms that models with other vocabularies can share (:class:`TextWindows`): how
many tokens of the model's own *full* vocabulary, how many bytes.

The split is of documents, before they become tokens, and no text is on both sides. Each side's documents follow one
another, a blank line between two, and are cut into windows wherever these happen to end. Only as many documents are
tokenized as the wanted windows need.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.hub import check_splits_differ, load_split, reading_split, split_name
from pipeline.data.packages import package_file
from pipeline.data.samples import Indices, shuffled_order
from pipeline.data.text_files import read_json_file, read_text_file, records_in, text_in
from pipeline.data.token_bytes import content_of, token_bytes
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import HubTextData, LocalTextData, PackagedTextData, TextDataSection

SEPARATOR = "\n\n"
_DOCUMENTS_AT_ONCE = 128
_NAMED = 5
_PIECE = 1 << 17
"""Characters after which a long document is cut for the tokenizer, at the next line."""


COVERED = 0.9
"""Part of the training text that its frequent tokens make up; all other tokens are rare."""


@dataclass(frozen=True)
class TokenFacts:
    """What is known of every id of a vocabulary. ``bytes``: of UTF-8 that it stands for, int64 [vocabulary];
    ``frequent``: whether it is one of the most frequent tokens of the training text, those that make up
    :data:`COVERED` of it, bool [vocabulary]."""

    bytes: Tensor
    frequent: Tensor

    @staticmethod
    def of(tokenizer: Any, training_text: Tensor) -> "TokenFacts":
        """Facts of ``tokenizer``'s vocabulary; ``training_text``: its ids of the training text, int32 [n]."""
        texts = token_bytes(content_of(tokenizer))
        sizes = torch.zeros(1 + max(texts), dtype=torch.int64)
        sizes[list(texts)] = torch.tensor([len(text) for text in texts.values()])
        return TokenFacts(sizes, _frequent(torch.bincount(training_text, minlength=len(sizes))))


def _frequent(counts: Tensor) -> Tensor:
    """The tokens that come first by their ``counts``, int64 [vocabulary], until :data:`COVERED` is reached."""
    order = torch.argsort(counts, descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    frequent = torch.zeros(len(counts), dtype=torch.bool)
    frequent[order[before < COVERED * counts.sum()]] = True
    return frequent


@dataclass(frozen=True)
class Targets:
    """The tokens that a window is to predict, its last n. ``full``: which of those that the same window has in the full
    vocabulary is the same token at the same place, int64 [n], -1 where none is. ``frequent``: bool [n]."""

    full: Tensor
    frequent: Tensor


class TextWindows(Protocol):
    """Windows on one text, some overlapping, in the tokens of a model; the full vocabulary's or a part of it.

    ``context``: tokens of a window in the full vocabulary, ``step``: between the starts of two. ``text``: SHA-256 of
    the whole text in the full vocabulary's ids.
    """

    @property
    def context(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def text(self) -> str: ...
    def __len__(self) -> int: ...
    def strided(self, stride: int | None) -> "TextWindows": ...
    def batch(self, indices: Indices) -> Tensor: ...
    def sizes(self) -> Tensor: ...
    def predicted(self) -> Tensor: ...
    def counted(self) -> Tensor: ...
    def counted_bytes(self) -> int: ...
    def counted_frequent(self) -> int: ...
    def targets(self, window: int) -> Targets: ...


@dataclass(frozen=True)
class TextSplit:
    """Windows of ``context`` token ids on one stream of text.

    ``tokens``: int32 [n], the text. ``bos``: the id every window begins with, in addition to the text; None where the
    tokenizer adds none. ``step``: tokens of text between the starts of two windows; less than a window and they
    overlap. ``facts``: of the vocabulary.
    """

    tokens: Tensor
    context: int
    bos: int | None
    step: int
    facts: TokenFacts

    @property
    def text(self) -> str:
        """SHA-256 of the text's ids."""
        return hashlib.sha256(self.tokens.numpy().astype("<i4").tobytes()).hexdigest()

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

    def sizes(self) -> Tensor:
        """Count the tokens of each window, int64 [windows]."""
        return torch.full((len(self),), self.context)

    def predicted(self) -> Tensor:
        """How many tokens at the end of each window are there to be predicted, int64 [windows].

        Each token of the text counts once, where most text goes before it: all of the first window that have a
        token before them, then the last ``step`` of each.
        """
        counts = torch.full((len(self),), min(self.step, self.context - 1))
        counts[:1] = self.context - 1
        return counts

    def counted(self) -> Tensor:
        """How many tokens of the full vocabulary these are, int64 [windows]."""
        return self.predicted()

    def counted_bytes(self) -> int:
        """Count the bytes of UTF-8 that all windows together are to predict."""
        return self._sum_of_predicted(self.facts.bytes)

    def counted_frequent(self) -> int:
        """Count the frequent tokens that all windows together are to predict."""
        return self._sum_of_predicted(self.facts.frequent.long())

    def _sum_of_predicted(self, values: Tensor) -> int:
        """Sum up ``values`` of the vocabulary, int64, over the tokens that the windows are to predict."""
        ends, counts = torch.arange(len(self)) * self.step + self.width, self.predicted()
        whole = torch.cat([torch.zeros(1, dtype=torch.int64), values[self.tokens.long()].cumsum(0)])
        return int((whole[ends] - whole[ends - counts]).sum())

    def targets(self, window: int) -> Targets:
        """What ``window`` is to predict: in this, the full vocabulary, every token is the same at its place."""
        count, end = int(self.predicted()[window]), window * self.step + self.width
        return Targets(torch.arange(count), self.facts.frequent[self.tokens[end - count : end].long()])

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
    ``train_pieces``, ``test_pieces``: the text that was tokenized, piece by piece; windows may leave out its end.
    ``train_documents``, ``test_documents``: of how many documents.
    """

    train: TextSplit
    test: TextSplit
    hash: str
    train_pieces: list[str]
    test_pieces: list[str]
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
    tested = _tokenize(test, tokenizer, _wanted(test_samples, width), frozenset())
    trained = _tokenize(train, tokenizer, _wanted(train_samples, width), tested.digests)
    assert not trained.digests & tested.digests
    facts = TokenFacts.of(tokenizer, trained.tokens)
    splits = []
    for name, tokens in (("train", trained.tokens), ("test", tested.tokens)):
        whole = len(tokens) // width * width
        if whole == 0:
            raise InputError(
                f"{where}: the {name} text has {len(tokens)} tokens, less than one window of data.context: "
                f"{section.context}; give more text, or a smaller context"
            )
        splits.append(TextSplit(tokens[:whole], section.context, bos, width, facts))
    return TextData(
        train=splits[0],
        test=splits[1],
        hash=hash_text(tokenizer, splits),
        train_pieces=trained.pieces,
        test_pieces=tested.pieces,
        train_documents=len(trained.digests),
        test_documents=len(tested.digests),
    )


def hash_text(tokenizer: Any, splits: Iterable[TextSplit]) -> str:
    """SHA-256 of the token ids of ``splits``, their window lengths and the tokenizer's vocabulary."""
    digest = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for split in splits:
        digest.update(json.dumps([split.context, split.bos, len(split.tokens)]).encode())
        digest.update(split.tokens.numpy().astype("<i4").tobytes())
    return digest.hexdigest()


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


@dataclass(frozen=True)
class _Tokenized:
    """Token ids of documents one after another, int32 [n], the pieces of text that were tokenized, and the SHA-256 of
    each document's text."""

    tokens: Tensor
    pieces: list[str]
    digests: frozenset[bytes]


def tokenize(pieces: Sequence[str], tokenizer: Any) -> Tensor:
    """Token ids of pieces of text one after another, int32 [n], without special tokens."""
    if not pieces:  # which tokenizers do not take
        return torch.empty(0, dtype=torch.int32)
    ids = tokenizer(list(pieces), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.from_numpy(np.concatenate([np.asarray(piece, dtype=np.int32) for piece in ids]))


def _tokenize(
    documents: Iterable[str], tokenizer: Any, wanted: int | None, excluded: frozenset[bytes]
) -> _Tokenized:
    """Token ids of ``documents``.

    At least ``wanted`` ids if there is as much text, all of it if None. Blank documents are left out, and so are
    repeated ones and those whose SHA-256 is ``excluded``.
    """
    used: set[bytes] = set()
    parts: list[Tensor] = []
    pieces: list[str] = []
    pending: list[str] = []

    def tokenize_pending() -> None:
        parts.append(tokenize(pending, tokenizer))
        pieces.extend(pending)
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
            if wanted is not None and sum(map(len, parts)) >= wanted:
                break
        used.add(digest)
        for piece in _pieces(text):
            pending.append(piece)
    tokenize_pending()
    tokens = torch.cat(parts)
    return _Tokenized(tokens if wanted is None else tokens[:wanted], pieces, frozenset(used))


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
