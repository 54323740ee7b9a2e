"""The one training loop: AdamW with cosine decay, progress, and checkpoints a killed run resumes from exactly."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.plumbing.files import write_aside
from pipeline.plumbing.integrity import forget, is_whole, note_hash
from pipeline.plumbing.progress import Progress

CHECKPOINT_SECONDS = 20.0
"""A checkpoint is written after the first step that ends so long after the one before, or earlier where it is cheap."""
_SECONDS_TO_FIRST = 1.0
_LEAST_RATIO = 50.0
"""Training between two checkpoints takes at least so many times what writing one takes, and a second, unless that is
longer than :data:`CHECKPOINT_SECONDS`: kills that come closely one after another then still get to the end."""
BETAS = (0.9, 0.95)
"""Decay of AdamW's first and second moments."""
LARGEST_GRADIENT = 1.0
"""Norm to which gradients are clipped, all parameters together."""
WARMUP = 0.05
"""Part of the steps over which the learning rate rises."""


def train(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    progress: Progress,
    label: str,
    checkpoint: Path | None = None,
    before_step: Callable[[int], None] | None = None,
    after_backward: Callable[[int], None] | None = None,
) -> list[float]:
    """Train all parameters of ``module`` that require a gradient on ``loss(step)``; returns the losses.

    ``loss`` must depend on nothing but the module and the step (draw batches from :func:`step_generator`):
    then a run resumed from ``checkpoint`` repeats an uninterrupted one bit by bit. A damaged checkpoint is said, and
    training starts anew. The learning rate follows :func:`learning_rate_factor`; weights decay, but not vectors
    (biases, norms); gradients are clipped to norm 1. Raises FloatingPointError if the loss is not finite.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=BETAS,
    )
    first, losses = 0, []
    if checkpoint is not None and checkpoint.exists():
        if is_whole(checkpoint):
            saved = torch.load(checkpoint, weights_only=True)
            module.load_state_dict(saved["module"])
            optimizer.load_state_dict(saved["optimizer"])
            first, losses = saved["step"], saved["losses"]
        else:
            progress.say(f"  {label}: {checkpoint} is damaged; training starts anew")
            remove_checkpoint(checkpoint)
    saved_at, pause = time.monotonic(), min(CHECKPOINT_SECONDS, _SECONDS_TO_FIRST)
    with progress.task(label, steps, start=first) as advance:
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * learning_rate_factor(step, steps)
            if before_step is not None:
                before_step(step)
            optimizer.zero_grad(set_to_none=True)
            value = loss(step)
            value.backward()
            if after_backward is not None:
                after_backward(step)
            torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
            optimizer.step()
            losses.append(float(value.detach()))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"{label}: the loss is {losses[-1]} at step {step + 1}")
            advance(1, f"loss {losses[-1]:.4g}")
            if checkpoint is not None and time.monotonic() - saved_at > pause:
                begin = time.monotonic()
                _save(checkpoint, module, optimizer, step + 1, losses)
                saved_at = time.monotonic()
                pause = min(CHECKPOINT_SECONDS, max(_SECONDS_TO_FIRST, _LEAST_RATIO * (saved_at - begin)))
    return losses


def _save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, losses: list[float]) -> None:
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "losses": losses}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # a path hides what the system says against it
            torch.save(state, file)
        note_hash(path, of=temporary)

    write_aside(path, write)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint of :func:`train`, if it is there."""
    path.unlink(missing_ok=True)
    forget(path)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step of training: the same for the same ``seed`` and ``step``, whatever came before."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rate at ``step``: it rises linearly over the first 5 % of the steps, then falls to zero by
    a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
