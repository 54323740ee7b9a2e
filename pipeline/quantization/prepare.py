"""The start of fake quantization of a group's factors: segments, layouts, scales and starting codes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from fips_ort.layout import Layout, Segments
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import empty_group, load_factors, named_factors
from pipeline.compression.moments import MLPMoments
from pipeline.quantization.group_start import prepare_with_gptq
from pipeline.quantization.segments import choose_segments, sort_rank_entries
from pipeline.recipe.plan import GroupPlan, basis_layout, projection_layout
from pipeline.recipe.schema import Recipe


def start_quantization(
    recipe: Recipe,
    group: GroupPlan,
    mlps: Sequence[FactorizedMLP],
    open_moments: Callable[[], Mapping[int, MLPMoments]],
) -> tuple[Segments, Segments]:
    """Choose the segments of (basis, projections) of a group, and start fake quantization of its factors in place.

    ``open_moments``: of the dense MLPs by block; called only where ``quantization.start`` needs them.
    """
    moments = open_moments() if recipe.quantization.start == "gptq" else None
    segments = choose_segments(recipe, group, mlps, moments)
    prepare_factors(recipe, group, mlps, segments, moments)
    return segments


def prepare_factors(
    recipe: Recipe,
    group: GroupPlan,
    mlps: Sequence[FactorizedMLP],
    segments: tuple[Segments, Segments],
    moments: Mapping[int, MLPMoments] | None = None,
) -> None:
    """Start fake quantization of every factor of a group, with ``segments`` of (basis, projections).

    Where bits are graded, the rank entries are sorted first: segments take them in the order of falling bits.
    ``moments``: of the dense MLPs by block; required by ``quantization.start: gptq``.
    """
    if group.has_basis and any(max(sizes) < group.rank for sizes in segments):
        sort_rank_entries(group, mlps, recipe.quantization.projections.block_size, moments)
    layouts = _layouts(recipe, group, mlps, segments)
    learned = recipe.quantization.learned_scales
    if recipe.quantization.start == "gptq":
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
    mlps = empty_group(model, group, masked=recipe.compression.is_masked)
    layouts = _layouts(recipe, group, mlps, segments)
    for name, factor in named_factors(mlps).items():
        factor.prepare_to_load(layouts[name], learned_scales=recipe.quantization.learned_scales)
    load_factors(mlps, path)
    return mlps


def _layouts(
    recipe: Recipe, group: GroupPlan, mlps: Sequence[FactorizedMLP], segments: tuple[Segments, Segments]
) -> dict[str, Layout]:
    """Layout of every factor of a group, by the names of :func:`pipeline.compression.factors.named_factors`."""
    layouts = {mlps[0].basis_name: basis_layout(recipe, group, segments[0])} if group.has_basis else {}
    for mlp in mlps:
        for name in mlp.site.linears:
            layouts[mlp.factor_name(name)] = projection_layout(recipe, group, mlp.site, name, segments[1])
    return layouts
