"""End-to-end training of the small classifiers that a run makes itself: scratch models and linear heads."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data import ImageSplit
from pipeline.errors import InputError
from pipeline.recipe import Training

Progress = Callable[[int, int, str], None]

WARMUP_FRACTION = 0.05
REPORT_EVERY = 20


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


def random_shift(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [3, H, W] moved by up to an eighth of its size in each direction, its border pixels repeated."""
    batch, _, height, width = pixel_values.shape
    reach_y, reach_x = height // 8, width // 8
    padded = F.pad(pixel_values, (reach_x, reach_x, reach_y, reach_y), mode="replicate")
    top = torch.randint(0, 2 * reach_y + 1, (batch,), generator=generator)
    left = torch.randint(0, 2 * reach_x + 1, (batch,), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    images = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
