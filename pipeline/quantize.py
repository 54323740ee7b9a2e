"""The QAT stage's pure parts: layouts for all factors, allocation of bits, and the packed model."""

from collections.abc import Sequence

import numpy as np
import torch
from exporters.packed_model import PackedLinear, PackedMLP, PackedModel
from numpy.typing import NDArray
from qat.allocation import allocate_bits, segments_of
from qat.factor import Factor
from torch import nn

from pipeline.compress import named_factors
from pipeline.errors import InputError
from pipeline.factorized_mlp import FactorizedMLP
from pipeline.plan import GroupPlan, Segments, basis_layout, group_size, projection_layout, scheme_segments
from pipeline.recipe import Recipe


def choose_segments(recipe: Recipe, group: GroupPlan, mlps: Sequence[FactorizedMLP]) -> tuple[Segments, Segments]:
    """Segments of the rank axis of (basis, projections): given by the recipe, or allocated.

    Allocation spends what ``target_stored_bits`` (per original MLP weight of the group, every stored byte counted)
    leaves after scales, pattern and factors of given bits. Raises InputError if that is too little.
    """
    quantization = recipe.quantization
    chunk = quantization.projections.block_size
    given = [scheme_segments(scheme, group, chunk) for scheme in (quantization.basis, quantization.projections)]
    if None not in given:
        return given[0], given[1]  # type: ignore[return-value]
    at_two_bits = (0, 0, 0, group.rank)
    base = group_size(recipe, group, given[0] or at_two_bits, given[1] or at_two_bits)
    sparsity = recipe.compression.target_sparsity
    open_values = group.rank * (group.width if given[0] is None else 0)
    if given[1] is None:
        open_values += round(group.rank * group.columns * (1.0 - sparsity))
    assert quantization.target_stored_bits is not None
    spare_bits = quantization.target_stored_bits * group.dense_parameters - 8 * base.stored
    budget = 2.0 + spare_bits / open_values
    if budget < 2.0:
        least = 8 * base.stored / group.dense_parameters
        raise InputError(
            f"recipe {recipe.name}: quantization.target_stored_bits: {quantization.target_stored_bits} is below what "
            f"group {group.index} takes with 2 bits everywhere, {least:.3f}; raise it, or lower compression.budget"
        )
    bits = allocate_bits(_chunk_energy(group, mlps, chunk), budget)
    segments = segments_of(bits, chunk)
    return given[0] or segments, given[1] or segments


def prepare_factors(recipe: Recipe, group: GroupPlan, mlps: Sequence[FactorizedMLP]) -> tuple[Segments, Segments]:
    """Start fake quantization of every factor of a group; returns the segments of (basis, projections)."""
    basis_segments, projection_segments = choose_segments(recipe, group, mlps)
    learned = recipe.quantization.learned_scales
    mlps[0].basis.prepare(basis_layout(recipe, group, basis_segments), learned_scales=learned)
    for mlp in mlps:
        for name, projection in mlp.projections.items():
            assert isinstance(projection, Factor)
            layout = projection_layout(recipe, group, mlp.site, name, projection_segments)
            projection.prepare(layout, learned_scales=learned)
    return basis_segments, projection_segments


def assert_coverage(model: nn.Module, mlps: Sequence[FactorizedMLP]) -> None:
    """Every factor of ``model`` is fake-quantized, and every one is among those that get packed.

    (torchao's ``quantize_`` passes over what it does not know without a word.) Raises AssertionError.
    """
    known = {id(factor): name for name, factor in named_factors(mlps).items()}
    for path, module in model.named_modules():
        if isinstance(module, Factor):
            if id(module) not in known:
                raise AssertionError(f"{path}: factor is not part of the compressed MLPs")
            if module.quantizer is None:
                raise AssertionError(f"{path} ({known[id(module)]}): factor is not fake-quantized")


def freeze(mlps: Sequence[FactorizedMLP]) -> PackedModel:
    """Integer codes of all factors: the packed model that export works from."""
    packed = {name: factor.freeze() for name, factor in named_factors(mlps).items()}
    bases = {mlp.group: packed[f"{mlp.group}.basis"] for mlp in mlps}

    def linear(mlp: FactorizedMLP, name: str) -> PackedLinear:
        bias = mlp.biases[name].detach().numpy() if name in mlp.biases else None
        return PackedLinear(packed[f"block_{mlp.site.block}.{name}"], bias)

    return PackedModel(
        bases,
        [
            PackedMLP(
                block=mlp.site.block,
                path=mlp.site.path,
                basis=mlp.group,
                first={name: linear(mlp, name) for name in mlp.site.first},
                last=(mlp.site.last, linear(mlp, mlp.site.last)),
                activation=mlp.site.activation,
            )
            for mlp in mlps
        ],
    )


@torch.no_grad()
def _chunk_energy(group: GroupPlan, mlps: Sequence[FactorizedMLP], chunk: int) -> NDArray[np.float64]:
    """Mean energy ``|u_j|² · Σ |v_j|²`` of each chunk of rank entries: float64 [rank / chunk]."""
    energy = torch.zeros(group.rank)
    for mlp in mlps:
        for name, projection in mlp.projections.items():
            energy += projection().square().sum(dim=1 if name == mlp.site.last else 0)
    energy *= mlps[0].basis().square().sum(dim=1)
    return energy.reshape(-1, chunk).mean(dim=1).double().numpy()
