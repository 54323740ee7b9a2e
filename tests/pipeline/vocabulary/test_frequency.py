"""The order of tokens: by count, then by what the model expects, then by id."""

import pytest
import torch
from causal_lm_samples import tiny_language_model, tokens
from hypothesis import given
from hypothesis import strategies as st

from pipeline.vocabulary import frequency
from pipeline.vocabulary.frequency import expected_frequencies, frequency_order


@pytest.mark.parametrize("kind", ["gemma3", "gemma2", "llama"])
def test_expected_are_mean_probabilities(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is computed at a time, with a soft cap, and with windows of other lengths."""
    model = tiny_language_model(kind)
    windows = [tokens(12, 3, seed=1), tokens(9, 1, seed=2)]
    with torch.no_grad():
        wanted = [torch.softmax(model(input_ids=window).logits.double(), dim=-1).flatten(0, 1) for window in windows]
    monkeypatch.setattr(frequency, "_TOKENS_AT_ONCE", 5)
    found = expected_frequencies(model, windows)
    torch.testing.assert_close(found, torch.cat(wanted).mean(dim=0), rtol=1e-5, atol=1e-9)
    assert float(found.sum()) == pytest.approx(1, rel=1e-5)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.25, 0.5])), min_size=1))
def test_order(facts: list[tuple[int, float]]) -> None:
    counts, expected = (torch.tensor(column) for column in zip(*facts, strict=True))
    wanted = sorted(range(len(facts)), key=lambda index: (-facts[index][0], -facts[index][1], index))
    assert frequency_order(counts, expected.double()).tolist() == wanted
    first = {0, len(facts) - 1}
    led = [*sorted(first), *(index for index in wanted if index not in first)]
    assert frequency_order(counts, expected.double(), first).tolist() == led
