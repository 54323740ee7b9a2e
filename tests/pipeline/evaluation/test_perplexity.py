"""Perplexity and divergence, against values computed by hand and by PyTorch's own functions."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from language_samples import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import pipeline.evaluation.perplexity
from pipeline.data.text import TextSplit, TokenFacts
from pipeline.evaluation.perplexity import (
    HIDDEN_STATES,
    DenseReference,
    Perplexity,
    evaluate_dense,
    evaluate_perplexity,
    lazy_logits,
    load_perplexity,
    paired_difference,
    save_perplexity,
)
from pipeline.models.adapters import supported_model_types
from pipeline.plumbing.errors import InputError

VOCABULARY = 30


def text(windows: int, context: int = 9, bos: int | None = 2, seed: int = 0, vocabulary: int = VOCABULARY) -> TextSplit:
    width = context - (bos is not None)
    tokens = torch.randint(vocabulary, (windows * width,), generator=torch.Generator().manual_seed(seed))
    return TextSplit(tokens.int(), context, bos, width, facts(vocabulary))


def facts(vocabulary: int) -> TokenFacts:
    """Token i stands for i % 3 + 1 bytes, and every other one is frequent."""
    return TokenFacts(torch.arange(vocabulary) % 3 + 1, torch.arange(vocabulary) % 2 == 0)


def bigrams(seed: int, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """A model whose logits depend on the last token alone."""
    table = scale * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda input_ids: table[input_ids]


def tiny(model_type: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    values = {"vocab_size": VOCABULARY, "initializer_range": 0.5, **changes}
    config = tiny_config(CONFIG_MAPPING[model_type], **values)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


# --- perplexity ------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """Four symbols, the next one predicted with 1/2, 1/4, 1/8 or 1/8."""
    split = TextSplit(torch.tensor([0, 1, 2, 3, 0, 0]), context=4, bos=0, step=3, facts=facts(4))
    logits = torch.log(torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8])) + 7.0  # not normalised
    quality = evaluate_perplexity(lambda input_ids: logits.expand(*input_ids.shape, 4), split, batch_size=1)
    bits = [1, 2, 3, 3, 1, 1]
    assert quality.window_nll.tolist() == pytest.approx([math.log(2) * 6, math.log(2) * 5])
    assert quality.window_tokens.tolist() == [3, 3]
    assert quality.nll == pytest.approx(math.log(2) * sum(bits) / 6)
    assert quality.perplexity == pytest.approx(2 ** (sum(bits) / 6))
    # Window means 2 and 5/3 bits: their standard deviation √(1/18), over √2.
    assert quality.standard_error == pytest.approx(math.log(2) / 6)
    assert quality.perplexity_error == pytest.approx(quality.perplexity * math.log(2) / 6)
    assert (quality.tokens, quality.context, quality.stride, quality.divergence) == (6, 4, 3, None)
    # Tokens 0 and 3 stand for one byte, 1 for two, 2 for three; 0 and 2 are frequent.
    assert quality.bytes == 1 + 2 + 3 + 1 + 1 + 1
    assert quality.bits_per_byte == pytest.approx(sum(bits) / 9)
    assert quality.frequent_tokens == 4
    assert quality.by_frequency == pytest.approx((2 ** ((1 + 3 + 1 + 1) / 4), 2 ** ((2 + 3) / 2)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bos", [2, None])
def test_against_cross_entropy(seed: int, bos: int | None) -> None:
    split, model = text(7, bos=bos, seed=seed), bigrams(seed)
    quality = evaluate_perplexity(model, split, batch_size=3)
    input_ids = split.batch(range(7))
    losses = F.cross_entropy(model(input_ids)[:, :-1].transpose(1, 2).double(), input_ids[:, 1:], reduction="none")
    torch.testing.assert_close(quality.window_nll, losses.sum(dim=1), rtol=1e-6, atol=0)
    assert quality.nll == pytest.approx(float(losses.mean()), rel=1e-6)
    means = losses.mean(dim=1)
    assert quality.standard_error == pytest.approx(float(means.std() / math.sqrt(7)), rel=1e-5)
    assert quality.tokens == 7 * 8


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    quality = evaluate_perplexity(lambda ids: torch.zeros(*ids.shape, VOCABULARY), text(5), batch_size=2)
    assert quality.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert quality.standard_error == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 400), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_chunks_and_batches_do_not_matter(chunk: int, batch_size: int, stride: int, bos: bool) -> None:
    split = text(6, bos=2 if bos else None)
    expected = evaluate_perplexity(bigrams(1), split, 1, stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.evaluation.perplexity, "_CHUNK_LOGITS", chunk)
        quality = evaluate_perplexity(bigrams(1), split, batch_size, stride)
    torch.testing.assert_close(quality.window_nll, expected.window_nll, rtol=1e-9, atol=0)
    assert torch.equal(quality.window_tokens, expected.window_tokens)
    assert quality.standard_error == pytest.approx(expected.standard_error)


def test_large_logits_do_not_overflow() -> None:
    model = bigrams(0, scale=1e4)
    quality = evaluate_perplexity(model, text(4), batch_size=2)
    input_ids = text(4).batch(range(4))
    expected = F.cross_entropy(model(input_ids)[:, :-1].reshape(-1, VOCABULARY).double(), input_ids[:, 1:].reshape(-1))
    assert quality.nll == pytest.approx(float(expected), rel=1e-6)
    assert quality.perplexity == math.inf


def test_half_precision_logits() -> None:
    model = bigrams(0)
    half = evaluate_perplexity(lambda input_ids: model(input_ids).half(), text(4), batch_size=2)
    assert half.nll == pytest.approx(evaluate_perplexity(model, text(4), batch_size=2).nll, abs=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_the_window(value: float) -> None:
    def model(input_ids: Tensor) -> Tensor:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[0, 3, 5] = value
        return logits

    with pytest.raises(InputError, match="logits of test window 0 are not finite"):
        evaluate_perplexity(model, text(4), batch_size=2)


def test_progress_is_reported() -> None:
    said: list[tuple[int, int, str]] = []
    quality = evaluate_perplexity(bigrams(0), text(5), 2, progress=lambda *entry: said.append(entry))
    assert [entry[:2] for entry in said] == [(2, 5), (4, 5), (5, 5)]
    assert said[-1][2] == f"perplexity {quality.perplexity:.3f}"


def test_too_little_text_for_an_error() -> None:
    with pytest.raises(InputError, match=r"1 windows are too few for a standard error; evaluation\.samples.* least 2"):
        evaluate_perplexity(bigrams(0), text(1), 1)
    with pytest.raises(InputError, match="too few for a standard error"):
        evaluate_perplexity(bigrams(0), text(1).strided(1), 1, stride=1)


# --- stride ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_stride_predicts_each_token_once_from_its_window(stride: int) -> None:
    """The logits tell how far into its window a token is, so the sums tell which tokens were counted where."""

    def position(input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], dtype=torch.float32)
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        return logits.scatter(
            2, input_ids.roll(-1, dims=1)[:, :, None], places[None, :, None].expand(len(input_ids), -1, 1)
        )

    split = text(5)
    quality = evaluate_perplexity(position, split, 2, stride)

    def loss(place: int) -> float:
        return math.log(VOCABULARY - 1 + math.exp(place)) - place

    expected = [sum(loss(place) for place in range(8))]
    expected += [sum(loss(place) for place in range(8 - stride, 8))] * (len(quality.window_nll) - 1)
    assert quality.window_nll.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(quality.window_nll) == 1 + (len(split.tokens) - 8) // stride
    assert quality.tokens == 8 + (len(quality.window_nll) - 1) * stride
    assert quality.stride == stride


def test_overlapping_windows_are_not_counted_as_independent() -> None:
    split, model = text(60), bigrams(3)
    whole, overlapping = evaluate_perplexity(model, split, 8), evaluate_perplexity(model, split, 8, stride=1)
    # Bigrams gain nothing from a longer past: the same tokens with the same losses, but for those after a <bos>.
    assert overlapping.nll == pytest.approx(whole.nll, rel=0.02)
    assert overlapping.standard_error == pytest.approx(whole.standard_error, rel=0.3)
    naive = overlapping.window_nll[1:].std() / math.sqrt(len(overlapping.window_nll) - 1)
    assert overlapping.standard_error != pytest.approx(float(naive), rel=1e-3)


def test_standard_error_covers_the_truth() -> None:
    """The mean loss of texts drawn from a model is within two standard errors of its expectation about 95 times in
    100."""
    probabilities = torch.softmax(torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)), dim=0)
    entropy = float(-(probabilities * probabilities.log()).sum())
    hits = 0
    for seed in range(100):
        drawn = torch.multinomial(probabilities, 320, replacement=True, generator=torch.Generator().manual_seed(seed))
        split = TextSplit(drawn.int(), context=9, bos=2, step=8, facts=facts(VOCABULARY))
        quality = evaluate_perplexity(lambda ids: probabilities.log().expand(*ids.shape, VOCABULARY), split, 64)
        hits += abs(quality.nll - entropy) < 2 * quality.standard_error
    assert 88 <= hits <= 100


# --- pairs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_paired_difference(seed: int) -> None:
    split = text(40, seed=seed)
    noisy = bigrams(seed)
    better = evaluate_perplexity(noisy, split, 8)
    worse = evaluate_perplexity(lambda ids: noisy(ids) + 0.05 * bigrams(seed + 50)(ids), split, 8)
    pair = paired_difference(worse, better)
    means = (worse.window_nll - better.window_nll) / 8
    assert pair.nll == pytest.approx(worse.nll - better.nll)
    assert pair.standard_error == pytest.approx(float(means.std() / math.sqrt(40)), rel=1e-6)
    assert pair.standard_error < better.standard_error / 5
    assert pair.ratio == pytest.approx(worse.perplexity / better.perplexity)
    assert pair.ratio_error == pytest.approx(pair.ratio * pair.standard_error)
    back = paired_difference(better, worse)
    assert (back.nll, back.standard_error) == pytest.approx((-pair.nll, pair.standard_error))
    same = paired_difference(better, better)
    assert (same.nll, same.standard_error, same.ratio, same.ratio_error) == (0.0, 0.0, 1.0, 0.0)


def test_only_the_same_text_can_be_paired() -> None:
    quality = evaluate_perplexity(bigrams(0), text(6), 2)
    with pytest.raises(ValueError, match=r"text .* not comparable"):
        paired_difference(quality, evaluate_perplexity(bigrams(0), text(6, seed=1), 2))
    with pytest.raises(ValueError, match="stride 8 against 4: not comparable"):
        paired_difference(quality, evaluate_perplexity(bigrams(0), text(6), 2, stride=4))
    with pytest.raises(ValueError, match="context 9 against 5: not comparable"):
        paired_difference(quality, evaluate_perplexity(bigrams(0), dataclasses.replace(text(6), context=5, step=4), 2))


# --- PyTorch models and divergence -----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", supported_model_types("text-generation"))
def test_lazy_logits_are_those_of_the_model(model_type: str) -> None:
    model = tiny(model_type)
    input_ids = text(3).batch(range(3))
    expected = model(input_ids=input_ids).logits
    lazy = lazy_logits(model)(input_ids)
    for row, positions in ((0, slice(0, 8)), (2, slice(3, 5))):
        torch.testing.assert_close(lazy[row, positions], expected[row, positions])
    direct = evaluate_perplexity(lambda ids: model(input_ids=ids).logits, text(5), 2)
    assert evaluate_perplexity(lazy_logits(model), text(5), 2).nll == pytest.approx(direct.nll, rel=1e-6)


def test_final_soft_cap_matters_here() -> None:
    capped, free = tiny("gemma2", final_logit_softcapping=0.5), tiny("gemma2", final_logit_softcapping=None)
    capped.load_state_dict(free.state_dict())
    lowered = evaluate_perplexity(lazy_logits(capped), text(5), 2)
    assert lowered.nll != pytest.approx(evaluate_perplexity(lazy_logits(free), text(5), 2).nll, rel=1e-2)
    direct = evaluate_perplexity(lambda ids: capped(input_ids=ids).logits, text(5), 2)
    assert lowered.nll == pytest.approx(direct.nll, rel=1e-6)


def perturbed(model: Any, seed: int, amount: float) -> Any:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.model.layers.parameters():
            parameter.add_(amount * parameter.std().nan_to_num(0.0) * torch.randn(parameter.shape, generator=generator))
    return changed


@pytest.mark.parametrize("stride", [None, 3])
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "qwen2"])
def test_divergence_against_the_direct_formula(
    model_type: str, stride: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.evaluation.perplexity, "_CHUNK_LOGITS", 3 * VOCABULARY)
    dense, split = tiny(model_type), text(7)
    model = perturbed(dense, 1, 0.2)
    quality = evaluate_dense(dense, split, 2, stride, tmp_path)
    assert quality.nll == pytest.approx(evaluate_perplexity(lazy_logits(dense), split, 2, stride).nll, rel=1e-6)
    result = evaluate_perplexity(lazy_logits(model), split, 3, stride, None, DenseReference(tmp_path, dense)).divergence
    assert result is not None
    strided = split.strided(stride)
    divergences, same = [], []
    for window, count in enumerate(strided.predicted().tolist()):
        ids = strided.batch([window])
        p, q = (net(input_ids=ids).logits[0, -1 - count : -1].double().log_softmax(dim=-1) for net in (dense, model))
        divergences.append(F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1))
        same.append(p.argmax(dim=-1) == q.argmax(dim=-1))
    expected = torch.cat(divergences).numpy()
    assert result.kl_mean == pytest.approx(expected.mean(), rel=1e-4)
    assert result.kl_mean > 1e-3
    found = [result.kl_median, result.kl_p90, result.kl_p99, result.kl_p999, result.kl_max]
    assert found == pytest.approx(np.quantile(expected, [0.5, 0.9, 0.99, 0.999, 1.0]), rel=1e-4, abs=1e-6)
    assert result.same_top1 == pytest.approx(float(torch.cat(same).double().mean()))
    assert 0 < result.same_top1 < 1


def test_dense_model_does_not_diverge_from_itself(tmp_path: Path) -> None:
    dense = tiny("llama")
    evaluate_dense(dense, text(5), 2, None, tmp_path)
    result = evaluate_perplexity(lazy_logits(dense), text(5), 1, None, None, DenseReference(tmp_path, dense)).divergence
    assert result is not None
    assert result.kl_max < 1e-6
    assert result.same_top1 == 1.0


@pytest.mark.parametrize("amount", [1e-4, 1e-3])
def test_small_divergences_are_not_lost_in_rounding(amount: float, tmp_path: Path) -> None:
    """Quadratic in the perturbation, down to a millionth of a nat."""
    dense, split = tiny("llama"), text(20)
    evaluate_dense(dense, split, 4, None, tmp_path)
    reference = DenseReference(tmp_path, dense)

    def mean(scale: float) -> float:
        divergence = evaluate_perplexity(
            lazy_logits(perturbed(dense, 3, scale)), split, 4, None, None, reference
        ).divergence
        assert divergence is not None
        return divergence.kl_mean

    assert mean(2 * amount) / mean(amount) == pytest.approx(4.0, rel=0.15)


def test_hidden_states_are_only_of_predicted_tokens(tmp_path: Path) -> None:
    dense, split = tiny("qwen3"), text(4, bos=None)
    evaluate_dense(dense, split, 3, 4, tmp_path)
    states = np.load(tmp_path / HIDDEN_STATES)
    strided = split.strided(4)
    assert states.shape == (int(strided.predicted().sum()), 32)
    assert states.dtype == np.float32
    hidden = dense.model(input_ids=strided.batch([1])).last_hidden_state[0]
    np.testing.assert_allclose(states[8:12], hidden[-5:-1].numpy(), rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [HIDDEN_STATES]


def test_nothing_is_left_of_a_failed_evaluation(tmp_path: Path) -> None:
    dense = tiny("llama")
    dense.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        evaluate_dense(dense, text(3), 1, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reference_of_another_text_is_refused(tmp_path: Path) -> None:
    dense = tiny("llama")
    evaluate_dense(dense, text(5), 2, None, tmp_path)
    with pytest.raises(ValueError, match="48 tokens are compared with 40 of the dense model"):
        evaluate_perplexity(lazy_logits(dense), text(6), 2, None, None, DenseReference(tmp_path, dense))


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compared", [True, False])
def test_saved_and_loaded(compared: bool, tmp_path: Path) -> None:
    dense = tiny("llama")
    evaluate_dense(dense, text(5), 2, None, tmp_path / "dense")
    reference = DenseReference(tmp_path / "dense", dense) if compared else None
    quality = evaluate_perplexity(lazy_logits(perturbed(dense, 0, 0.1)), text(5), 2, None, None, reference)
    save_perplexity(quality, tmp_path / "quality")
    loaded = load_perplexity(tmp_path / "quality")
    assert isinstance(loaded, Perplexity)
    assert (loaded.divergence is not None) == compared
    for field in dataclasses.fields(Perplexity):
        was, now = getattr(quality, field.name), getattr(loaded, field.name)
        assert torch.equal(was, now) if isinstance(was, Tensor) else was == now
    assert json.loads((tmp_path / "quality" / "perplexity.json").read_text())["tokens"] == quality.tokens
    assert paired_difference(loaded, quality).nll == 0.0
