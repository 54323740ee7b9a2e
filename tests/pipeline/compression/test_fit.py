"""Local error minimisation lowers the error, on tokens that depend on seed and step only."""

import copy
from pathlib import Path

import pytest
import torch
from factored_samples import ALGORITHMS, make_group, n_of_m, planned, recipe, save_inputs, sparsifier, targets, tiny
from torch import nn

from fips_ort.layout import Pattern
from pipeline.compression.factors import factorize_group, named_factors
from pipeline.compression.fit import (
    GroupModule,
    LocalTarget,
    local_loss,
    local_targets,
    reconstruction_errors,
    relative_error,
)
from pipeline.compression.sparsify import MaskSchedule
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import train
from pipeline.recipe.schema import Recipe


def schedule_of(wanted: Recipe, mlps: list, steps: int) -> MaskSchedule:
    compression = wanted.compression
    projections = [projection for mlp in mlps for projection in mlp.projections.values()]
    pattern = Pattern.parse(compression.pattern)
    return MaskSchedule(projections, compression.sparsifier, pattern, compression.target_sparsity, steps)


def fit(wanted: Recipe, kind: str, seed: int, steps: int) -> tuple[dict[int, float], dict[int, float]]:
    """Errors per block after static pruning alone, and after the fit."""
    model, _, mlps = planned(wanted, kind, seed)
    goals = targets(model, mlps, seed)
    if wanted.compression.pattern != "dense":
        static = wanted.model_copy(
            update={
                "compression": wanted.compression.model_copy(
                    update={"sparsifier": wanted.compression.sparsifier.model_copy(update={"algorithm": "static"})}
                )
            }
        )
        twins = copy.deepcopy(nn.ModuleList(mlps))
        schedule_of(static, list(twins), 1).before_step(0)
        start = [LocalTarget(twin, goal.activations, None) for twin, goal in zip(twins, goals, strict=True)]
    else:
        start = goals
    before = reconstruction_errors(start, 256, 0)
    schedule = schedule_of(wanted, mlps, steps) if wanted.compression.pattern != "dense" else None
    train(
        GroupModule(mlps),
        local_loss(goals, 128, seed),
        steps=steps,
        learning_rate=0.02,
        weight_decay=0.0,
        progress=Progress(),
        label="fit",
        before_step=schedule.before_step if schedule else None,
        after_backward=schedule.after_backward if schedule else None,
    )
    return before, reconstruction_errors(goals, 256, 0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fit_improves_on_static_pruning(algorithm: str, kind: str, seed: int) -> None:
    options = {"compression__sparsifier": sparsifier(algorithm, update_every=5)}
    wanted = recipe(**options, quantization__projections__block_size=16)
    before, after = fit(wanted, kind, seed, 60)
    assert before.keys() == after.keys() == {0, 1}
    for block in before:
        assert after[block] < 0.7 * before[block]


@pytest.mark.parametrize("pattern", ["dense", "1:4", "2:4"])
def test_fit_improves_with_every_pattern(pattern: str) -> None:
    options = {} if pattern == "dense" else {"compression__sparsifier": {"update_every": 5}}
    before, after = fit(n_of_m(pattern, **options), "vit", 0, 60)
    for block in before:
        assert after[block] < 0.75 * before[block]


def test_masks_survive_the_fit() -> None:
    wanted = n_of_m("1:4", compression__sparsifier={"update_every": 5})
    model, _, mlps = planned(wanted)
    schedule = schedule_of(wanted, mlps, 12)
    train(
        GroupModule(mlps), local_loss(targets(model, mlps), 32, 0), steps=12, learning_rate=0.01, weight_decay=0.1,
        progress=Progress(), label="fit", before_step=schedule.before_step, after_backward=schedule.after_backward,
    )
    for mlp in mlps:
        for projection in mlp.projections.values():
            groups = (projection() != 0).reshape(-1, 4).sum(dim=1)
            assert torch.equal(groups, torch.ones_like(groups))
        assert mlp.basis.mask is None


def test_rigl_may_update_at_the_last_step() -> None:
    """Nothing of the sparsifier is left in the factors' way once training is over."""
    wanted = recipe(compression__sparsifier={"algorithm": "rigl", "update_every": 1, "end": 0.99})
    before, after = fit(wanted, "vit", 0, 10)
    assert sum(after.values()) < sum(before.values())


def test_relative_error_by_hand() -> None:
    _, _, mlps = planned(recipe())
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = mlps[0](x)
        plain = relative_error(LocalTarget(mlps[0], None, None), x, 2 * y)  # type: ignore[arg-type]
        assert float(plain) == pytest.approx(0.25, rel=1e-5)
        dense = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
        scaled = relative_error(LocalTarget(mlps[0], None, scale), x, dense)  # type: ignore[arg-type]
        expected = (((y - dense) * scale) ** 2).mean() / ((dense * scale) ** 2).mean()
        assert float(scaled) == pytest.approx(float(expected), rel=1e-5)


def test_loss_depends_on_step_and_seed_only() -> None:
    model, _, mlps = planned(recipe(), seed=0)
    with torch.no_grad():
        mlps[0].basis.weight.add_(0.1)
    goals = targets(model, mlps)
    loss = local_loss(goals, 16, 3)
    values = [float(loss(step).detach()) for step in (0, 1, 2)]
    assert len(set(values)) == 3
    torch.manual_seed(99)
    torch.randn(5)
    assert [float(local_loss(goals, 16, 3)(step).detach()) for step in (2, 1, 0)] == values[::-1]
    assert float(local_loss(goals, 16, 4)(0).detach()) not in values
    assert float(loss(0).detach()) == values[0]


def test_loss_is_the_mean_over_the_group() -> None:
    model, _, mlps = planned(recipe())
    goals = targets(model, mlps, tokens=1)
    with torch.no_grad():
        mlps[0].basis.weight.add_(0.1)
    expected = [relative_error(goal, *goal.activations.sample(1, torch.Generator())) for goal in goals]
    assert float(local_loss(goals, 1, 0)(0).detach()) == pytest.approx(float(sum(expected).detach()) / 2, rel=1e-5)


def test_recorded_targets_carry_the_layer_scale(tmp_path: Path) -> None:
    model = tiny("dinov2")
    group = make_group(model, 16)
    mlps, _ = factorize_group(model, group, calibration=None, masked=False, seed=0)
    inputs = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    save_inputs(tmp_path, model, group, inputs)
    for index, target in enumerate(local_targets(model, mlps, tmp_path)):
        assert target.mlp is mlps[index]
        assert torch.equal(target.output_scale, torch.full((32,), 0.5))
        assert torch.equal(torch.tensor(target.activations.inputs), inputs)
    vit = tiny("vit")
    group = make_group(vit, 16)
    mlps, _ = factorize_group(vit, group, calibration=None, masked=False, seed=0)
    save_inputs(tmp_path, vit, group, inputs)
    assert all(target.output_scale is None for target in local_targets(vit, mlps, tmp_path))


def test_group_trains_each_factor_once() -> None:
    _, group, mlps = planned(recipe())
    parameters = [parameter for parameter in GroupModule(mlps).parameters() if parameter.requires_grad]
    assert len(parameters) == len(named_factors(mlps)) == 5
    assert sum(p.numel() for p in parameters) == group.rank * (group.width + group.columns)
