"""End-to-end training of the small classifiers that a run makes itself: scratch models and linear heads."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.images import ImageSplit
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import Training

Progress = Callable[[int, int, str], None]

WARMUP_FRACTION = 0.05
REPORT_EVERY = 20
MAX_ROTATION_DEGREES = 12.0
MAX_SCALING = 0.1
MAX_TRANSLATION = 0.08


def train_classifier(
    forward: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    split: ImageSplit,
    training: Training,
    seed: int,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    progress: Progress | None = None,
) -> None:
    """Train ``parameters`` in place so that ``forward`` (inputs → logits [B, labels]) classifies ``split``.

    AdamW on cross-entropy; linear warm-up, then cosine decay to zero; matrices are decayed, vectors are not.
    Batches are drawn without replacement epoch by epoch. All randomness comes from ``seed``.
    Raises InputError when the loss stops being finite.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": training.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, training.steps))
    queue = torch.empty(0, dtype=torch.int64)
    for step in range(1, training.steps + 1):
        while len(queue) < training.batch_size:
            queue = torch.cat([queue, torch.randperm(len(split), generator=generator)])
        chosen, queue = queue[: training.batch_size], queue[training.batch_size :]
        inputs, labels = split.batch(chosen.numpy())
        if augment is not None:
            inputs = augment(inputs, generator)
        loss = F.cross_entropy(forward(inputs), labels)
        if not torch.isfinite(loss):
            raise InputError(
                f"training the classifier diverged at step {step}; lower its learning_rate, {training.learning_rate}"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if progress is not None and (step % REPORT_EVERY == 0 or step == training.steps):
            progress(step, training.steps, f"loss {loss.item():.4f}")


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate at ``step`` (from 0): warm-up over 5 % of the steps, then cosine to zero."""
    warmup = max(1, round(WARMUP_FRACTION * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = torch.tensor((step - warmup) / max(1, steps - warmup))
    return float(0.5 * (1.0 + torch.cos(torch.pi * progress)))


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
