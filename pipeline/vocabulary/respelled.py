"""Text in the tokens of a cut vocabulary, beside the same text in the full one's.

Both spell the same bytes, so places in the text are numbers of bytes, and a token of the one is the same as a token of
the other where both begin at one place and stand for the same. All other tokens are *respelled*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pipeline.data.samples import Indices
from pipeline.data.text import Targets, TextData, TextSplit, TokenFacts, hash_text, tokenize
from pipeline.data.token_bytes import BYTE_CHARACTERS, BYTE_PIECES, SPACE, content_of, is_byte_level, token_bytes
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import digest
from pipeline.vocabulary.cut import CutVocabulary
from pipeline.vocabulary.practice import tokenize_to_practise

_ABSENT = -1


@dataclass(frozen=True)
class Stream:
    """Tokens one after another: ids int64 [n], and the byte at which each begins, int64 [n + 1], with the end."""

    ids: Tensor
    starts: Tensor

    @staticmethod
    def of(ids: Tensor, facts: TokenFacts) -> "Stream":
        sizes = facts.bytes[ids.long()]
        return Stream(ids.long(), torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]))

    def same_as(self, full: "Stream", new_ids: Tensor) -> Tensor:
        """Which token of ``full`` is the same at the same place, int64 [n]; -1 where none is. ``new_ids``: of
        :attr:`CutVocabulary.new_ids`."""
        if not len(full.ids):
            return torch.full((len(self.ids),), _ABSENT)
        place = torch.searchsorted(full.starts[:-1], self.starts[:-1]).clamp(max=len(full.ids) - 1)
        same = (full.starts[place] == self.starts[:-1]) & (new_ids[full.ids[place]] == self.ids)
        return torch.where(same, place, _ABSENT)


class Speller:
    """Spells pieces of text that are no whole words, also parts of characters, in the tokens of a cut vocabulary."""

    def __init__(self, vocabulary: CutVocabulary) -> None:
        content = content_of(vocabulary.tokenizer)
        self._model = vocabulary.tokenizer.backend_tokenizer.model
        self._ids: dict[str, int] = content["model"]["vocab"]
        self._by_byte = is_byte_level(content)
        self._texts = token_bytes(content)

    def text(self, index: int) -> bytes:
        """The bytes that a token stands for."""
        return self._texts[index]

    def spell(self, text: bytes) -> list[int]:
        """Ids of ``text``, as it stands in what the tokenizer's ``normalizer`` makes of a text."""
        if self._by_byte:
            written = "".join(BYTE_CHARACTERS[byte] for byte in text)
        else:
            try:
                written = text.decode().replace(" ", SPACE)
            except UnicodeDecodeError:
                return [self._ids[BYTE_PIECES[byte]] for byte in text]
        return [token.id for token in self._model.tokenize(written)]


