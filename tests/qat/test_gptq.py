"""GPTQ: its levels, its error against nearest levels, and its equality with the textbook form."""

import itertools

import pytest
import torch
from torch import Tensor

from fips_ort.layout import DENSE, PATTERNS, Layout, Pattern
from fips_ort.packed import dequantize
from pipeline.compression.sparsify import magnitude_masks
from qat.factor import Factor
from qat.fake_quantize import FakeQuantizer, search_scales
from qat.gptq import gptq

BLOCK = 32
STORABLE = [name for name in PATTERNS if name != "1:8"]
"""Patterns that have whole bytes of codes in a block."""
SEGMENTS = [(0, 128, 0, 0), (0, 0, 128, 0), (0, 0, 0, 128), (0, 64, 0, 64), (32, 0, 64, 32)]


def inputs(seed: int, columns: int = 128, tokens: int = 512) -> Tensor:
    """Correlated inputs whose columns differ in magnitude, float64 [tokens, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    hidden = torch.randn(tokens, columns // 4, generator=generator, dtype=torch.float64)
    return (hidden @ mixing + 0.5 * noise) * torch.logspace(-1, 1, columns, dtype=torch.float64)


def moment(seed: int, columns: int = 128) -> Tensor:
    x = inputs(seed, columns)
    return x.T @ x / x.shape[0]


def matrix(seed: int, rows: int = 128, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(100 + seed))


def mask_for(values: Tensor, name: str) -> Tensor | None:
    pattern = Pattern.parse(name)
    if pattern == DENSE:
        return None
    sparsity = 1 - pattern.keep / pattern.of if pattern.is_n_of_m else 0.6
    return magnitude_masks([values.abs()], sparsity, pattern, jointly=False)[0]


def damped(H: Tensor, damping: float = 0.01) -> Tensor:
    return H + damping * H.diagonal().mean() * torch.eye(H.shape[0], dtype=H.dtype)


def error(values: Tensor, weight: Tensor, H: Tensor) -> Tensor:
    """Error of each row: float64 [rows]."""
    E = (values - weight).double()
    return ((E @ H) * E).sum(dim=1)


def nearest(weight: Tensor, mask: Tensor | None, layout: Layout, scales: Tensor) -> Tensor:
    with torch.no_grad():
        values = FakeQuantizer(layout, scales, learned_scales=False)(weight)
    return values if mask is None else values * mask


@pytest.mark.parametrize("name", STORABLE)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("midrise", [False, True])
def test_values_are_levels_and_better_than_the_nearest(
    name: str, segments: tuple[int, int, int, int], axis: int, midrise: bool
) -> None:
    pattern = Pattern.parse(name)
    layout = Layout(128, 128, BLOCK, segments, axis, midrise, pattern)
    weight, H = matrix(0), moment(0)
    mask = mask_for(weight, name)
    weight = weight if mask is None else weight * mask
    values, scales = gptq(weight, H, layout, mask)
    assert torch.equal(scales, scales.half().float())
    assert torch.equal(nearest(values, mask, layout, scales), values)
    if mask is not None:
        assert torch.all(values[~mask] == 0)
    before = error(nearest(weight, mask, layout, search_scales(weight, mask, layout)), weight, H).sum()
    after = error(values, weight, H).sum()
    # Where only a quarter of the entries are kept, few are left to make up for the others.
    assert float(after) < (0.75 if pattern.is_n_of_m and pattern.of >= 4 * pattern.keep else 0.6) * float(before)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_textbook_form(bits: int, masked: bool, seed: int) -> None:
    """Optimal brain surgeon, column by column, with an explicit inverse that shrinks by elimination."""
    weight, H = matrix(seed, 16, 64), moment(seed, 64)
    mask = torch.rand(16, 64, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
    layout = Layout.uniform(16, 64, bits, 16, pattern=Pattern.parse("bitmap" if masked else "dense"))
    values, scales = gptq(weight, H, layout, mask, sweeps=0)
    blocks = H.diagonal().reshape(4, 16)
    order = [
        16 * block + column
        for block in blocks.mean(dim=1).argsort(descending=True).tolist()
        for column in blocks[block].argsort(descending=True).tolist()
    ]
    left = weight.double()
    inverse = torch.linalg.inv(damped(H))
    expected = torch.zeros_like(left)
    half = 2 ** (bits - 1)
    for column in order:
        scale = scales[:, column // 16].double()
        level = (left[:, column] / scale).round().clamp(-half, half - 1) * scale
        expected[:, column] = level if mask is None else level * mask[:, column]
        loss = (left[:, column] - expected[:, column]) / inverse[column, column]
        left = left - loss[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = torch.inf  # eliminated
        inverse = torch.nan_to_num(inverse, posinf=1.0)
    # Values that lie on the edge between two levels may fall to either side.
    assert float((values.double() != expected).double().mean()) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_inputs_without_correlation_leave_nothing_to_make_up(seed: int) -> None:
    weight = matrix(seed)
    layout = Layout.uniform(128, 128, 3, 32)
    H = torch.diag(torch.logspace(-2, 2, 128, dtype=torch.float64))
    values, scales = gptq(weight, H, layout)
    assert torch.equal(values, nearest(weight, None, layout, scales))
    # The scales follow the weighting of the columns.
    plain = nearest(weight, None, layout, search_scales(weight, None, layout))
    assert float(error(values, weight, H).sum()) < float(error(plain, weight, H).sum())


@pytest.mark.parametrize("name", ["dense", "bitmap"])
def test_sweeps_end_where_no_single_change_helps(name: str) -> None:
    weight, H = matrix(0, 8, 64), moment(0, 64)
    mask = mask_for(weight, name)
    weight = weight if mask is None else weight * mask
    layout = Layout.uniform(8, 64, 2, 16, midrise=True, pattern=Pattern.parse(name))
    errors = [error(gptq(weight, H, layout, mask, sweeps=count)[0], weight, damped(H)) for count in (0, 1, 2, 50)]
    for before, after in itertools.pairwise(errors):
        assert torch.all(after <= before * (1 + 1e-5))
    assert float(errors[-1].sum()) < float(errors[0].sum())
    values, scales = gptq(weight, H, layout, mask, sweeps=50)
    for column in range(64):
        for level in (-1.5, -0.5, 0.5, 1.5):
            other = values.clone()
            other[:, column] = level * scales[:, column // 16]
            if mask is not None:
                other = other * mask
            assert torch.all(error(other, weight, damped(H)) >= errors[-1] * (1 - 1e-5))


def test_what_masked_entries_had_is_made_up_for() -> None:
    weight, H = matrix(0), moment(0)
    mask = mask_for(weight, "2:4")
    assert mask is not None
    layout = Layout.uniform(128, 128, 8, 32, pattern=Pattern(2, 4))
    values, _ = gptq(weight, H, layout, mask)
    assert float(error(values, weight, H).sum()) < 0.5 * float(error(weight * mask, weight, H).sum())


def test_no_inputs_at_all() -> None:
    weight = matrix(0)
    layout = Layout.uniform(128, 128, 4, 32)
    values, scales = gptq(weight, torch.zeros(128, 128), layout)
    assert torch.equal(values, nearest(weight, None, layout, scales))
    assert torch.equal(scales, search_scales(weight, None, layout).half().float())


def test_what_does_not_fit_is_refused() -> None:
    layout = Layout.uniform(128, 128, 4, 32)
    with pytest.raises(ValueError, match=r"weight \(64, 128\) and moment \(128, 128\) do not fit layout \(128, 128\)"):
        gptq(matrix(0, 64), moment(0), layout)
    with pytest.raises(ValueError, match=r"moment \(64, 64\)"):
        gptq(matrix(0), moment(0, 64), layout)
    with pytest.raises(ValueError, match=r"mask \(128, 64\)"):
        gptq(matrix(0), moment(0), layout, torch.ones(128, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(matrix(0), -moment(0), layout)
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(matrix(0), torch.full((128, 128), torch.nan), layout)


# --- factors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORABLE)
@pytest.mark.parametrize("midrise", [False, True])
def test_factors_start_from_the_levels_and_can_be_trained(name: str, midrise: bool) -> None:
    weight, H = matrix(0) * torch.logspace(-3, 2, 128)[:, None], moment(0)
    mask = mask_for(weight / weight.norm(dim=1, keepdim=True), name)
    layout = Layout(128, 128, 32, (0, 0, 64, 64), 0, midrise, Pattern.parse(name))
    factor = Factor(weight, mask)
    before = factor().detach()
    factor.prepare(layout, learned_scales=True, moment=H)
    values, scales = gptq(before, H, layout, mask)
    assert factor.quantizer is not None
    assert torch.equal(factor(), values)
    assert torch.equal(factor.quantizer.scale(), scales)
    # What is trained stays where it was, if that is near enough to its level.
    inside = (before - values).abs() < 0.24 * scales.repeat_interleave(32, dim=1)
    assert inside.float().mean() > 0.1
    torch.testing.assert_close((factor.weight * factor.gain)[inside], before[inside], rtol=1e-5, atol=0)
    assert torch.equal(torch.from_numpy(dequantize(factor.freeze())), values)
    error(factor() / factor.gain, matrix(1), H).sum().backward()
    for parameter in factor.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0


def test_factors_to_be_loaded_need_no_search() -> None:
    layout = Layout.uniform(128, 128, 3, 32, midrise=True)
    trained = Factor(matrix(0))
    trained.prepare(layout, learned_scales=True, moment=moment(0))
    loaded = Factor(torch.zeros(128, 128))
    loaded.prepare_to_load(layout, learned_scales=True)
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded(), trained())
