"""Models that were pruned: blocks, matrices, neurons and inputs of zeros give finite results, and zeros stay zeros."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factored_samples import n_of_m, recipe, sparsifier, tiny
from torch import Tensor, nn

from pipeline.compression.calibrate import activation_files
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import initial_factors, named_factors
from pipeline.compression.fit import GroupModule, local_loss, local_targets, reconstruction_errors
from pipeline.compression.moments import open_moments
from pipeline.compression.sparsify import mask_schedule
from pipeline.models.adapters import find_mlps
from pipeline.plumbing.files import create_array
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import train
from pipeline.quantization.freeze import freeze
from pipeline.quantization.prepare import start_quantization
from pipeline.recipe.plan import MLPSite, make_plan
from pipeline.recipe.schema import Recipe

Prune = Callable[[nn.Module, MLPSite], None]


def _parameters(mlp: nn.Module, site: MLPSite) -> list[nn.Parameter]:
    return [parameter for name in site.linears for parameter in mlp.get_submodule(name).parameters()]


def whole(mlp: nn.Module, site: MLPSite) -> None:
    for parameter in _parameters(mlp, site):
        parameter.zero_()


def last(mlp: nn.Module, site: MLPSite) -> None:
    for parameter in mlp.get_submodule(site.last).parameters():
        parameter.zero_()


def last_without_bias(mlp: nn.Module, site: MLPSite) -> None:
    mlp.get_parameter(f"{site.last}.weight").zero_()


def first(mlp: nn.Module, site: MLPSite) -> None:
    for name in site.first:
        for parameter in mlp.get_submodule(name).parameters():
            parameter.zero_()


def neurons(mlp: nn.Module, site: MLPSite) -> None:
    for name in site.first:
        for parameter in mlp.get_submodule(name).parameters():
            parameter[:5] = 0
    mlp.get_parameter(f"{site.last}.weight")[:, :5] = 0


def features(mlp: nn.Module, site: MLPSite) -> None:
    """One feature of the model that the MLP neither reads nor writes."""
    for name in site.first:
        mlp.get_parameter(f"{name}.weight")[:, 3] = 0
    for parameter in mlp.get_submodule(site.last).parameters():
        parameter[3] = 0


def twins(mlp: nn.Module, site: MLPSite) -> None:
    """Neurons that are all the same."""
    for name in site.first:
        for parameter in mlp.get_submodule(name).parameters():
            parameter[:] = parameter[:1].clone()
    weight = mlp.get_parameter(f"{site.last}.weight")
    weight[:] = weight[:, :1].clone()


PRUNED: dict[str, Prune] = {
    function.__name__: function for function in (whole, last, last_without_bias, first, neurons, features, twins)
}
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "zero": torch.zeros_like,
    "constant": lambda x: x[:1].expand_as(x).clone(),
    "one alive": lambda x: x * (torch.arange(x.shape[1]) == 1),
}


def calibrate(folder: Path, model: nn.Module, sites: list[MLPSite], inputs: Tensor) -> None:
    for site in sites:
        read, written = (create_array(path, tuple(inputs.shape)) for path in activation_files(folder, site))
        read[:] = inputs.numpy()
        written[:] = model.get_submodule(site.path)(inputs).numpy()
        read.flush()
        written.flush()


def compress(
    wanted: Recipe, model: nn.Module, folder: Path, steps: int = 3
) -> tuple[list[FactorizedMLP], list[float]]:
    """The way of a run's first group from its dense MLPs to codes, and every loss on it."""
    group = make_plan(wanted, find_mlps(model)).groups[0]
    mlps, singular = initial_factors(wanted, model, group, folder)
    goals = local_targets(model, mlps, folder)
    module, losses = GroupModule(mlps), [float(singular.sum())]
    loss = local_loss(goals, 64, wanted.seed)

    def counted(step: int) -> Tensor:
        value = loss(step)
        losses.append(float(value.detach()))
        return value

    def fit() -> None:
        train(module, counted, steps=steps, learning_rate=0.02, weight_decay=0.0, progress=Progress(), label="fit",
              **hooks)

    hooks: dict[str, Any] = {}
    if wanted.compression.is_masked:
        moments = open_moments(model, group, folder)
        schedule = mask_schedule(mlps, wanted.compression, steps, moments)
        hooks = {"before_step": schedule.before_step, "after_backward": schedule.after_backward}
    fit()
    start_quantization(wanted, group, mlps, lambda: open_moments(model, group, folder))
    hooks = {}
    fit()
    losses += reconstruction_errors(goals, 64, 0).values()
    freeze(mlps)  # asserts that codes stand for the fake-quantized values
    return mlps, losses


