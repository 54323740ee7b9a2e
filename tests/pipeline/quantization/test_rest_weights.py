"""Codes of weights outside the MLPs: errors in the norm that counts, tiers, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moment_samples import correlated, error, moment_of, values_of

from exporters.packed_rest import rest_layout
from fips_ort.layout import segments_with
from fips_ort.row_order import stored_rows
from pipeline.quantization.rest_weights import pack_values, quantize_rows, quantize_table


@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.6), (3, 0.5), (4, 0.5), (8, 0.8)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_products_lose_less_than_by_rounding_to_nearest(bits: int, ratio: float, block_size: int) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    moment = moment_of(correlated(64))
    nearest, found = (quantize_rows(weight, bits, block_size, m) for m in (None, moment))
    assert nearest.layout == found.layout == rest_layout(64, segments_with({bits: 48}), block_size)
    assert error(values_of(found), weight, moment) < ratio * error(values_of(nearest), weight, moment)
    assert float((values_of(nearest) - weight).square().sum()) < float((values_of(found) - weight).square().sum())


@pytest.mark.parametrize("moments", [True, False])
def test_rows_are_rounded_for_themselves(monkeypatch: pytest.MonkeyPatch, moments: bool) -> None:
    """A table of 262,144 rows can therefore be done some at a time."""
    weight = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    moment = moment_of(correlated(32)) if moments else None
    whole = quantize_rows(weight, 3, 16, moment)
    monkeypatch.setattr("pipeline.quantization.rest_weights.ROWS_AT_ONCE", 7)
    parts = quantize_rows(weight, 3, 16, moment)
    assert whole.layout == parts.layout
    assert torch.equal(values_of(whole), values_of(parts))


@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_fills_up_a_block_changes_nothing(bits: int, moments: bool) -> None:
    """40 columns take two blocks of 32; the same rows, written out with zeros, have the same levels."""
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    moment = moment_of(correlated(40)) if moments else None
    packed = quantize_rows(weight, bits, 32, moment)
    assert packed.layout.columns > 40
    step = values_of(packed).abs().max() / (2 ** (bits - 1) - 0.5)
    limit = 3.0 if moments else 1.5  # GPTQ moves values to make up for others
    assert float((values_of(packed)[:, :40] - weight).abs().max()) < limit * float(step)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60))
def test_rows_of_a_table_have_the_bits_they_were_given(seed: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, 32, generator=generator)
    row_bits = torch.tensor([8, 4, 3, 2], dtype=torch.uint8)[torch.randint(0, 4, (rows,), generator=generator)]
    packed = quantize_table(table, row_bits, 16)
    order = stored_rows(packed.row_bits, packed.weight.layout)
    values = values_of(packed.weight)[torch.from_numpy(order)]
    for bits in (8, 4, 3, 2):
        own = row_bits == bits
        if own.any():
            alone = values_of(quantize_rows(table[own], bits, 16))
            assert torch.equal(values[own], alone)


def test_rows_of_zeros_stay_zero() -> None:
    """Midrise levels have none at zero; a table has rows of zeros, of tokens that never came up."""
    for bits in (2, 3, 4, 8):
        packed = quantize_rows(torch.zeros(3, 32), bits, 16)
        assert not values_of(packed).any()


def test_values_that_are_no_levels_are_refused() -> None:
    layout = rest_layout(16, segments_with({4: 2}), 16)
    scales = torch.full((2, 1), 0.5)
    values = torch.full((2, 16), 0.25)
    assert torch.equal(values_of(pack_values(values, scales, layout)), values)
    with pytest.raises(ValueError, match="not levels of their scales"):
        pack_values(values + 0.1, scales, layout)
