"""Training of classifiers in a run: which samples a step sees, and what a killed training goes on from."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.data.images import TensorSplit
from pipeline.models.classifier_training import _batch, train_classifier
from pipeline.plumbing import training_loop
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.progress import Progress
from pipeline.recipe.schema import Training

TRAINING = Training(steps=30, batch_size=16, learning_rate=3e-2)
train = partial(train_classifier, training=TRAINING, seed=0, progress=Progress())


class KilledError(Exception):
    """Stands for the end of the process."""


def two_clouds() -> TensorSplit:
    """100 points of two classes that a line tells apart."""
    labels = torch.arange(100) % 2
    noise = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    return TensorSplit(noise + 4.0 * labels[:, None] - 2.0, labels)


def linear() -> nn.Linear:
    module = nn.Linear(3, 2)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


@given(size=st.integers(1, 40), samples=st.integers(1, 25), seed=st.integers(0, 3))
def test_every_sample_comes_once_before_any_comes_again(size: int, samples: int, seed: int) -> None:
    seen = torch.cat([_batch(step, size, samples, seed) for step in range(6)])
    assert len(seen) == 6 * size
    for start in range(0, len(seen), samples):
        part = seen[start : start + samples].tolist()
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(samples))


def test_passes_have_orders_of_their_own() -> None:
    first, second = _batch(0, 50, 50, 0), _batch(1, 50, 50, 0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, _batch(0, 50, 50, 1))


def test_it_learns() -> None:
    module, split = linear(), two_clouds()
    train(module, module, split)
    assert (module(split.inputs).argmax(dim=1) == split.labels).all()


def test_a_killed_training_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = linear()
    train(expected, expected, two_clouds(), augment=noisy)
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", -1.0)
    killed, calls, checkpoint = linear(), 0, tmp_path / "checkpoint.pt"

    def forward(inputs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 17:
            raise KilledError
        return killed(inputs)

    with pytest.raises(KilledError):
        train(killed, forward, two_clouds(), checkpoint=checkpoint, augment=noisy)
    resumed = linear()
    train(resumed, resumed, two_clouds(), checkpoint=checkpoint, augment=noisy)
    assert torch.equal(resumed.weight, expected.weight)
    assert torch.equal(resumed.bias, expected.bias)


def noisy(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + torch.randn(inputs.shape, generator=generator)


def test_a_training_that_diverges_names_its_learning_rate() -> None:
    module = linear()
    with pytest.raises(InputError, match=r"diverged; lower its learning_rate, 0\.03 .*the loss is nan at step 1"):
        train(module, lambda inputs: module(inputs) * torch.nan, two_clouds())