@dataclass(frozen=True)
class RespelledWindows:
    """The windows of ``full`` in the tokens of a cut vocabulary: each holds the same text, and has to predict the same
    part of it. A window's context is as much text as ``full.context`` tokens of the full vocabulary are.

    ``whole``: the text in the full vocabulary. ``stream``: in the cut one, whose tokens end where a window or what it
    predicts begins or ends. ``same``: of :meth:`Stream.same_as`. ``bounds``: int64 [windows, 3], the first token of
    each window, the first that it predicts, and that after its last. ``bos``: what each begins with, beside the text.
    ``natural``: the text as the cut tokenizer cuts it.
    """

    full: TextSplit
    whole: Stream
    stream: Stream
    same: Tensor
    bounds: Tensor
    bos: int | None
    natural: Stream
    vocabulary: CutVocabulary

    @property
    def context(self) -> int:
        return self.full.context

    @property
    def step(self) -> int:
        return self.full.step

    @property
    def text(self) -> str:
        return self.full.text

    def __len__(self) -> int:
        return len(self.full)

    def strided(self, stride: int | None) -> "RespelledWindows":
        """Return this text in the windows of :meth:`TextSplit.strided`."""
        return respell_windows(self.full.strided(stride), self.natural, self.vocabulary)

    def batch(self, indices: Indices) -> Tensor:
        """Windows, int64 [B, tokens of the longest]; shorter ones are filled up behind their end, with token 0."""
        chosen = np.asarray(indices, dtype=np.int64)
        bos = [] if self.bos is None else [self.bos]
        rows = [
            torch.cat([torch.tensor(bos, dtype=torch.int64), self.stream.ids[first:end]])
            for first, _, end in self.bounds[chosen].tolist()
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def sizes(self) -> Tensor:
        """Count the tokens of each window, int64 [windows]."""
        return self.bounds[:, 2] - self.bounds[:, 0] + (self.bos is not None)

    def predicted(self) -> Tensor:
        """How many tokens at the end of each window are there to be predicted, int64 [windows]."""
        return self.bounds[:, 2] - self.bounds[:, 1]

    def counted(self) -> Tensor:
        """How many tokens of the full vocabulary these are, int64 [windows]."""
        return self.full.predicted()

    def counted_bytes(self) -> int:
        """Count the bytes of UTF-8 that all windows together are to predict."""
        return self.full.counted_bytes()

    def counted_frequent(self) -> int:
        """Count the frequent tokens of the full vocabulary that all windows together are to predict."""
        return self.full.counted_frequent()

    def targets(self, window: int) -> Targets:
        """What ``window`` is to predict. A respelled token is as frequent as that of the full vocabulary in which it
        begins."""
        _, first, end = self.bounds[window].tolist()
        place = torch.searchsorted(self.whole.starts, self.stream.starts[first:end], right=True) - 1
        last = window * self.full.step + self.full.width
        same = self.same[first:end] - (last - int(self.full.predicted()[window]))
        frequent = self.full.facts.frequent[self.whole.ids[place]]
        return Targets(torch.where(self.same[first:end] == _ABSENT, _ABSENT, same), frequent)


def respell_windows(full: TextSplit, natural: Stream, vocabulary: CutVocabulary) -> RespelledWindows:
    """The windows of ``full`` in a cut vocabulary. ``natural``: the text as its tokenizer cuts it, and more of it at
    the end, perhaps. A token across the end of a window, or of what it predicts, is spelled in two parts."""
    whole = Stream.of(full.tokens, full.facts)
    first = torch.arange(len(full)) * full.step
    ends = first + full.width
    cuts = whole.starts[torch.stack([first, ends - full.predicted(), ends], dim=1)]
    stream = _cut_at(natural, torch.unique(cuts).tolist(), Speller(vocabulary))
    new_ids = vocabulary.new_ids
    bounds = torch.searchsorted(stream.starts, cuts)
    assert torch.equal(stream.starts[bounds], cuts), "tokens of both vocabularies spell the same bytes"
    bos = None if full.bos is None else int(new_ids[full.bos])
    return RespelledWindows(full, whole, stream, stream.same_as(whole, new_ids), bounds, bos, natural, vocabulary)


def _cut_at(stream: Stream, places: Sequence[int], speller: Speller) -> Stream:
    """``stream`` with its tokens across ``places``, which ascend, spelled in parts; it ends at the last of them."""
    ids, starts = stream.ids.tolist(), stream.starts.tolist()
    inside: dict[int, list[int]] = {}
    for place in places:
        token = int(np.searchsorted(starts, place, side="right")) - 1
        if starts[token] != place:
            inside.setdefault(token, []).append(place)
    found_ids: list[int] = []
    found_sizes: list[int] = []
    done = 0
    for token, cuts in inside.items():
        found_ids += ids[done:token]
        found_sizes += np.diff(starts[done : token + 1]).tolist()
        text, begin = speller.text(ids[token]), starts[token]
        borders = [0, *(cut - begin for cut in cuts), len(text)]
        for low, high in pairwise(borders):
            spelled = speller.spell(text[low:high])
            found_ids += spelled
            found_sizes += [len(speller.text(index)) for index in spelled]
        done = token + 1
    found_ids += ids[done:]
    found_sizes += np.diff(starts[done:]).tolist()
    whole = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(found_sizes, dtype=torch.int64).cumsum(0)])
    end = int(torch.searchsorted(whole, places[-1]))
    return Stream(torch.tensor(found_ids[:end], dtype=torch.int64), whole[: end + 1])


