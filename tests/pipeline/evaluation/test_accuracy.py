"""Accuracy, its error, and the divergence from the dense model."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.data.images import TensorSplit
from pipeline.evaluation.accuracy import divergence, evaluate_accuracy
from pipeline.plumbing.errors import InputError


def split(labels: list[int]) -> TensorSplit:
    """Images whose first pixel is their index."""
    inputs = torch.zeros(len(labels), 3, 2, 2)
    inputs[:, 0, 0, 0] = torch.arange(len(labels))
    return TensorSplit(inputs, torch.tensor(labels))


def predict_index_mod_3(pixel_values: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(pixel_values[:, 0, 0, 0].long() % 3, 3).float()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_accuracy_does_not_depend_on_the_batches(batch_size: int) -> None:
    quality = evaluate_accuracy(predict_index_mod_3, split([0, 1, 2, 1, 1]), batch_size)
    assert (quality.accuracy, quality.correct, quality.samples) == (0.8, 4, 5)
    assert quality.standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 5))
    assert quality.logits.argmax(dim=1).tolist() == [0, 1, 2, 0, 1]


def test_only_the_first_samples_are_read_and_progress_is_told() -> None:
    seen = []
    quality = evaluate_accuracy(predict_index_mod_3, split([0, 1, 2, 1, 1]), 2, 3, lambda *event: seen.append(event))
    assert (quality.accuracy, quality.samples) == (1.0, 3)
    assert [event[:2] for event in seen] == [(2, 3), (3, 3)]


@pytest.mark.parametrize("samples", [0, 6])
def test_more_samples_than_there_are(samples: int) -> None:
    with pytest.raises(InputError, match=f"{samples} samples asked for, the test split has 5"):
        evaluate_accuracy(predict_index_mod_3, split([0] * 5), 2, samples)


def test_logits_that_are_not_finite_name_the_sample() -> None:
    def overflow(pixel_values: Tensor) -> Tensor:
        return predict_index_mod_3(pixel_values).where(pixel_values[:, 0, 0, :1] != 3, torch.inf)

    with pytest.raises(InputError, match="test sample 3 are not finite"):
        evaluate_accuracy(overflow, split([0] * 5), 2)


def test_logits_can_be_targets_of_distillation() -> None:
    weight = torch.ones(1, requires_grad=True)
    logits = evaluate_accuracy(lambda x: predict_index_mod_3(x) * weight, split([0, 1]), 2).logits
    (logits * weight).sum().backward()
    assert weight.grad is not None


def test_divergence_by_hand() -> None:
    dense = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    model = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    result = divergence(model + 7.0, dense)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert result.kl_mean == pytest.approx(kl / 2, rel=1e-6)
    assert result.kl_p99 == pytest.approx(0.99 * kl, rel=1e-6)
    assert result.same_top1 == 0.5


def test_no_divergence_from_itself() -> None:
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    result = divergence(logits, logits)
    assert (result.kl_mean, result.kl_p99, result.same_top1) == (0.0, 0.0, 1.0)


def test_divergence_needs_the_same_samples() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] against \[4, 3\]"):
        divergence(torch.zeros(2, 3), torch.zeros(4, 3))
