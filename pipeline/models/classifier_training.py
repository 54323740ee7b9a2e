"""Training of the small classifiers that a run makes itself: scratch models and linear heads."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.images import ImageSplit
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import step_generator, train
from pipeline.recipe.schema import Training

MAX_ROTATION_DEGREES = 12.0
MAX_SCALING = 0.1
MAX_TRANSLATION = 0.08


def train_classifier(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    split: ImageSplit,
    training: Training,
    *,
    seed: int,
    progress: Progress,
    checkpoint: Path | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> None:
    """Train ``module`` in place so that ``forward`` (inputs → logits [B, labels]) classifies ``split``.

    The loss is cross-entropy; batches go through all samples in a random order, then in another. All randomness comes
    from ``seed``. A killed training goes on from ``checkpoint``. Raises InputError when the loss stops being finite.
    """

    def loss(step: int) -> Tensor:
        inputs, labels = split.batch(_batch(step, training.batch_size, len(split), seed).numpy())
        if augment is not None:
            inputs = augment(inputs, step_generator(seed, step))
        return F.cross_entropy(forward(inputs), labels)

    try:
        train(
            module,
            loss,
            steps=training.steps,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            progress=progress,
            label="train the dense model",
            checkpoint=checkpoint,
        )
    except FloatingPointError as error:
        raise InputError(
            f"training the classifier diverged; lower its learning_rate, {training.learning_rate} ({error})"
        ) from None


def _batch(step: int, size: int, samples: int, seed: int) -> Tensor:
    """Indices int64 [size] of the samples of one step: those that come next in an endless row of permutations."""
    places = torch.arange(step * size, (step + 1) * size)
    passes = range(int(places[0]) // samples, int(places[-1]) // samples + 1)
    orders = torch.cat([torch.randperm(samples, generator=step_generator(seed, number)) for number in passes])
    return orders[places - passes.start * samples]


def random_affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [3, H, W] rotated by up to 12 degrees, scaled by up to 10 % and moved by up to 8 % of its size,
    bilinearly, its border pixels repeated."""

    def uniform(reach: float) -> Tensor:
        return reach * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, scale = uniform(math.radians(MAX_ROTATION_DEGREES)), 1 + uniform(MAX_SCALING)
    # The coordinates of the sampling grid run from -1 to 1, so the size is 2.
    right, down = uniform(2 * MAX_TRANSLATION), uniform(2 * MAX_TRANSLATION)
    sine, cosine = scale * torch.sin(angle), scale * torch.cos(angle)
    rows = [torch.stack([cosine, -sine, right], dim=1), torch.stack([sine, cosine, down], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
