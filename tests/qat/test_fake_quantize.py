"""Fake quantization agrees with an independent rounding, and its scales can be searched and learned."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fips_ort.layout import BIT_WIDTHS, Layout
from qat.fake_quantize import SMALLEST_SCALE, FakeQuantizer, search_scales

SEGMENTS = {
    "8": (64, 0, 0, 0),
    "4": (0, 64, 0, 0),
    "3": (0, 0, 64, 0),
    "2": (0, 0, 0, 64),
    "8/2": (16, 0, 0, 48),
    "4/3/2": (0, 16, 16, 32),
    "8/4/3/2": (16, 16, 16, 16),
}


def layout_of(name: str, axis: int, midrise: bool, block_size: int = 16) -> Layout:
    shape = (24, 64) if axis else (64, 48)
    return Layout(*shape, block_size, SEGMENTS[name], axis, midrise)


def weight_of(layout: Layout, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-2, 2, layout.rows)[:, None]
    return torch.randn(layout.rows, layout.columns, generator=generator) * rows


def bits_of(layout: Layout) -> NDArray[np.int64]:
    """Bit-width of every entry, from the definition of the segments."""
    along = np.repeat(BIT_WIDTHS, layout.segments)
    return np.broadcast_to(along[None, :] if layout.segment_axis else along[:, None], (layout.rows, layout.columns))


def rounded(weight: Tensor, scale: Tensor, layout: Layout) -> tuple[NDArray, NDArray]:
    """(values float64, distance of each entry from the nearest rounding boundary in units of the scale)."""
    bits = bits_of(layout)
    scales = np.repeat(scale.detach().double().numpy(), layout.block_size, axis=1)
    half = 0.5 if layout.midrise else 0.0
    ratio = weight.double().numpy() / np.where(scales == 0, 1.0, scales) - half
    levels = np.clip(np.rint(ratio), -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    return (levels + half) * scales, np.abs(ratio - np.floor(ratio) - 0.5)


CASES = list(itertools.product(SEGMENTS, (0, 1), (False, True)))


@pytest.mark.parametrize(("name", "axis", "midrise"), CASES)
def test_agrees_with_numpy(name: str, axis: int, midrise: bool) -> None:
    for seed, block_size in itertools.product(range(3), (8, 16)):
        layout = layout_of(name, axis, midrise, block_size)
        weight = weight_of(layout, seed)
        scale = weight.reshape(layout.rows, -1, block_size).abs().amax(dim=2) * (0.13 + 0.11 * seed)
        quantizer = FakeQuantizer(layout, scale, learned_scales=False)
        expected, distance = rounded(weight, quantizer.scale(), layout)
        actual = quantizer(weight).double().numpy()
        clear = distance > 1e-4
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(actual[clear], expected[clear])
        # At a boundary either neighbour is right.
        scales = np.repeat(quantizer.scale().double().numpy(), block_size, axis=1)
        assert np.all(np.abs(actual - expected) <= scales)


@pytest.mark.parametrize("midrise", [False, True])
@pytest.mark.parametrize("bits", sorted(BIT_WIDTHS))
def test_all_levels_and_halves(bits: int, midrise: bool) -> None:
    """Every level is reached, values outside the range clip, and halves go to even levels."""
    layout = Layout.uniform(1, 8 * 2**bits, bits, 8 * 2**bits, midrise=midrise)
    low, high, half = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.5 * midrise
    quantizer = FakeQuantizer(layout, torch.tensor([[0.25]]), learned_scales=False)

    def quantize(values: Tensor) -> Tensor:
        weight = torch.zeros(1, layout.columns)
        weight[0, : values.numel()] = values * 0.25
        return quantizer(weight)[0, : values.numel()] / 0.25

    levels = torch.arange(low, high + 1) + half
    assert torch.equal(quantize(levels), levels)
    assert torch.equal(quantize(torch.tensor([low - 7.0, high + 7.0])), torch.tensor([low + half, high + half]))
    between = torch.arange(low, high) + 0.5
    assert torch.equal(quantize(between + half), torch.round(between) + half)


@pytest.mark.parametrize(("name", "axis", "midrise"), CASES)
def test_levels_stand_for_the_forward_exactly(name: str, axis: int, midrise: bool) -> None:
    for seed in range(3):
        layout = layout_of(name, axis, midrise)
        weight = weight_of(layout, seed)
        quantizer = FakeQuantizer(layout, search_scales(weight, None, layout), learned_scales=True)
        with torch.no_grad():
            quantizer.log_gain.normal_(std=0.3)
        levels, scales = quantizer.levels(weight)
        assert levels.dtype == torch.int8
        assert scales.dtype == torch.float16
        assert scales.shape == layout.scales_shape
        bits = torch.from_numpy(bits_of(layout).copy())
        assert torch.all(levels >= -(2 ** (bits - 1)))
        assert torch.all(levels < 2 ** (bits - 1))
        values = (levels.float() + 0.5 * midrise) * scales.float().repeat_interleave(16, dim=1)
        assert torch.equal(values, quantizer(weight))


@given(gain=st.floats(-30, 30), magnitude=st.floats(1e-9, 1e6))
@settings(max_examples=50, deadline=None)
def test_scales_are_float16_numbers(gain: float, magnitude: float) -> None:
    layout = Layout.uniform(2, 16, 4, 8)
    quantizer = FakeQuantizer(layout, torch.full((2, 2), magnitude), learned_scales=True)
    with torch.no_grad():
        quantizer.log_gain.fill_(gain)
    scale = quantizer.scale().detach()
    assert torch.equal(scale, scale.half().float())
    assert torch.all(scale >= SMALLEST_SCALE)
    assert torch.all(torch.isfinite(scale))
    exact = min(max(magnitude * float(torch.tensor(gain).exp()), SMALLEST_SCALE), 65504.0)
    assert float(scale[0, 0]) == pytest.approx(exact, rel=1e-3 if exact > 2**-14 else 0.04)


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1\), expected \(2, 2\)"):
        FakeQuantizer(Layout.uniform(2, 16, 4, 8), torch.ones(2, 1), learned_scales=False)


def test_straight_through_gradient_of_the_weight() -> None:
    layout = Layout.uniform(1, 8, 3, 8)
    quantizer = FakeQuantizer(layout, torch.tensor([[1.0]]), learned_scales=False)
    weight = torch.tensor([[-9.0, -4.2, -3.6, 0.3, 1.2, 2.9, 3.4, 9.0]], requires_grad=True)
    quantizer(weight).sum().backward()
    assert weight.grad is not None
    # One inside the range, zero where clipped (the range of 3 bits is -4 … 3).
    assert weight.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]]
    assert quantizer.log_gain.grad is None
    assert not quantizer.log_gain.requires_grad


@pytest.mark.parametrize("midrise", [False, True])
@pytest.mark.parametrize("name", ["4/3/2", "8/4/3/2"])
@pytest.mark.parametrize("axis", [0, 1])
def test_scale_gradient_is_that_of_learned_step_sizes(name: str, axis: int, midrise: bool) -> None:
    """LSQ: d(value)/d(scale) is level - w/scale inside the range and the clipped level outside."""
    layout = layout_of(name, axis, midrise)
    weight = weight_of(layout, 0)
    initial = search_scales(weight, None, layout)
    quantizer = FakeQuantizer(layout, initial, learned_scales=True)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (quantizer(weight) * upstream).sum().backward()
    scale = quantizer.scale().detach().repeat_interleave(16, dim=1)
    levels = quantizer.levels(weight)[0].float() + 0.5 * midrise
    bits = torch.from_numpy(bits_of(layout).copy())
    raw = torch.round(weight / scale - 0.5 * midrise)
    inside = (raw >= -(2 ** (bits - 1))) & (raw < 2 ** (bits - 1))
    slope = torch.where(inside, levels - weight / scale, levels)
    expected = (slope * upstream).reshape(layout.rows, -1, 16).sum(dim=2) * initial
    assert quantizer.log_gain.grad is not None
    torch.testing.assert_close(quantizer.log_gain.grad, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().mean()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("midrise", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learning_the_scales_lowers_the_error(bits: int, midrise: bool, seed: int) -> None:
    layout = Layout.uniform(16, 64, bits, 16, midrise=midrise)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    largest = weight.reshape(16, -1, 16).abs().amax(dim=2)
    quantizer = FakeQuantizer(layout, largest / (2**bits - 1) * 3, learned_scales=True)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.01, weight_decay=0.0)

    def error() -> Tensor:
        return (quantizer(weight) - weight).square().mean()

    before = float(error().detach())
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert float(error().detach()) < 0.97 * before


# --- search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "axis", "midrise"), CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_search_is_the_best_of_its_candidates(name: str, axis: int, midrise: bool, masked: bool) -> None:
    layout = layout_of(name, axis, midrise)
    weight = weight_of(layout, 1)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.3 if masked else None
    kept = torch.ones_like(weight) if mask is None else mask.float()

    def errors(scale: Tensor) -> NDArray:
        stored = FakeQuantizer(layout, scale, learned_scales=False).scale()
        values, _ = rounded(weight * kept, stored, layout)
        squared = ((values - weight.double().numpy()) * kept.double().numpy()) ** 2
        return squared.reshape(layout.rows, -1, 16).sum(axis=2)

    blocks = bits_of(layout).reshape(layout.rows, -1, 16)[:, :, 0]
    full = (weight * kept).reshape(layout.rows, -1, 16).abs().amax(dim=2) / torch.from_numpy((2.0**blocks - 1) / 2)
    full = full.clamp(min=SMALLEST_SCALE)
    found = errors(search_scales(weight, mask, layout))
    assert found.shape == layout.scales_shape
    for ratio in np.linspace(0.3, 1.0, 15):
        assert np.all(found <= errors((full * ratio).float()) * (1 + 1e-4) + 1e-9)
    if "2" in name:
        assert found.sum() < 0.99 * errors(full.float()).sum()


def test_masked_entries_do_not_widen_the_range() -> None:
    layout = Layout.uniform(1, 8, 4, 8)
    weight = torch.tensor([[100.0, 1.0, -1.0, 0.5, -0.5, 0.25, 0.75, -0.75]])
    mask = torch.tensor([[False] + [True] * 7])
    assert float(search_scales(weight, mask, layout)) <= 1.0 / 7.5 + 1e-6


@pytest.mark.parametrize("midrise", [False, True])
def test_empty_blocks_stay_zero(midrise: bool) -> None:
    """Midtread has a level for it, midrise has not and takes scale 0; what lies beside them is as ever."""
    layout = Layout.uniform(2, 16, 4, 8, midrise=midrise)
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    weight[0, :8] = 0
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 8:] = False
    scale = search_scales(weight, mask, layout)
    assert float(scale[0, 0]) == float(scale[1, 1]) == (0.0 if midrise else SMALLEST_SCALE)
    assert float(scale[0, 1]) > 0.01
    quantizer = FakeQuantizer(layout, scale, learned_scales=True)
    with torch.no_grad():
        quantizer.log_gain.fill_(0.3)
    values = quantizer(weight)
    assert torch.equal(values[0, :8], torch.zeros(8))
    assert torch.all(torch.isfinite(values))
    assert torch.all(values[0, 8:] != 0) or not midrise
    values.square().sum().backward()
    assert quantizer.log_gain.grad is not None
    assert torch.all(torch.isfinite(quantizer.log_gain.grad))
    levels, scales = quantizer.levels(weight)
    stored = (levels.float() + 0.5 * midrise) * scales.float().repeat_interleave(8, dim=1)
    assert torch.equal(stored, values)
