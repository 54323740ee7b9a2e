"""The order of tokens: by count, then by what the model expects, then by id."""

from pathlib import Path

import pytest
import torch
from causal_lm_samples import tiny_language_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from run_samples import language_recipe
from task_samples import open_multilingual_task, write_multilingual
from vocabulary_samples import byte_fallback_scripts

from pipeline.data.token_bytes import content_of
from pipeline.tasks import make_task
from pipeline.vocabulary import frequency
from pipeline.vocabulary.frequency import expected_frequencies, frequency_order
from pipeline.vocabulary.kept import hardly_counted


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


def test_what_no_text_counts_leads(tmp_path: Path) -> None:
    task = open_multilingual_task("gemma3", tmp_path, byte_fallback_scripts())
    order, rows = task.token_order, len(byte_fallback_scripts())
    content = content_of(byte_fallback_scripts())
    special = hardly_counted(content, rows, ())
    assert {index for token, index in content["model"]["vocab"].items() if token.startswith("<0x")} < special
    assert byte_fallback_scripts().bos_token_id in special
    assert order[: len(special)].tolist() == sorted(special)
    assert sorted(order.tolist()) == list(range(rows))
    counts = torch.bincount(task.data.train.tokens, minlength=rows)[order[len(special) :]]
    assert torch.equal(counts, counts.sort(descending=True).values)
    assert int(counts[-1]) == 0


def test_of_tokens_that_the_text_has_not_the_expected_ones_are_kept(tmp_path: Path) -> None:
    tokenizer = byte_fallback_scripts()
    write_multilingual("gemma3", tmp_path, tokenizer)
    vocabulary, rows = tokenizer.get_vocab(), len(tokenizer)
    recipe = language_recipe(tmp_path / "model", tmp_path, vocabulary={"keep": rows})
    everything = make_task(recipe).tokenizer.get_vocab().keys()
    recipe = language_recipe(tmp_path / "model", tmp_path, vocabulary={"keep": len(everything) - 1})
    for unexpected in ("🙂", "é", "—"):
        expected = torch.ones(rows, dtype=torch.float64)
        expected[[index for token, index in vocabulary.items() if unexpected in token]] = 0.0
        task = make_task(recipe, expected=lambda _, found=expected: found)
        (dropped,) = everything - task.tokenizer.get_vocab().keys()
        assert unexpected in dropped
