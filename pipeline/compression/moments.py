"""How much errors in the matrices of an MLP count in its output: second moments, from recorded activations."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate import Activations, open_activations
from pipeline.compression.factorized_mlp import FactorizedMLP, original_mlp
from pipeline.recipe.plan import GroupPlan

MOMENT_TOKENS = 16_384
"""Calibration tokens, evenly spread over the recorded ones, from which matrices of moments are estimated."""
ENERGY_TOKENS = 4096
"""Calibration tokens for energies and sensitivities, which are one number for each neuron and need fewer."""
_CHUNK = 2048
"""Tokens that pass through an MLP at a time."""


@dataclass(frozen=True)
class MLPMoments:
    """What a dense MLP reads and writes, and how an error in a first linear's output shows in its output.

    ``input``: ``E[x xᵀ]`` [d, d]. ``output``: ``E[y yᵀ] / E|y|²`` [d, d], y without the last bias: of trace 1.
    ``output_energy``: ``E|y|²``. ``hidden_energy``: ``E[a²]`` [n] of what the last linear reads. ``sensitivity``: first
    linear → [n]; errors e of its n outputs, independent of each other and of the input, change y by ``Σ sensitivity ·
    E[e²]`` of ``E|y|²``, to first order. All float32. ``activations``: the recorded ones themselves.
    """

    input: Tensor
    output: Tensor
    output_energy: float
    hidden_energy: Tensor
    sensitivity: dict[str, Tensor]
    activations: Activations


def group_moments(
    dense: nn.Module, group: GroupPlan, activations: Mapping[int, Activations]
) -> dict[int, MLPMoments]:
    """Moments of the dense MLPs of a group by block, from what they read and wrote."""
    moments = {}
    for site in group.sites:
        original = original_mlp(dense.get_submodule(site.path), site, group.name)
        moments[site.block] = mlp_moments(original, activations[site.block])
    return moments


@torch.no_grad()
def mlp_moments(mlp: FactorizedMLP, activations: Activations) -> MLPMoments:
    """Moments of an MLP without a basis, whose factors are its own matrices."""
    d, n = mlp.site.width, mlp.site.hidden
    moment, output = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    count = 0
    for x, y in _chunks(mlp, activations, MOMENT_TOKENS):
        moment += (x.T @ x).double()
        output += (y.T @ y).double()
        count += x.shape[0]
    energy = float(output.trace()) / count or 1.0
    hidden_energy = torch.zeros(n, dtype=torch.float64)
    slopes = [torch.zeros(n, dtype=torch.float64) for _ in mlp.site.first]
    sampled = 0
    for x, _ in _chunks(mlp, activations, ENERGY_TOKENS):
        before = [part.requires_grad_() for part in mlp.pre_activations(x)]
        with torch.enable_grad():
            hidden = mlp.activate(before)
            # Activations work on each entry by itself, so the gradient of the sum is the derivative of each.
            derivatives = torch.autograd.grad(hidden.sum(), before)
        hidden_energy += hidden.detach().double().square().sum(dim=0)
        for total, derivative in zip(slopes, derivatives, strict=True):
            total += derivative.double().square().sum(dim=0)
        sampled += x.shape[0]
    # What one unit of each neuron adds to the output.
    written = mlp.projection(mlp.site.last)().double().square().sum(dim=0)
    sensitivity = {
        name: (total / sampled * written / energy).float() for name, total in zip(mlp.site.first, slopes, strict=True)
    }
    return MLPMoments(
        input=(moment / count).float(),
        output=(output / count / energy).float(),
        output_energy=energy,
        hidden_energy=(hidden_energy / sampled).float(),
        sensitivity=sensitivity,
        activations=activations,
    )


@torch.no_grad()
def reduced_energy(mlp: FactorizedMLP, activations: Activations) -> Tensor:
    """``E[(V a)²]`` of each row of the last projection of ``mlp``, at its own activations: float64 [rank]."""
    last = mlp.projection(mlp.site.last)()
    total, count = torch.zeros(last.shape[0], dtype=torch.float64), 0
    for x, _ in _chunks(mlp, activations, ENERGY_TOKENS):
        total += (mlp.activate(mlp.pre_activations(x)) @ last.T).double().square().sum(dim=0)
        count += x.shape[0]
    return total / count


@torch.no_grad()
def hidden_moments(mlp: FactorizedMLP, activations: Activations) -> tuple[Tensor, Tensor]:
    """``E[a aᵀ]`` [n, n] of the activations a that the last linear of ``mlp`` reads, and ``E[y aᵀ]`` [d, n].

    y: the recorded (dense) outputs without the last bias. Both float32: n² numbers, to be held for one block at a time.
    """
    moment = torch.zeros(mlp.site.hidden, mlp.site.hidden)
    cross = torch.zeros(mlp.site.width, mlp.site.hidden)
    count = 0
    for x, y in _chunks(mlp, activations, MOMENT_TOKENS):
        hidden = mlp.activate(mlp.pre_activations(x))
        moment += hidden.T @ hidden
        cross += y.T @ hidden
        count += x.shape[0]
    return moment / count, cross / count


def _chunks(mlp: FactorizedMLP, activations: Activations, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """At most ``tokens`` recorded inputs and outputs, the latter without the last bias, some at a time."""
    stride = -(-activations.inputs.shape[0] // tokens)
    inputs, outputs = activations.inputs[::stride], activations.outputs[::stride]
    bias = mlp.bias(mlp.site.last)
    for start in range(0, inputs.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        # Copied: memory-mapped arrays are read-only and not always aligned.
        x, y = torch.tensor(inputs[part]), torch.tensor(outputs[part])
        yield x, y if bias is None else y - bias


def open_moments(dense: nn.Module, group: GroupPlan, calibration: Path) -> Mapping[int, MLPMoments]:
    """Second moments of what the linear layers of a group's dense MLPs read, by block."""
    return group_moments(dense, group, {site.block: open_activations(calibration, site) for site in group.sites})
