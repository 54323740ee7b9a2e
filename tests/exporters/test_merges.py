"""What encoding makes of every text is decided by one merge for each token."""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from exporters.merges import Derivations, derivation_merges, merge_pairs

LETTERS = "abc"


@st.composite
def byte_pair_models(draw: st.DrawFn) -> dict[str, Any]:
    """Models in which tokens come about in many ways: merges of any two tokens, in any order."""
    tokens = list(LETTERS)
    for _ in range(draw(st.integers(0, 12))):
        joint = draw(st.sampled_from(tokens)) + draw(st.sampled_from(tokens))
        if joint not in tokens and len(joint) <= 8:
            tokens.append(joint)
    known = set(tokens)
    merges = [(t[:cut], t[cut:]) for t in tokens for cut in range(1, len(t)) if {t[:cut], t[cut:]} <= known]
    return {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": draw(st.permutations(merges))}


def encode(model: Mapping[str, Any], text: str) -> list[str]:
    tokenizer = Tokenizer(models.BPE(vocab=dict(model["vocab"]), merges=[tuple(pair) for pair in model["merges"]]))
    return tokenizer.encode(text).tokens


TEXTS = st.text(LETTERS, min_size=1, max_size=20)


@settings(deadline=None)
@given(byte_pair_models(), TEXTS)
def test_merges_that_are_no_derivations_change_nothing(model: dict[str, Any], text: str) -> None:
    derivations = derivation_merges(model)
    assert len(derivations) == len(Derivations.of(model).parts) <= len(model["merges"])
    assert encode({**model, "merges": derivations}, text) == encode(model, text)


@settings(deadline=None)
@given(byte_pair_models(), TEXTS)
def test_tokens_with_all_their_ancestors_are_enough_for_a_text(model: dict[str, Any], text: str) -> None:
    derivations = Derivations.of(model)
    tokens = encode(model, text)
    needed = set().union(*map(derivations.ancestors, tokens))
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= needed]
    vocabulary = {token: index for token, index in model["vocab"].items() if token in needed}
    assert encode({"vocab": vocabulary, "merges": merges}, text) == tokens


def test_of_several_ways_to_a_token_the_one_that_is_taken() -> None:
    model = {
        "vocab": dict.fromkeys(("a", "b", "c", "ab", "bc", "abc", "cb")),
        "merges": ["b c", "a b", "ab c", "a bc"],
    }
    derivations = Derivations.of(json.loads(json.dumps(model)))
    assert derivations.parts == {"ab": ("a", "b"), "bc": ("b", "c"), "abc": ("a", "bc")}
    assert derivations.ancestors("abc") == {"abc", "a", "bc", "b", "c"}
    assert derivations.ancestors("cb") == {"cb"}  # in the vocabulary, but no merge makes it


def test_all_merges_stay_where_tokens_are_more_than_their_parts() -> None:
    model = {"vocab": dict.fromkeys(("a", "b", "##b", "ab")), "merges": ["a ##b"], "continuing_subword_prefix": "##"}
    assert derivation_merges(model) == [("a", "##b")]


def test_merges_are_read_in_both_forms() -> None:
    assert merge_pairs({"merges": ["a b", ["c", "d e"]]}) == [("a", "b"), ("c", "d e")]
