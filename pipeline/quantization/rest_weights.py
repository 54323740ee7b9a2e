"""Weights outside the MLPs as codes: rows rounded to nearest or by GPTQ, all at one width or in tiers of bits."""

import numpy as np
import torch
from torch import Tensor

from exporters.packed_rest import PackedTable, rest_layout
from fips_ort.layout import BIT_WIDTHS, Layout, segments_with
from fips_ort.packed import PackedWeight, pack, stack_rows
from fips_ort.row_order import stored_order
from qat.fake_quantize import FakeQuantizer, search_scales
from qat.gptq import gptq
from qat.padding import padded, present

ROWS_AT_ONCE = 16_384
"""Rows whose codes are found together: many copies of them are made on the way, and vocabularies are large."""


@torch.no_grad()
def quantize_rows(weight: Tensor, bits: int, block_size: int, moment: Tensor | None = None) -> PackedWeight:
    """Store ``weight`` [N, K], of any floating dtype, with ``bits`` bits in blocks of ``block_size`` at most.

    Codes are nearest to the weights, with scales searched for the smallest squared error; or, with the second
    ``moment`` [K, K] of the inputs that rows are multiplied with, those that :func:`qat.gptq.gptq` finds. Rows do not
    depend on each other. Raises the errors of :func:`qat.gptq.gptq`.
    """
    parts = []
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = weight.detach()[start : start + ROWS_AT_ONCE].float()
        layout = rest_layout(rows.shape[1], segments_with({bits: len(rows)}), block_size)
        parts.append(_nearest(rows, layout) if moment is None else _by_gptq(rows, layout, moment))
    return stack_rows(parts)


def quantize_table(
    table: Tensor, row_bits: Tensor, block_size: int, moment: Tensor | None = None
) -> PackedTable:
    """Store a ``table`` [N, K] whose row ``n`` has ``row_bits[n]`` bits (uint8 [N]) out of 8, 4, 3 and 2.
    ``block_size``, ``moment``: as in :func:`quantize_rows`."""
    order = torch.from_numpy(stored_order(row_bits.numpy()))
    parts = []
    for bits in BIT_WIDTHS:
        rows = order[row_bits[order] == bits]
        if len(rows):
            parts.append(quantize_rows(table.detach()[rows], bits, block_size, moment))
    return PackedTable(stack_rows(parts), row_bits.numpy() if len(parts) > 1 else None)


def pack_values(values: Tensor, scales: Tensor, layout: Layout) -> PackedWeight:
    """Pack ``values`` float32 [rows, columns] that are levels of ``scales`` float32 [rows, blocks], which are float16
    numbers. Raises ValueError if they are no such levels."""
    widened = scales.repeat_interleave(layout.block_size, dim=1)
    offset = 0.5 * layout.midrise
    levels = torch.round(values / widened.masked_fill(widened == 0, 1.0) - offset)
    if not torch.equal((levels + offset) * widened, values):
        raise ValueError("values are not levels of their scales")
    return pack(levels.to(torch.int8).numpy(), scales.numpy().astype(np.float16), None, layout)


def _nearest(rows: Tensor, layout: Layout) -> PackedWeight:
    # What fills up a block is multiplied with nothing, so it does not count in the search.
    filled = padded(rows, layout)
    scales = search_scales(filled, present(rows, layout), layout)
    levels, stored = FakeQuantizer(layout, scales, learned_scales=False).levels(filled)
    return pack(levels.numpy(), stored.numpy(), None, layout)


def _by_gptq(rows: Tensor, layout: Layout, moment: Tensor) -> PackedWeight:
    values, scales = gptq(rows, moment, layout)
    # Any level will do for what fills up a block.
    filling = 0.5 * layout.midrise * scales[:, -1:].expand(-1, layout.columns - values.shape[1])
    return pack_values(torch.cat([values, filling], dim=1), scales, layout)
