"""Importances of projections' entries: what removing an entry does to the output, where inputs are uncorrelated."""

import pytest
import torch
from factored_samples import make_group, tiny
from torch import Tensor

from fips_ort.layout import Pattern
from pipeline.compression.calibrate import Activations
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import factorize_group
from pipeline.compression.moments import MLPMoments, group_moments
from pipeline.compression.saliency import projection_importances
from pipeline.compression.sparsify import MaskSchedule
from pipeline.recipe.schema import Sparsifier


def white(tokens: int, width: int) -> Tensor:
    """Inputs [tokens, width] of exactly uncorrelated columns, of unequal magnitudes."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (torch.linalg.qr(x)[0] * tokens**0.5 * torch.logspace(-1, 0.5, width, dtype=torch.float64)).float()


def sample(kind: str = "dinov2_swiglu", *, masked: bool = True) -> tuple[list[FactorizedMLP], dict[int, MLPMoments]]:
    model = tiny(kind)
    group = make_group(model, 16)
    recorded = {}
    for site in group.sites:
        x = white(2048, 32)
        with torch.no_grad():
            recorded[site.block] = Activations(x.numpy(), model.get_submodule(site.path)(x).numpy())
    mlps, _ = factorize_group(model, group, calibration=None, masked=masked, seed=0)
    return mlps, group_moments(model, group, recorded)


def projections(mlps: list[FactorizedMLP]) -> list[tuple[FactorizedMLP, str]]:
    return [(mlp, name) for mlp in mlps for name in (*mlp.site.first, mlp.site.last)]


@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
def test_shapes_and_scale(kind: str) -> None:
    mlps, moments = sample(kind)
    importances = projection_importances(mlps, moments)
    pairs = projections(mlps)
    assert len(importances) == len(pairs)
    for (mlp, name), importance in zip(pairs, importances, strict=True):
        values = mlp.projection(name)().detach()
        expected = (16, mlp.site.hidden) if name == mlp.site.last else (1, 16)
        assert importance.shape == expected
        # Shares of the projection's energy: they add up to one.
        assert float((values * importance).square().sum()) == pytest.approx(1.0, rel=1e-4)
        assert float(importance.min()) >= 0


def test_entries_of_a_first_projection_count_by_what_they_multiply() -> None:
    mlps, moments = sample()
    importances = projection_importances(mlps, moments)
    x = white(2048, 32)
    for (mlp, name), importance in zip(projections(mlps), importances, strict=True):
        if name == mlp.site.last:
            continue
        assert mlp.basis is not None
        t = x @ mlp.basis().detach().T
        energies = t.square().mean(dim=0)
        ratio = importance[0].square() / energies
        torch.testing.assert_close(ratio, ratio.mean().expand(16), rtol=1e-3, atol=0.0)


def test_entries_of_the_last_projection_count_by_activation_and_basis_vector() -> None:
    mlps, moments = sample()
    importances = projection_importances(mlps, moments)
    for (mlp, name), importance in zip(projections(mlps), importances, strict=True):
        if name != mlp.site.last:
            continue
        assert mlp.basis is not None
        lengths = mlp.basis().detach().square().sum(dim=1)
        expected = lengths[:, None] * moments[mlp.site.block].hidden_energy[None, :]
        ratio = importance.square() / expected
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0.0)


def test_saliency_is_what_dropping_one_entry_costs() -> None:
    """The saliency of a last projection with independent activations is the squared change of the output, entry by
    entry."""
    mlps, moments = sample("vit")
    mlp = mlps[0]
    importance = projection_importances(mlps, moments)[len(mlp.site.first)]
    V = mlp.projection(mlp.site.last)().detach()
    assert mlp.basis is not None
    U = mlp.basis().detach()
    saliency = (V * importance).square()
    a = moments[mlp.site.block].hidden_energy.sqrt() * torch.randn(
        4096, mlp.site.hidden, generator=torch.Generator().manual_seed(1)
    )
    costs = []
    for row, column in ((0, 0), (3, 20), (15, 63)):
        change = a[:, column, None] * V[row, column] * U[row]
        costs.append(float(change.square().sum(dim=1).mean() / saliency[row, column]))
    assert costs == pytest.approx([costs[0]] * 3, rel=0.1)


def test_nothing_read_is_no_division_by_zero() -> None:
    mlps, moments = sample()
    with torch.no_grad():
        for mlp, name in projections(mlps):
            mlp.projection(name).weight.zero_()
    assert all(torch.isfinite(importance).all() for importance in projection_importances(mlps, moments))


def test_pruning_by_saliency_keeps_the_output_better_than_by_magnitude() -> None:
    x = white(2048, 32)
    errors = {}
    for saliency in ("magnitude", "activation"):
        mlps, moments = sample()
        with torch.no_grad():
            before = [mlp(x) for mlp in mlps]
        schedule = MaskSchedule(
            [mlp.projection(name) for mlp, name in projections(mlps)],
            Sparsifier(algorithm="static"),
            Pattern.parse("bitmap"),
            0.5,
            10,
            projection_importances(mlps, moments) if saliency == "activation" else None,
        )
        schedule.before_step(0)
        with torch.no_grad():
            errors[saliency] = sum(float((mlp(x) - y).square().mean()) for mlp, y in zip(mlps, before, strict=True))
        masks = [mlp.projection(name).mask for mlp, name in projections(mlps)]
        assert all(mask is not None and int(mask.sum()) == mask.numel() // 2 for mask in masks)
    assert errors["activation"] < 0.9 * errors["magnitude"]