# --- training text ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What a teacher that knows the full vocabulary can say of windows in a cut one.

    ``input_ids``: int64 [B, T], the same text in the full vocabulary, filled up behind its end with token 0. Positions
    count through all windows. ``student_at`` and ``teacher_at``, int64 [n]: where both are about to predict the same
    token at the same place. ``alone_at``, int64 [m]: where the student is about to predict a respelled one, of the id
    ``alone_targets``, int64 [m].
    """

    input_ids: Tensor
    student_at: Tensor
    teacher_at: Tensor
    alone_at: Tensor
    alone_targets: Tensor


@dataclass(frozen=True)
class RespelledText:
    """A recipe's text in a cut vocabulary.

    ``train``: windows of ``context`` tokens of the cut vocabulary, in which rare words may be spelled to practise.
    ``test``: the windows of the full vocabulary.
    ``kept``: how many tokens are left of ``rows``. ``respelled``: the part of the training text's tokens, of the full
    vocabulary, that are spelled otherwise; ``respelled_in_test``: of the test text's.
    ``hash``: SHA-256 of both vocabularies' ids.
    """

    train: TextSplit
    test: RespelledWindows
    hash: str
    respelled: float
    respelled_in_test: float
    kept: int
    rows: int
    _full: Stream
    _bos: int | None
    _student: Stream
    _same: Tensor

    @property
    def note(self) -> str:
        """What a user should know of the vocabulary that is left."""
        train, test = 100 * self.respelled, 100 * self.respelled_in_test
        return (
            f"Of the vocabulary's {self.rows:,} tokens {self.kept:,} are kept; {train:.2f} % of the training text's "
            f"tokens and {test:.2f} % of the test text's are spelled in others. Text unlike these, in another script "
            "or code, takes more tokens, in an order that the model hardly knows."
        )

    def lesson(self, indices: Indices) -> Lesson:
        """What the teacher can say of the training windows ``indices``."""
        lead = int(self._bos is not None)
        rows, student_at, teacher_at, alone_at = [], [], [], []
        targets = []
        for row, window in enumerate(np.asarray(indices, dtype=np.int64).tolist()):
            first = window * self.train.step
            end = first + self.train.width
            low, high = torch.searchsorted(self._full.starts, self._student.starts[[first, end]]).tolist()
            if self._full.starts[high] != self._student.starts[end]:
                high -= 1  # the last token ends behind the window
            high = max(low, high)
            same = self._same[first:end]
            # Where there is no <bos>, nothing comes before a window's first token.
            own = torch.arange(end - first) + lead - 1
            taught = (same >= low) & (same < high) & (own >= 0) & (same - low + lead - 1 >= 0)
            alone = ~taught & (own >= 0)
            rows.append(torch.cat([torch.tensor([self._bos] * lead, dtype=torch.int64), self._full.ids[low:high]]))
            student_at.append(row * self.train.context + own[taught])
            teacher_at.append((row, same[taught] - low + lead - 1))
            alone_at.append(row * self.train.context + own[alone])
            targets.append(self._student.ids[first:end][alone])
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Lesson(
            input_ids,
            torch.cat(student_at),
            torch.cat([row * input_ids.shape[1] + at for row, at in teacher_at]),
            torch.cat(alone_at),
            torch.cat(targets),
        )


def respell(data: TextData, vocabulary: CutVocabulary, *, practise: bool) -> RespelledText:
    """A recipe's text in the tokens of a cut vocabulary. ``practise``: spell rare tokens of the training text in others
    (:mod:`pipeline.vocabulary.practice`). Raises InputError where nothing of the test text is left as it was."""
    tokenizer, new_ids = vocabulary.tokenizer, vocabulary.new_ids
    full = Stream.of(data.train.tokens, data.train.facts)
    ids = tokenize(data.train_pieces, tokenizer)
    facts = TokenFacts.of(tokenizer, ids)
    natural = Stream.of(ids, facts)
    student = natural
    if practise:
        counts = torch.bincount(data.train.tokens, minlength=vocabulary.ids)
        student = Stream.of(tokenize_to_practise(data.train_pieces, vocabulary, counts), facts)
    width = data.train.width
    end = int(torch.searchsorted(student.starts, full.starts[-1], right=True)) - 1  # inside the full one's text
    end = end // width * width
    student = Stream(student.ids[:end], student.starts[: end + 1])
    bos = None if data.train.bos is None else int(new_ids[data.train.bos])
    train = TextSplit(student.ids.int(), data.train.context, bos, width, facts)
    test = respell_windows(data.test, Stream.of(tokenize(data.test_pieces, tokenizer), facts), vocabulary)
    if (test.same == _ABSENT).all():
        raise InputError(
            "vocabulary: no token of the test text is left; give the scripts that the text is written in, or a larger "
            "keep"
        )
    return RespelledText(
        train=train,
        test=test,
        hash=digest([data.hash, hash_text(tokenizer, [train])]),
        respelled=_respelled(natural.same_as(full, new_ids), full),
        respelled_in_test=_respelled(test.same, test.whole),
        kept=len(vocabulary.kept),
        rows=vocabulary.rows,
        _full=full,
        _bos=data.train.bos,
        _student=student,
        _same=student.same_as(full, new_ids),
    )


def _respelled(same: Tensor, full: Stream) -> float:
    """The part of the tokens of ``full`` of which none is the same in another stream."""
    return 1.0 - int((same != _ABSENT).sum()) / len(full.ids)
