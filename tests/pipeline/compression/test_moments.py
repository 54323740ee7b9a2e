"""Second moments of MLPs from recorded activations, against direct computation and finite differences."""

import pytest
import torch
from factored_samples import make_group, tiny
from torch import nn

from pipeline.compression.calibrate import Activations
from pipeline.compression.factorized_mlp import original_mlp
from pipeline.compression.factors import factorize_group
from pipeline.compression.moments import ENERGY_TOKENS, group_moments, hidden_moments, mlp_moments, reduced_energy
from pipeline.recipe.plan import MLPSite


def recorded(model: nn.Module, site: MLPSite, tokens: int = 3000) -> tuple[torch.Tensor, torch.Tensor, Activations]:
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 0.5, 32)
    with torch.no_grad():
        y = model.get_submodule(site.path)(x)
    return x, y, Activations(x.numpy(), y.numpy())


def hidden_of(model: nn.Module, site: MLPSite, x: torch.Tensor) -> torch.Tensor:
    """What the last linear reads, seen by a hook."""
    seen = []
    handle = model.get_submodule(f"{site.path}.{site.last}").register_forward_hook(lambda _, a, __: seen.append(a[0]))
    with torch.no_grad():
        model.get_submodule(site.path)(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
def test_moments_are_means_over_tokens(kind: str) -> None:
    model = tiny(kind)
    group = make_group(model, 16)
    site = group.sites[1]
    x, y, activations = recorded(model, site)
    moments = group_moments(model, group, {member.block: activations for member in group.sites})[site.block]
    mlp = model.get_submodule(site.path)
    y = y - mlp.get_parameter(f"{site.last}.bias").detach()
    torch.testing.assert_close(moments.input, x.T @ x / 3000, rtol=1e-4, atol=1e-5)
    energy = float(y.square().sum(dim=1).mean())
    assert moments.output_energy == pytest.approx(energy, rel=1e-4)
    torch.testing.assert_close(moments.output, y.T @ y / 3000 / energy, rtol=1e-3, atol=1e-6)
    assert float(moments.output.trace()) == pytest.approx(1.0, rel=1e-5)
    a = hidden_of(model, site, x)
    torch.testing.assert_close(moments.hidden_energy, a.square().mean(dim=0), rtol=1e-3, atol=1e-5)
    hidden, cross = hidden_moments(original_mlp(mlp, site, "group"), activations)
    torch.testing.assert_close(hidden, a.T @ a / 3000, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cross, y.T @ a / 3000, rtol=1e-3, atol=1e-3)
    # The last matrix is the best map from what it reads to what it writes.
    weight = mlp.get_parameter(f"{site.last}.weight").detach()
    torch.testing.assert_close(weight @ hidden, cross, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
def test_sensitivity_is_what_small_errors_do(kind: str) -> None:
    model = tiny(kind)
    site = make_group(model, 16).sites[0]
    x, y, activations = recorded(model, site)
    original = original_mlp(model.get_submodule(site.path), site, "group")
    moments = mlp_moments(original, activations)
    for position, name in enumerate(site.first):
        for neuron in (0, 7, 31):
            with torch.no_grad():
                before = original.pre_activations(x)
                before[position][:, neuron] += 1e-2
                changed = original.activate(before) @ original.projection(site.last)().T + original.bias(site.last)
            effect = float((changed - y).square().sum(dim=1).mean()) / 1e-4 / moments.output_energy
            assert float(moments.sensitivity[name][neuron]) == pytest.approx(effect, rel=0.05)


def test_projections_are_measured_at_their_own_activations() -> None:
    model = tiny("vit")
    group = make_group(model, 16)
    x, y, activations = recorded(model, group.sites[0])
    mlps, _ = factorize_group(model, group, calibration=None, masked=False, seed=0)
    mlp = mlps[0]
    with torch.no_grad():
        a = mlp.activate(mlp.pre_activations(x))
        expected = (a @ mlp.projection("fc2")().T).double().square().mean(dim=0)
    torch.testing.assert_close(reduced_energy(mlp, activations), expected, rtol=1e-4, atol=0)
    hidden, cross = hidden_moments(mlp, activations)
    torch.testing.assert_close(hidden, a.T @ a / 3000, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cross, (y - mlp.bias("fc2")).T @ a / 3000, rtol=1e-3, atol=1e-3)


def test_many_tokens_are_thinned_evenly() -> None:
    model = tiny("vit")
    site = make_group(model, 16).sites[0]
    tokens = 2 * ENERGY_TOKENS
    x, _, activations = recorded(model, site, tokens)
    moments = mlp_moments(original_mlp(model.get_submodule(site.path), site, "group"), activations)
    expected = hidden_of(model, site, x[::2]).square().mean(dim=0)
    torch.testing.assert_close(moments.hidden_energy, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(moments.input, x.T @ x / tokens, rtol=1e-3, atol=1e-5)


def test_an_mlp_that_writes_nothing_has_finite_moments() -> None:
    model = tiny("vit")
    site = make_group(model, 16).sites[0]
    with torch.no_grad():
        model.get_parameter(f"{site.path}.fc2.weight").zero_()
    _, _, activations = recorded(model, site)
    moments = mlp_moments(original_mlp(model.get_submodule(site.path), site, "group"), activations)
    assert moments.output_energy == 1.0
    assert torch.equal(moments.output, torch.zeros(32, 32))
    assert torch.equal(moments.sensitivity["fc1"], torch.zeros(site.hidden))
