"""Factors in layouts that are larger than they are: what is stored is what was trained, and zeros beyond it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fips_ort.layout import DENSE, PATTERNS, Layout, Pattern, padded_to_blocks, segments_with
from fips_ort.packed import dequantize, unpack
from pipeline.compression.sparsify import magnitude_masks, swap_masks
from qat.factor import Factor
from qat.padding import missing, padded, padded_mask, present

SHAPES = [(48, 172), (37, 90), (16, 8), (5, 1)]


def layout_for(shape: tuple[int, int], name: str, bits: int, midrise: bool, *, rows: int = 0) -> Layout:
    """A layout that fills up the last block, and has ``rows`` more rows."""
    pattern = Pattern.parse(name)
    block = 8 * pattern.of // pattern.keep if pattern.is_n_of_m else 16
    columns = padded_to_blocks(shape[1], block)
    return Layout(shape[0] + rows, columns, block, segments_with({bits: columns}), 1, midrise, pattern)


def matrix(shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[0])[:, None]


def mask_for(values: Tensor, pattern: Pattern) -> Tensor | None:
    if pattern == DENSE:
        return None
    sparsity = 1 - pattern.keep / pattern.of if pattern.is_n_of_m else 0.6
    return magnitude_masks([values.abs()], sparsity, pattern, jointly=False)[0]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_codes_stand_for_the_factor_and_for_zeros_beyond(shape: tuple[int, int], name: str, start: str) -> None:
    pattern = Pattern.parse(name)
    for bits, midrise, rows in ((2, True, 20), (3, False, 0), (4, False, 20), (3, True, 0)):
        values = matrix(shape, bits)
        factor = Factor(values, mask_for(values, pattern))
        layout = layout_for(shape, name, bits, midrise, rows=rows)
        x = matrix((64, shape[1]), 7)
        factor.prepare(layout, learned_scales=True, moment=None if start == "nearest" else x.T @ x / 64)
        assert factor().shape == shape
        factor().square().sum().backward()
        assert all(torch.all(torch.isfinite(parameter.grad)) for parameter in factor.parameters())  # type: ignore[arg-type]
        packed = factor.freeze()
        stored = torch.from_numpy(dequantize(packed))
        assert tuple(stored.shape) == (layout.rows, layout.columns)
        assert torch.equal(stored[: shape[0], : shape[1]], factor())
        assert not stored[shape[0] :].any()
        kept = unpack(packed)[2]
        if kept is not None and factor.mask is not None:
            np.testing.assert_array_equal(kept[: shape[0], : shape[1]], factor.mask.numpy())
        # As restored from a file.
        again = Factor(torch.zeros(shape), None if factor.mask is None else torch.ones_like(factor.mask))
        again.prepare_to_load(layout, learned_scales=True)
        again.load_state_dict(factor.state_dict())
        assert torch.equal(again(), factor())


@pytest.mark.parametrize("midrise", [False, True])
def test_filling_changes_nothing_of_what_is_there(midrise: bool) -> None:
    """The last block's scale is searched for its entries alone."""
    values = matrix((8, 40), 0)
    layout = Layout.uniform(8, 48, 3, 16, midrise=midrise)
    factor, whole = Factor(values), Factor(values[:, :32])
    factor.prepare(layout, learned_scales=False)
    whole.prepare(Layout.uniform(8, 32, 3, 16, midrise=midrise), learned_scales=False)
    tail = Factor(values[:, 32:])
    tail.prepare(Layout.uniform(8, 8, 3, 8, midrise=midrise), learned_scales=False)
    # Up to rounding: a row's entries are stored in units of the row's root mean square.
    torch.testing.assert_close(factor()[:, :32], whole(), rtol=1e-2, atol=0)
    torch.testing.assert_close(factor()[:, 32:], tail(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("name", "columns"), [("1:4", 10), ("2:4", 9), ("1:8", 172), ("2:8", 90), ("2:8", 17)])
def test_last_groups_that_are_not_whole(name: str, columns: int) -> None:
    """They keep as many entries as whole ones, as far as they have them; RigL leaves as many there."""
    pattern = Pattern.parse(name)
    values = matrix((6, columns), 3).abs()
    mask = mask_for(values, pattern)
    assert mask is not None
    last = columns % pattern.of
    assert torch.all(mask[:, : columns - last].reshape(6, -1, pattern.of).sum(dim=2) == pattern.keep)
    assert torch.all(mask[:, columns - last :].sum(dim=1) == min(pattern.keep, last))
    swapped = swap_masks(values, matrix((6, columns), 4), mask, 1.0, pattern)
    assert not torch.equal(swapped, mask)
    assert torch.equal(swapped.sum(dim=1), mask.sum(dim=1))
    assert torch.all(swapped[:, columns - last :].sum(dim=1) == min(pattern.keep, last))
    layout = layout_for((6, columns), name, 4, False, rows=3)
    stored = padded_mask(mask, layout)
    assert torch.all(stored.reshape(-1, pattern.of).sum(dim=1) == pattern.keep)
    assert torch.equal(stored[:6, :columns], mask)


def test_padding_by_hand() -> None:
    layout = Layout.uniform(3, 16, 4, 8)
    values = torch.ones(2, 12)
    assert missing(layout, values) == (1, 4)
    assert torch.equal(padded(values, layout)[:2, :12], values)
    assert float(padded(values, layout).sum()) == 24
    inside = present(values, layout)
    assert inside is not None
    assert int(inside.sum()) == 24
    whole = torch.ones(3, 16)
    assert padded(whole, layout) is whole
    assert present(whole, layout) is None
    with pytest.raises(ValueError, match=r"shape \(4, 12\) is larger than its layout, \(3, 16\)"):
        padded(torch.ones(4, 12), layout)
