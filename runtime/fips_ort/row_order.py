"""Rows of several bit-widths in an order of their own: the input ``row_bits`` ↔ where a row is stored.

A packed weight whose rows are cut stores them by segments: first the rows of 8 bits, then those of 4, 3 and 2. Where
the order of rows means something, as that of the tokens of a table, ``row_bits`` (uint8 [N]) says how many bits each
row has, in that order. Rows of one width are stored in the order of their numbers, so that nothing else is needed: row
n is stored as number (rows of larger widths) + (earlier rows of the same width).
"""

import numpy as np
from numpy.typing import NDArray

from fips_ort.layout import BIT_WIDTHS, Layout


def stored_order(row_bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The numbers of the rows in the order in which they are stored: int64 [N] from ``row_bits`` uint8 [N].

    ``matrix[stored_order(row_bits)]`` is what to pack. Raises ValueError unless ``row_bits`` is a uint8 vector of
    :data:`~fips_ort.layout.BIT_WIDTHS`.
    """
    if row_bits.dtype != np.uint8 or row_bits.ndim != 1:
        raise ValueError(f"row_bits are {row_bits.dtype} {row_bits.shape}, expected a vector of uint8")
    others = np.nonzero(~np.isin(row_bits, BIT_WIDTHS))[0]
    if others.size:
        first = int(others[0])
        raise ValueError(f"row_bits[{first}] is {row_bits[first]}, not one of {BIT_WIDTHS}")
    return np.concatenate([np.nonzero(row_bits == bits)[0] for bits in BIT_WIDTHS]).astype(np.int64)


def stored_rows(row_bits: NDArray[np.uint8] | None, layout: Layout) -> NDArray[np.int64]:
    """Where each row is stored, the inverse of :func:`stored_order`: int64 [N]. Without ``row_bits`` rows have the
    order in which they are stored.

    Raises ValueError if ``row_bits`` (uint8 [N]) do not fit a weight of this layout: only dense weights cut into
    segments of rows take them, and there must be as many rows of each width as its segment has.
    """
    if row_bits is None:
        return np.arange(layout.rows)
    if layout.segment_axis or layout.pattern.keep:
        raise ValueError("row_bits are for dense weights cut into segments of rows")
    order = stored_order(row_bits)
    counts = tuple(int(np.count_nonzero(row_bits == bits)) for bits in BIT_WIDTHS)
    if counts != layout.segments:
        raise ValueError(f"row_bits have {counts} rows of {BIT_WIDTHS} bits, the segments {layout.segments}")
    stored = np.empty_like(order)
    stored[order] = np.arange(order.size)
    return stored
