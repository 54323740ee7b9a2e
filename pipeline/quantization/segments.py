"""Segments of the rank axis: which rank entries of a group are stored with how many bits (graded precision)."""

import bisect
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fips_ort.layout import BIT_WIDTHS, Segments, segments_with
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.moments import MLPMoments, reduced_energy
from pipeline.plumbing.errors import InputError
from pipeline.recipe.plan import GroupPlan, given_segments, group_size
from pipeline.recipe.schema import Recipe
from qat.factor import Factor
from qat.graded_bits import allocate_bits, segments_of


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
    at_two_bits = segments_with({2: group.rank})
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
    unexpected = _kept_by_chunk(group, mlps, chunk)[order] - expected if is_bitmap else np.zeros(order.size)

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
        for name, projection in mlp.named_projections():
            projection.permute(entries, axis=mlp.rank_axis(name))


def _basis(mlps: Sequence[FactorizedMLP]) -> Factor:
    """The basis that the MLPs of a group share."""
    basis = mlps[0].basis
    assert basis is not None
    return basis


def _kept_by_chunk(group: GroupPlan, mlps: Sequence[FactorizedMLP], chunk: int) -> NDArray[np.int64]:
    """Kept values of all projections in each chunk of rank entries: int64 [rank / chunk]."""
    values = np.zeros(group.rank, dtype=np.int64)
    for mlp in mlps:
        for name, projection in mlp.named_projections():
            kept = torch.ones_like(projection.weight) if projection.mask is None else projection.mask
            values += kept.sum(dim=1 - mlp.rank_axis(name)).long().numpy()
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
            for name, projection in mlp.named_projections():
                energy += length * projection().double().square().sum(dim=1 - mlp.rank_axis(name))
            continue
        part = moments[mlp.site.block]
        read = ((basis @ part.input.double()) * basis).sum(dim=1)
        for name in mlp.site.first:
            energy += read * (part.sensitivity[name].double() @ mlp.projection(name)().double().square())
        energy += length * reduced_energy(mlp, part.activations) / part.output_energy
    return energy.reshape(-1, chunk).mean(dim=1).numpy()
