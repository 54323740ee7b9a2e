"""The ops of domain ``ai.fips`` in numpy: what every other implementation is tested against."""

import numpy as np
from numpy.typing import NDArray

from fips_ort.ops import gather_attributes
from fips_ort.packed import PackedWeight, dequantize, unpack
from fips_ort.row_order import stored_rows

# Both float32: numpy 1 makes a float64 of 1 / _SMALL.
_SMALL, _LIFT = np.float32(2.0**-64), np.float32(2.0**64)


def q_matmul(a: NDArray[np.float32], weight: PackedWeight, *, trans_b: bool = True,
             bias: NDArray[np.float32] | None = None, row_bits: NDArray[np.uint8] | None = None,
             accuracy_level: int = 0) -> NDArray[np.float32]:
    """``Y = A @ B (+ bias)``; the same function specifies all three products.

    ``a``: float32 [..., K]. The stored matrix S is read as B = S.T (``trans_b``: one stored row per output,
    K = columns, N = rows) or as B = S (K = rows, N = columns). Returns float32 [..., N]. With ``row_bits`` (uint8 [N];
    only with ``trans_b``) outputs and ``bias`` have the order that these give to the rows (:mod:`fips_ort.row_order`).
    Raises ValueError if they do not fit the weight.

    Sums are float64, rounded to float32 once: what overflows is the result, never something on the way to it. A value
    that is not finite has IEEE's products, which ``accuracy_level`` 4 with ``trans_b`` makes NaN for its whole row.

    ``accuracy_level`` 0 computes with float32 activations. 4 permits int8 activations, used if ``trans_b``:
    each block of ``block_size`` activations is rounded to ``round(a / s)`` with ``s = max|a| / 127`` (24 bits, however
    small; half to even; all zeros if the block is zero), multiplied with the integer levels exactly, then scaled.
    Without ``trans_b`` the scales vary along K: this computes as level 0, and kernels may round to 15 bits
    (docs/ops.md).
    """
    if accuracy_level not in (0, 4):
        raise ValueError(f"accuracy_level must be 0 or 4, got {accuracy_level}")
    if row_bits is not None and not trans_b:
        raise ValueError("row_bits need trans_b: without it, outputs are columns")
    with np.errstate(over="ignore", invalid="ignore"):
        if accuracy_level == 4 and trans_b:
            exact = _int8_matmul(a, weight)
        else:
            stored = dequantize(weight).astype(np.float64)
            exact = a.astype(np.float64) @ (stored.T if trans_b else stored)
        y: NDArray[np.float32] = exact.astype(np.float32)
        if row_bits is not None:
            y = y[..., stored_rows(row_bits, weight.layout)]
        return y if bias is None else y + bias


def q_gather(indices: NDArray[np.int64], weight: PackedWeight,
             row_bits: NDArray[np.uint8] | None = None) -> NDArray[np.float32]:
    """Rows of a dense weight cut into segments of rows, as float32 and exact: [..., K] for ``indices`` int64 [...].

    With ``row_bits`` (uint8 [N]) rows have the order that these give to them (:mod:`fips_ort.row_order`), else that in
    which they are stored. Raises IndexError for an index below 0 or from N on, and ValueError for a weight of another
    kind or ``row_bits`` that do not fit it.
    """
    rows = gather_attributes(weight.layout)["N"]
    outside = (indices < 0) | (indices >= rows)
    if outside.any():
        raise IndexError(f"index {indices[outside][0]} is outside of the {rows} rows")
    return dequantize(weight)[stored_rows(row_bits, weight.layout)[indices]]


def _int8_matmul(a: NDArray[np.float32], weight: PackedWeight) -> NDArray[np.float64]:
    levels, scales, mask = unpack(weight)
    block_size = weight.layout.block_size
    blocks = a.reshape(*a.shape[:-1], weight.layout.columns // block_size, block_size)
    maxima = np.abs(blocks).max(axis=-1, keepdims=True)
    # Exact, and the quotients below are normal floats then.
    lift = np.where(maxima < _SMALL, _LIFT, np.float32(1))
    a_scales = maxima * lift / np.float32(127)
    a_codes = np.rint(blocks * lift / np.where(a_scales > 0, a_scales, np.float32(1)))
    a_scales = a_scales.astype(np.float64) / lift
    # Twice the level, so that the half of a midrise level stays an integer.
    doubled = 2.0 * levels + (1.0 if weight.layout.midrise else 0.0)
    if mask is not None:
        doubled[~mask] = 0.0
    doubled = doubled.reshape(levels.shape[0], -1, block_size)
    dots = np.einsum("...bk,nbk->...nb", a_codes.astype(np.float64), doubled) * 0.5
    products: NDArray[np.float64] = dots * a_scales[..., None, :, 0] * scales.astype(np.float64)
    return products.sum(axis=-1)