RECIPES = [
    {"initialization": initialization, "start": start, "levels": levels, "algorithm": algorithm}
    for (initialization, start), (levels, algorithm) in zip(
        itertools.product(("svd", "activation_svd", "output_aware"), ("nearest", "gptq")),
        itertools.cycle((("midrise", "rigl"), ("midtread", "gmp"), ("midrise", "static"))),
        strict=False,
    )
]


def pruned_recipe(initialization: str, start: str, levels: str, algorithm: str, groups: int = 2) -> Recipe:
    return recipe(
        compression__groups=groups,
        compression__initialization=initialization,
        compression__sparsifier=sparsifier(algorithm, saliency="activation", update_every=2),
        quantization__start=start,
        quantization__basis__levels=levels,
        quantization__projections__levels=levels,
        quantization__learned_scales=True,
        quantization__training=[{"objective": "local", "steps": 1}],
    )


def assert_finite(mlps: list[FactorizedMLP], losses: list[float]) -> None:
    assert all(torch.isfinite(torch.tensor(losses))), losses
    for name, factor in named_factors(mlps).items():
        assert torch.all(torch.isfinite(factor())), name


@pytest.mark.parametrize("settings", RECIPES, ids=lambda settings: "-".join(settings.values()))
@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
@torch.no_grad()
def test_pruned_blocks_beside_one_that_is_not(kind: str, settings: dict[str, str], tmp_path: Path) -> None:
    model = tiny(kind, layers=len(PRUNED) + 1)
    sites = find_mlps(model)
    for site, prune in zip(sites, PRUNED.values(), strict=False):
        prune(model.get_submodule(site.path), site)
    inputs = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
    calibrate(tmp_path, model, sites, inputs)
    with torch.enable_grad():
        mlps, losses = compress(pruned_recipe(**settings, groups=len(sites)), model, tmp_path)
    assert_finite(mlps, losses)
    by_name = dict(zip(PRUNED, mlps, strict=False))
    for name in ("whole", "last"):
        assert torch.equal(by_name[name](inputs), torch.zeros_like(inputs))
    for name in ("whole", "last", "last_without_bias"):
        assert not by_name[name].projection(sites[0].last)().any()
    for name in ("whole", "first"):
        assert not any(by_name[name].projection(linear)().any() for linear in sites[0].first)
    dead = by_name["neurons"]
    assert not any(dead.projection(name)()[:5].any() for name in sites[0].first)
    assert not dead.projection(sites[0].last)()[:, :5].any()
    assert mlps[-1](inputs).any()


@pytest.mark.parametrize("settings", RECIPES, ids=lambda settings: "-".join(settings.values()))
@torch.no_grad()
def test_a_whole_group(settings: dict[str, str], tmp_path: Path) -> None:
    model = tiny("dinov2_swiglu")
    sites = find_mlps(model)
    for site in sites:
        whole(model.get_submodule(site.path), site)
    inputs = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
    calibrate(tmp_path, model, sites, inputs)
    with torch.enable_grad():
        mlps, losses = compress(pruned_recipe(**settings), model, tmp_path)
    assert_finite(mlps, losses)
    assert losses[1:] == [0.0] * len(losses[1:])
    assert all(torch.equal(mlp(inputs), torch.zeros_like(inputs)) for mlp in mlps)


@pytest.mark.parametrize("settings", RECIPES, ids=lambda settings: "-".join(settings.values()))
@pytest.mark.parametrize("read", INPUTS)
@torch.no_grad()
def test_inputs_without_energy(read: str, settings: dict[str, str], tmp_path: Path) -> None:
    model = tiny("dinov2_swiglu")
    inputs = INPUTS[read](torch.randn(96, 32, generator=torch.Generator().manual_seed(1)))
    calibrate(tmp_path, model, find_mlps(model), inputs)
    with torch.enable_grad():
        mlps, losses = compress(pruned_recipe(**settings), model, tmp_path)
    assert_finite(mlps, losses)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "dense"])
@torch.no_grad()
def test_every_pattern(pattern: str, tmp_path: Path) -> None:
    model = tiny("dinov2_swiglu")
    sites = find_mlps(model)
    whole(model.get_submodule(sites[1].path), sites[1])
    inputs = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
    calibrate(tmp_path, model, sites, inputs)
    with torch.enable_grad():
        mlps, losses = compress(n_of_m(pattern, quantization__projections__levels="midrise"), model, tmp_path)
    assert_finite(mlps, losses)
    assert torch.equal(mlps[1](inputs), torch.zeros_like(inputs))
