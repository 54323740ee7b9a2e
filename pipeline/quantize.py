"""The QAT stage's pure parts: layouts for all factors, allocation of bits, and the packed model."""

import bisect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from exporters.packed_model import PackedLinear, PackedMLP, PackedModel
from fips_ort.layout import BIT_WIDTHS, Layout
from pipeline.compress import empty_group, load_factors, named_factors
from pipeline.errors import InputError
from pipeline.factorized_mlp import FactorizedMLP
from pipeline.gptq_start import prepare_with_gptq
from pipeline.moments import MLPMoments, reduced_energy
from pipeline.plan import GroupPlan, Segments, basis_layout, given_segments, group_size, projection_layout
from pipeline.recipe import Recipe
from qat.allocation import allocate_bits, segments_of
from qat.factor import Factor


def choose_segments(
    recipe: Recipe,
    group: GroupPlan,
    mlps: Sequence[FactorizedMLP],
    moments: Mapping[int, MLPMoments] | None = None,
) -> tuple[Segments, Segments]:
    """Segments of the rank axis of (basis, projections): given by the recipe, or allocated.

    Allocation spends what ``target_stored_bits`` (per original MLP weight of the group, every stored byte counted)
    leaves after scales, pattern and factors of given bits, on chunks of rank entries in the order of falling
    energy (:func:`sort_rank_entries`). Raises InputError if that is too little. ``moments``: of the dense MLPs by
    block, which then say how much each rank entry contributes to their outputs.
    """
    quantization = recipe.quantization
    chunk = quantization.projections.block_size
    given = given_segments(recipe, group)
    if given[0] is not None and given[1] is not None:
        return given[0], given[1]
    at_two_bits = (0, 0, 0, group.rank)
    base = group_size(recipe, group, given[0] or at_two_bits, given[1] or at_two_bits)
    assert quantization.target_stored_bits is not None
    least = 8 * base.stored
    if recipe.compression.pattern == "bitmap":
        # Kept entries are spread unevenly, so each segment of each projection may end in a partly filled byte.
        least += 7 * len(BIT_WIDTHS) * sum(len(mlp.projections) for mlp in mlps)
    spare_bits = quantization.target_stored_bits * group.dense_parameters - least
    if spare_bits < 0:
        # Rounded up, so that the value named is one that works.
        enough = math.ceil(1000 * least / group.dense_parameters) / 1000
        raise InputError(
            f"recipe {recipe.name}: quantization.target_stored_bits: {quantization.target_stored_bits} is below what "
            f"group {group.index} takes with 2 bits everywhere, {enough:.3f}; raise it, or lower compression.budget"
        )
    energy = _chunk_energy(group, mlps, chunk, moments)
    order = np.argsort(-energy, kind="stable")
    is_bitmap = recipe.compression.pattern == "bitmap" and given[1] is None
    expected = (1.0 - recipe.compression.target_sparsity) * group.columns * chunk
    unexpected = _kept_values(group, mlps, chunk)[order] - expected if is_bitmap else np.zeros(order.size)

    def bits_with(extra: int) -> NDArray[np.int64]:
        return allocate_bits(energy[order], 2.0 + extra / energy.size)

    def cost(extra: int) -> float:
        """Stored bits beyond 2 bits everywhere. Of a bitmap, chunks keep more or fewer values than all on average."""
        bits = bits_with(extra)
        segments = segments_of(bits, chunk)
        size = group_size(recipe, group, given[0] or segments, given[1] or segments)
        return 8 * (size.stored - base.stored) + float((bits - 2) @ unexpected)

    # The largest affordable budget is searched, not computed: chunks hold unequal numbers of kept values, and segments
    # of n:m weights are filled up to whole tiles, so that a larger budget may even take less.
    levels = range((max(BIT_WIDTHS) - 2) * energy.size + 1)
    affordable = bisect.bisect_right(levels, spare_bits, key=cost) - 1
    while cost(affordable) > spare_bits:
        affordable -= 1
    segments = segments_of(bits_with(affordable), chunk)
    return given[0] or segments, given[1] or segments


@torch.no_grad()
def sort_rank_entries(
    group: GroupPlan,
    mlps: Sequence[FactorizedMLP],
    chunk: int,
    moments: Mapping[int, MLPMoments] | None = None,
) -> None:
    """Permute the rank axis of all factors of a group so that the energy of its chunks falls; products stay the same.

    Whole chunks of ``chunk`` entries move, so that n:m patterns along the rank axis survive.
    """
    order = np.argsort(-_chunk_energy(group, mlps, chunk, moments), kind="stable")
    entries = torch.from_numpy((order[:, None] * chunk + np.arange(chunk)).reshape(-1))
    _basis(mlps).permute(entries, axis=0)
    for mlp in mlps:
        for name, projection in mlp.projections.items():
            assert isinstance(projection, Factor)
            projection.permute(entries, axis=0 if name == mlp.site.last else 1)


def needs_moments(recipe: Recipe) -> bool:
    """Whether quantization starts from moments of the activations."""
    return recipe.quantization.start == "gptq"


def prepare_factors(
    recipe: Recipe,
    group: GroupPlan,
    mlps: Sequence[FactorizedMLP],
    segments: tuple[Segments, Segments],
    moments: Mapping[int, MLPMoments] | None = None,
) -> None:
    """Start fake quantization of every factor of a group, with ``segments`` of (basis, projections).

    Where bits are graded, the rank entries are sorted first: segments take them in the order of falling bits.
    ``moments``: of the dense MLPs by block; required by ``quantization.start: gptq`` (:func:`needs_moments`).
    """
    if group.has_basis and any(max(sizes) < group.rank for sizes in segments):
        sort_rank_entries(group, mlps, recipe.quantization.projections.block_size, moments)
    layouts = _layouts(recipe, group, mlps, segments)
    learned = recipe.quantization.learned_scales
    if needs_moments(recipe):
        if moments is None:
            raise ValueError("quantization.start gptq needs the moments of the dense MLPs")
        prepare_with_gptq(mlps, moments, layouts, learned_scales=learned)
    else:
        for name, factor in named_factors(mlps).items():
            factor.prepare(layouts[name], learned_scales=learned)


