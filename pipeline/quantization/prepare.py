"""The start of fake quantization of a group's factors, and their end: integer codes in a packed model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from exporters.packed_model import PackedLinear, PackedMLP, PackedModel
from fips_ort.layout import Layout
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import empty_group, load_factors, named_factors
from pipeline.compression.moments import MLPMoments
from pipeline.quantization.group_start import prepare_with_gptq
from pipeline.quantization.segments import sort_rank_entries
from pipeline.recipe.plan import GroupPlan, Segments, basis_layout, projection_layout
from pipeline.recipe.schema import Recipe
from qat.factor import Factor


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
