"""Local error minimisation: factors trained to reproduce the dense MLPs' outputs from their inputs.

FiPS, section 3.3: capture inputs and outputs of every dense MLP on calibration data, train U and all V of a
group together (U is shared) with AdamW on the squared error, and sparsify V meanwhile. Groups share nothing,
so they are trained one after another. What we do differently: each MLP's error is divided by the mean square
of its dense output, so that no block of a group drowns the others, and weighed by the layer scale behind
the MLP where the model has one. An MLP that writes nothing but zeros, as pruned models have them, has no such scale:
its error counts as it is, and it starts as zeros and stays so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate import Activations, open_activations
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.plumbing.training_loop import step_generator
from pipeline.recipe.plan import MLPSite


@dataclass(frozen=True)
class LocalTarget:
    """An MLP with what its dense original read and wrote, and the scale [d] behind its output (or None)."""

    mlp: FactorizedMLP
    activations: Activations
    output_scale: Tensor | None


def relative_error(target: LocalTarget, x: Tensor, y: Tensor) -> Tensor:
    """Squared error of the MLP's output relative to the mean square of the dense output, or the squared error itself
    where that output is zero: scalar.

    ``x``, ``y``: float32 [tokens, d], what the dense MLP read and wrote.
    """
    error = target.mlp(x) - y
    if target.output_scale is not None:
        error, y = error * target.output_scale, y * target.output_scale
    energy = y.square().mean()
    return error.square().mean() / torch.where(energy > 0, energy, torch.ones_like(energy))


def local_loss(targets: Sequence[LocalTarget], tokens: int, seed: int) -> Callable[[int], Tensor]:
    """The group's loss as a function of the step: mean relative error over its MLPs, on tokens drawn anew."""

    def loss(step: int) -> Tensor:
        generator = step_generator(seed, step)
        errors = [relative_error(target, *target.activations.sample(tokens, generator)) for target in targets]
        return torch.stack(errors).mean()

    return loss


@torch.inference_mode()
def reconstruction_errors(targets: Sequence[LocalTarget], tokens: int, seed: int) -> dict[int, float]:
    """Relative error per block on ``tokens`` calibration tokens, the same ones for the same seed."""
    errors = {}
    for target in targets:
        generator = torch.Generator().manual_seed(seed)
        x, y = target.activations.sample(tokens, generator)
        errors[target.mlp.site.block] = float(relative_error(target, x, y))
    return errors


class GroupModule(nn.Module):
    """The MLPs of one group as one module, so that their shared basis is trained, saved and loaded once."""

    def __init__(self, mlps: Sequence[FactorizedMLP]) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(mlps)
        bases = {id(mlp.basis) for mlp in mlps}  # None, of the dense baseline, is one too
        if len(bases) != 1:
            raise AssertionError("the MLPs of a group must share one basis module")


def local_targets(model: nn.Module, mlps: Sequence[FactorizedMLP], calibration: Path) -> list[LocalTarget]:
    """The MLPs with their recorded activations; ``model`` is the dense model (for its layer scales)."""
    return [
        LocalTarget(mlp, open_activations(calibration, mlp.site), _output_scale(model, mlp.site)) for mlp in mlps
    ]


def _output_scale(model: nn.Module, site: MLPSite) -> Tensor | None:
    return None if site.output_scale is None else model.get_parameter(site.output_scale).detach()
