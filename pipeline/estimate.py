"""``fips plan``: what a run will make and need, from the model's configuration alone; no weight is computed."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from pipeline.errors import InputError
from pipeline.models.adapters import find_mlps
from pipeline.models.loading import load_config, model_class
from pipeline.plan import GroupPlan, GroupSize, Plan, group_size, make_plan, scheme_segments
from pipeline.recipe import ImageFolderData, Recipe


@dataclass(frozen=True)
class Estimate:
    """Bytes and parameters of a run to be. ``sizes``: per group; those left to allocation are at their target."""

    plan: Plan
    parameters: int
    mlp_parameters: int
    sizes: dict[str, GroupSize]
    rest_bytes: int
    activation_bytes_per_image: int
    factor_bytes: int

    @property
    def mlp_bytes(self) -> int:
        return sum(size.stored for size in self.sizes.values())

    @property
    def artifact_bytes(self) -> int:
        """Weights only; graph, manifest and native library add about half a megabyte."""
        return self.mlp_bytes + self.rest_bytes


def estimate(recipe: Recipe) -> Estimate:
    """Plan a run. Raises InputError for whatever :func:`pipeline.plan.make_plan` refuses, and missing inputs."""
    _check_inputs(recipe)
    config = load_config(recipe.model, labels=10)
    with torch.device("meta"):
        model = model_class().from_config(config)
    plan = make_plan(recipe, find_mlps(model))
    sizes = {group.name: _group_size(recipe, group) for group in plan.groups}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    compressed = sum(group.dense_parameters for group in plan.groups)
    return Estimate(
        plan,
        parameters,
        compressed,
        sizes,
        _rest_bytes(recipe, model, plan, parameters - compressed),
        _activation_bytes(plan, model, config),
        # Weight, gradient and AdamW's two moments of the largest group, and its basis and projections.
        max(16 * group.rank * (group.width + group.columns) for group in plan.groups),
    )


def _check_inputs(recipe: Recipe) -> None:
    data = recipe.data
    if isinstance(data, ImageFolderData):
        for name in (data.train, data.test):
            if not (Path(data.path) / name).is_dir():
                raise InputError(f"data.path: {Path(data.path) / name}: no such folder; expected LABEL/image.* in it")


def _group_size(recipe: Recipe, group: GroupPlan) -> GroupSize:
    chunk = recipe.quantization.projections.block_size
    two_bits = (0, 0, 0, group.rank)
    schemes = (recipe.quantization.basis, recipe.quantization.projections)
    basis, projections = (scheme_segments(scheme, group, chunk) or two_bits for scheme in schemes)
    return group_size(recipe, group, basis, projections)


def _rest_bytes(recipe: Recipe, model: nn.Module, plan: Plan, parameters: int) -> int:
    rest = recipe.quantization.rest
    bytes_each = 2 if rest.weights == "float16" else 4
    if rest.linear_bits is None:
        return parameters * bytes_each
    compressed = tuple(f"{site.path}." for group in plan.groups for site in group.sites)
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "classifier" and not name.startswith(compressed)
    )
    return (parameters - linear) * bytes_each + linear * rest.linear_bits // 8 + 4 * linear // rest.block_size


def _activation_bytes(plan: Plan, model: nn.Module, config: AutoConfig) -> int:
    """Bytes of recorded inputs and outputs per calibration image: a dry run on the meta device counts tokens."""
    counted = 0

    def count(_module: nn.Module, arguments: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * 4 * arguments[0].numel()

    for group in plan.groups:
        for site in group.sites:
            model.get_submodule(site.path).register_forward_hook(count)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    with torch.inference_mode():
        model.eval()(pixel_values=torch.empty(1, 3, height, width, device="meta"))
    return counted