def restore_prepared(
    recipe: Recipe, model: nn.Module, group: GroupPlan, segments: tuple[Segments, Segments], path: Path
) -> list[FactorizedMLP]:
    """The MLPs of a group with the fake-quantized factors saved at ``path``, which were prepared with ``segments``."""
    mlps = empty_group(model, group, masked=recipe.compression.pattern != "dense")
    layouts = _layouts(recipe, group, mlps, segments)
    for name, factor in named_factors(mlps).items():
        factor.prepare_to_load(layouts[name], learned_scales=recipe.quantization.learned_scales)
    load_factors(mlps, path)
    return mlps


def _layouts(
    recipe: Recipe, group: GroupPlan, mlps: Sequence[FactorizedMLP], segments: tuple[Segments, Segments]
) -> dict[str, Layout]:
    """Layout of every factor of a group, by the names of :func:`pipeline.compress.named_factors`."""
    layouts = {f"{group.name}.basis": basis_layout(recipe, group, segments[0])} if group.has_basis else {}
    for mlp in mlps:
        for name in mlp.projections:
            layout = projection_layout(recipe, group, mlp.site, name, segments[1])
            layouts[f"block_{mlp.site.block}.{name}"] = layout
    return layouts


def assert_coverage(model: nn.Module, mlps: Sequence[FactorizedMLP]) -> None:
    """Every factor of ``model`` is fake-quantized, and exactly these are the ones that get packed.

    (torchao's ``quantize_`` passes over what it does not know without a word.) Raises AssertionError.
    """
    missing = {id(factor): name for name, factor in named_factors(mlps).items()}
    for path, module in model.named_modules():
        if isinstance(module, Factor):
            name = missing.pop(id(module), None)
            if name is None:
                raise AssertionError(f"{path}: factor is not part of the compressed MLPs")
            if module.quantizer is None:
                raise AssertionError(f"{path} ({name}): factor is not fake-quantized")
    if missing:
        raise AssertionError(f"factors that the model does not use: {', '.join(missing.values())}")


def freeze(mlps: Sequence[FactorizedMLP]) -> PackedModel:
    """Integer codes of all factors: the packed model that export works from."""
    packed = {name: factor.freeze() for name, factor in named_factors(mlps).items()}
    bases = {mlp.group: packed[f"{mlp.group}.basis"] for mlp in mlps if mlp.basis is not None}

    def linear(mlp: FactorizedMLP, name: str) -> PackedLinear:
        bias = mlp.biases[name].detach().numpy() if name in mlp.biases else None
        return PackedLinear(packed[f"block_{mlp.site.block}.{name}"], bias)

    return PackedModel(
        bases,
        [
            PackedMLP(
                block=mlp.site.block,
                path=mlp.site.path,
                basis=None if mlp.basis is None else mlp.group,
                first={name: linear(mlp, name) for name in mlp.site.first},
                last=(mlp.site.last, linear(mlp, mlp.site.last)),
                activation=mlp.site.activation,
            )
            for mlp in mlps
        ],
    )


def _basis(mlps: Sequence[FactorizedMLP]) -> Factor:
    """The basis that the MLPs of a group share."""
    basis = mlps[0].basis
    assert basis is not None
    return basis


def _kept_values(group: GroupPlan, mlps: Sequence[FactorizedMLP], chunk: int) -> NDArray[np.int64]:
    """Kept values of all projections in each chunk of rank entries: int64 [rank / chunk]."""
    values = np.zeros(group.rank, dtype=np.int64)
    for mlp in mlps:
        for name, projection in mlp.projections.items():
            assert isinstance(projection, Factor)
            kept = torch.ones_like(projection.weight) if projection.mask is None else projection.mask
            values += kept.sum(dim=1 if name == mlp.site.last else 0).long().numpy()
    return values.reshape(-1, chunk).sum(axis=1)


@torch.no_grad()
def _chunk_energy(
    group: GroupPlan, mlps: Sequence[FactorizedMLP], chunk: int, moments: Mapping[int, MLPMoments] | None
) -> NDArray[np.float64]:
    """Mean energy of each chunk of rank entries: float64 [rank / chunk].

    Of entry j it is ``|u_j|² · Σ |v_j|²`` over all projections; given moments, the share of the MLPs' outputs that goes
    through it: ``E[(x·u_j)²] · Σ_k sensitivity_k v_jk²`` of a first projection, ``|u_j|² E[(V a)_j²]`` of a last.
    """
    basis = _basis(mlps)().double()
    length = basis.square().sum(dim=1)
    energy = torch.zeros(group.rank, dtype=torch.float64)
    for mlp in mlps:
        if moments is None:
            for name, projection in mlp.projections.items():
                energy += length * projection().double().square().sum(dim=1 if name == mlp.site.last else 0)
            continue
        part = moments[mlp.site.block]
        read = ((basis @ part.input.double()) * basis).sum(dim=1)
        for name in mlp.site.first:
            energy += read * (part.sensitivity[name].double() @ mlp.projection(name)().double().square())
        energy += length * reduced_energy(mlp, part.activations) / part.output_energy
    return energy.reshape(-1, chunk).mean(dim=1).numpy()
