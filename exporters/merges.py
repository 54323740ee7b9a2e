"""How byte-pair encoding makes each token out of two others.

Byte-pair encoding (Sennrich et al., arXiv 1508.07909) starts from the characters of a word and joins, again and again,
the two neighbours whose merge comes first in a list. Of the merges that give a token t, only one is ever the last step
to it: as no merge crosses the ends of t once t is there, the steps inside these ends are those that t goes through
alone, whatever stands around it. This one is called the *derivation* of t here. Two things follow:

- Encoding never uses a merge that is no derivation, so a tokenizer without these makes the same tokens of every text.
- If all derivations that the encoding of a text uses are there, taking away others changes nothing for it: at each
  step the first merge of the whole list is also the first of those that are left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Pair = tuple[str, str]


@dataclass(frozen=True)
class Derivations:
    """The derivation of each token that merges make: its two parts, by the token. Tokens of one character have none,
    nor have those that merges never arrive at."""

    parts: Mapping[str, Pair]

    @staticmethod
    def of(model: Mapping[str, Any]) -> "Derivations":
        """Derive every token of ``model``, the part of a ``tokenizer.json`` with that name, of type BPE."""
        ranks = {pair: rank for rank, pair in enumerate(merge_pairs(model))}
        derived = ((token, _last_merge(token, ranks)) for token in model["vocab"])
        return Derivations({token: parts for token, parts in derived if parts is not None})

    def ancestors(self, token: str) -> set[str]:
        """``token``, the two tokens that it is made of, and theirs, down to single characters."""
        found: set[str] = set()
        pending = [token]
        while pending:
            current = pending.pop()
            if current not in found:
                found.add(current)
                pending += self.parts.get(current, ())
        return found


def derivation_merges(model: Mapping[str, Any]) -> list[Pair]:
    """The merges of ``model`` that are derivations, in order; of a model that marks where words go on or end, or joins
    at random, all of them."""
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return merge_pairs(model)
    derivations = Derivations.of(model).parts
    return [pair for pair in merge_pairs(model) if derivations.get(pair[0] + pair[1]) == pair]


def merge_pairs(model: Mapping[str, Any]) -> list[Pair]:
    """The merges of ``model`` in order, in either of the forms that files have: pairs, or texts with a space."""
    return [(left, right) for left, right in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])]


def _last_merge(token: str, ranks: Mapping[Pair, int]) -> Pair | None:
    """The pair whose merge ends the encoding of ``token`` alone; None if the encoding ends in several tokens, or needs
    no merge."""
    symbols = list(token)
    unknown = len(ranks)
    last: Pair | None = None
    while len(symbols) > 1:
        found = [ranks.get(pair, unknown) for pair in pairwise(symbols)]
        first = min(found)
        if first == unknown:
            return None
        place = found.index(first)
        last = symbols[place], symbols[place + 1]
        symbols[place : place + 2] = [last[0] + last[1]]
    return last
