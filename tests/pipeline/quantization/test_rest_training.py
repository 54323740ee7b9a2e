"""Training outside the MLPs: what moves, what stays, and that what is stored computes what was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lm_samples import tiny_language_model
from rest_samples import with_packed_linears, with_packed_tables
from torch import Tensor, nn

from exporters.modules import PackedLayer
from fips_ort.packed import dequantize
from pipeline.compression.factorized_mlp import FactorizedMLP, original_mlp
from pipeline.compression.factors import install
from pipeline.models.adapters import find_mlps
from pipeline.quantization.rest_training import (
    TrainableRest,
    TrainedScales,
    make_rest_trainable,
    open_trained_rest,
    save_rest,
)

ARCHITECTURES = ("gemma3", "llama", "qwen2")  # norms around one, an output layer of its own, a tied one
TOKENS = torch.arange(3, 27).view(2, 12)


def stored_model(architecture: str) -> tuple[Any, list[FactorizedMLP]]:
    """A model with packed linear layers and table, and its own MLPs in the form that is trained."""
    model = tiny_language_model(architecture)
    sites = find_mlps(model)
    mlps = [original_mlp(model.get_submodule(site.path), site, "group_0") for site in sites]
    skip = [f"{site.path}.{name}" for site in sites for name in (*site.first, site.last)]
    return with_packed_tables(with_packed_linears(model, 4, 16, skip), 4, 16), mlps


def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def prepare(architecture: str) -> tuple[Any, Any, Sequence[FactorizedMLP], TrainableRest]:
    base, mlps = stored_model(architecture)
    model = install(base, mlps)
    return base, model, mlps, make_rest_trainable(model, mlps)


def disturb(rest: TrainableRest) -> None:
    """Move all parameters as training would, each entry by something else."""
    with torch.no_grad():
        for position, parameter in enumerate(rest.parameters()):
            generator = torch.Generator().manual_seed(position)
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_starts_from_what_is_stored(architecture: str) -> None:
    base, model, mlps, _ = prepare(architecture)
    expected = logits(install(base, mlps))
    assert float((logits(model) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_stored_computes_what_was_trained(architecture: str, tmp_path: Path) -> None:
    base, model, mlps, rest = prepare(architecture)
    before = logits(install(base, mlps)).detach()
    disturb(rest)
    trained = logits(model).detach()
    assert float((trained - before).abs().max()) > 1e-2 * float(before.abs().max())
    save_rest(rest, tmp_path / "rest.safetensors")
    for float16, tolerance in ((False, 1e-5), (True, 5e-3)):
        opened = open_trained_rest(base, tmp_path / "rest.safetensors", float16=float16)
        actual = logits(install(opened, mlps))
        assert float((actual - trained).abs().max()) <= tolerance * float(trained.abs().max())
    # Nothing that other forms of the model share has moved.
    assert torch.equal(logits(install(base, mlps)), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scales_move_and_codes_stay(architecture: str, tmp_path: Path) -> None:
    base, _, _, rest = prepare(architecture)
    disturb(rest)
    save_rest(rest, tmp_path / "rest.safetensors")
    opened = open_trained_rest(base, tmp_path / "rest.safetensors", float16=True)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, PackedLayer)}
    assert layers
    assert len(rest.layers) == len(layers)
    for name, layer in layers.items():
        after = opened.get_submodule(name)
        assert isinstance(after, PackedLayer)
        assert torch.equal(after.codes, layer.codes)
        assert not torch.equal(after.scales, layer.scales)
        assert torch.equal(after.values, torch.from_numpy(dequantize(after.stored)))
        assert (after.name, after.training) == (layer.name, layer.training)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_vector_outside_the_mlps_is_trained(architecture: str) -> None:
    base, _, mlps, rest = prepare(architecture)
    inside = [f"{mlp.site.path}." for mlp in mlps]
    expected = [
        parameter
        for name, parameter in base.named_parameters()
        if parameter.dim() == 1 and not name.startswith(tuple(inside))
    ]
    assert sorted(p.numel() for p in rest.vectors) == sorted(p.numel() for p in expected)
    # In units of their size: a step of the learning rate is the same part of each.
    for parameter in rest.vectors:
        assert float(parameter.detach().square().mean()) == pytest.approx(1.0, rel=1e-4)


def test_gradient_of_scales() -> None:
    """The gradient of a sum of outputs has a closed form: scale times the levels' products with the inputs, block by
    block."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(32, 5, bias=True)
    layer = with_packed_linears(nn.Sequential(linear), 4, 16)[0]  # type: ignore[index]
    assert isinstance(layer, PackedLayer)
    trained = TrainedScales(layer)
    x, weights = torch.randn(7, 32, generator=generator), torch.randn(7, 5, generator=generator)
    torch.testing.assert_close(trained(x), layer(x))
    (trained(x) * weights).sum().backward()
    expected = torch.einsum("tn,tbk,nbk->nb", weights, x.view(7, 2, 16), layer.values.view(5, 2, 16))
    torch.testing.assert_close(trained.log_gain.grad, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_vector_of_zeros_can_move(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    rest = make_rest_trainable(model, [])
    assert [parameter.numel() for parameter in rest.vectors] == [8, 8]
    disturb(rest)
    save_rest(rest, tmp_path / "rest.safetensors")
    original = nn.Sequential(nn.LayerNorm(8))
    opened = open_trained_rest(original, tmp_path / "rest.safetensors", float16=False)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(opened(x), model(x))
    assert float(opened[0].bias.detach().abs().max()) > 0.01  # type: ignore[index,union-attr,operator]
    assert torch.equal(original[0].bias, torch.zeros(8))  # type: ignore[arg-type]
