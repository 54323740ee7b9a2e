"""What a kernel's outputs may be: the specification's value, and how far float32 arithmetic may lead from it.

Bounds follow the kernels' arithmetic and are per output. With ``u = 2**-24``, the rounding of one operation:

- A sum of terms ``t`` through ``L`` operations is off by at most ``L · u · sum|t|``. Roundings go up as often as
  down: each is random, with a deviation of ``u / sqrt(3)`` of the sum so far, and 8 deviations of ``L`` such steps are
  the other bound, far smaller where sums are long; the smaller one counts. Neither is a share of the *largest* output:
  where all outputs happen to be near zero, errors are still those of their terms.
- Integer kernels multiply bytes ``q + z``, also of entries that are not kept (``z``), not levels ``q``, and take ``z``
  times the sum of the activations from the result. Integers are exact, but lanes of a vector become floats before they
  are added: the terms are the products of bytes, of which those of a row that keeps nothing cancel to a rounding error.
- Level 4 without transB rounds each product of activation and scale by up to half of 1/16256 of the largest of its run.
- Numbers below 2**-126 have fewer bits: an absolute error, or all of the number where the CPU takes them for zero.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fips_ort.packed import PackedWeight, unpack
from fips_ort.reference import q_matmul
from fips_ort.row_order import stored_order, stored_rows

UNIT = 2.0**-24
DEVIATIONS = 8
RUN = 64
LARGEST = float(np.finfo(np.float32).max)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Expected:
    """Outputs float32 [..., N] and their bounds, of which ``flushed`` holds where subnormal numbers count as zero.

    A bound of NaN wants an output that is not finite, an infinite bound takes anything; an output that is infinite or
    NaN here is wanted exactly.
    """

    outputs: NDArray[np.float32]
    allowed: NDArray[np.float32]
    flushed: NDArray[np.float32]

    def __getitem__(self, rows: slice) -> "Expected":
        return Expected(self.outputs[rows], self.allowed[rows], self.flushed[rows])

    def excess(self, actual: NDArray[np.float32], *, flushed: bool = False) -> Floats:
        """How far outputs are from what they may be, in units of the bounds, [..., N]: 1 is the most, inf is wrong."""
        bound = (self.flushed if flushed else self.allowed).astype(np.float64)
        with np.errstate(invalid="ignore"):
            distance = np.abs(actual.astype(np.float64) - self.outputs.astype(np.float64)) / bound
        same = (actual == self.outputs) | (np.isnan(actual) & np.isnan(self.outputs))
        distance = np.where(np.isfinite(self.outputs) & np.isfinite(actual), distance, np.where(same, 0.0, np.inf))
        distance = np.where(np.isnan(bound), np.where(np.isfinite(actual), np.inf, 0.0), distance)
        return np.where(np.isposinf(bound), 0.0, distance)


def expected_outputs(a: NDArray[np.float32], weight: PackedWeight, *, trans_b: bool = True,
                     bias: NDArray[np.float32] | None = None, row_bits: NDArray[np.uint8] | None = None,
                     accuracy_level: int = 0) -> Expected:
    """What any kernel may answer to activations [..., K]."""
    if row_bits is not None:
        stored_bias = None if bias is None else bias[stored_order(row_bits)]
        stored = expected_outputs(a, weight, bias=stored_bias, accuracy_level=accuracy_level)
        rows = stored_rows(row_bits, weight.layout)
        return Expected(stored.outputs[..., rows], stored.allowed[..., rows], stored.flushed[..., rows])
    shape = (*a.shape[:-1], weight.layout.rows if trans_b else weight.layout.columns)
    rows = np.ascontiguousarray(a).reshape(-1, a.shape[-1])
    with np.errstate(all="ignore"):
        outputs = q_matmul(rows, weight, trans_b=trans_b, bias=bias, accuracy_level=accuracy_level)
        bounds = _bounds(rows, weight, trans_b, bias, accuracy_level, outputs)
    return Expected(outputs.reshape(shape), *(bound.astype(np.float32).reshape(shape) for bound in bounds))


class _Terms:
    """What is known of the terms of a sum: how many operations they go through, the sum of their magnitudes, and the
    larger of the root of the sum of their squares and the largest partial sum."""

    def __init__(self, operations: float, total: Floats, squares: Floats, peak: Floats) -> None:
        self.operations, self.total, self.peak = operations, total, np.maximum(peak, np.sqrt(squares))

    def bound(self, outputs: Floats) -> Floats:
        random = DEVIATIONS * np.sqrt(self.operations / 3) * np.maximum(np.abs(outputs), self.peak)
        return np.minimum(self.operations * self.total, random) * UNIT


def _bounds(a: NDArray[np.float32], weight: PackedWeight, trans_b: bool, bias: NDArray[np.float32] | None,
            accuracy_level: int, outputs: NDArray[np.float32]) -> tuple[Floats, Floats]:
    layout = weight.layout
    levels, halves, mask = unpack(weight)
    levels = levels + 0.5 * layout.midrise
    if mask is not None:
        levels = np.where(mask, levels, 0.0)
    zero_points = np.zeros(levels.shape)
    for bits, rows, columns in layout.submatrices():
        zero_points[rows, columns] = 1 << (bits - 1)
    finite_scales = np.isfinite(halves)
    scales = np.where(finite_scales, halves, np.float16(0)).astype(np.float64)
    finite_rows = np.isfinite(a).all(axis=1)
    values = np.where(finite_rows[:, None], a, np.float32(0))
    added = np.zeros(outputs.shape[1]) if bias is None else np.where(np.isfinite(bias), bias, 0).astype(np.float64)
    exact = q_matmul(values, weight, trans_b=trans_b, accuracy_level=accuracy_level).astype(np.float64)
    exact = np.where(np.isfinite(exact), exact, LARGEST) + added

    # What kernels bring rows of very small or large activations to (docs/ops.md).
    magnitudes = np.abs(values).max(axis=1, initial=0.0)
    lift = np.where(magnitudes >= 2.0**64, 2.0**-64, np.where((magnitudes < 2.0**-64) & (magnitudes > 0), 2.0**64, 1.0))
    lifted = (values * lift[:, None].astype(np.float32)).astype(np.float32)

    full = np.repeat(scales, layout.block_size, axis=1)
    stored = levels * full
    extra = np.zeros(outputs.shape)
    if accuracy_level == 4 and trans_b:
        rounded, integer_terms = _rounded_blocks(lifted, lift, levels, scales, zero_points, layout.block_size)
        sums = [_float_terms(rounded, stored.T, added), integer_terms]
    else:
        sums = [_float_terms(values.astype(np.float64), stored.T if trans_b else stored, added)]
        if accuracy_level == 4 and not layout.pattern.keep:
            extra, integer_terms = _rounded_runs(values.astype(np.float64), lift, levels, scales, zero_points, weight)
            sums.append(integer_terms)
    extra += np.maximum.reduce([terms.bound(exact) for terms in sums]) + 2 * UNIT * np.abs(added)

    # Absolute errors by subnormal numbers, before the row is brought back, and of the output itself.
    sizes = (np.abs(levels) + zero_points) * np.maximum(1.0, np.abs(full))
    size = sizes.sum(axis=1) if trans_b else sizes.sum(axis=0)
    whole = np.abs(stored).sum(axis=1 if trans_b else 0)
    allowed = extra + 2.0**-141 * size / lift[:, None] + 2.0**-148
    flushed = extra + 2.0**-117 * size / lift[:, None] + 2.0**-126 * (whole + 4)

    for bound in (allowed, flushed):
        near = np.abs(exact) + bound >= LARGEST
        bound[near & (np.abs(exact) - bound <= LARGEST)] = np.inf  # rounds to infinity or not
        if accuracy_level == 4:
            bound[~finite_rows] = np.nan
        if not finite_scales.all():
            kept = np.ones(levels.shape, np.bool_) if mask is None else mask
            by_block = kept.reshape(layout.rows, -1, layout.block_size)
            if trans_b:
                bad = ~finite_scales
                bound[:, bad.any(axis=1)] = np.nan
                bound[:, (bad & ~by_block.any(axis=2)).any(axis=1)] = np.inf
            else:
                bad = np.repeat(~finite_scales, layout.block_size, axis=1)
                bound[:, bad.any(axis=0)] = np.nan
                bound[:, (bad & ~kept).any(axis=0)] = np.inf
        if bias is not None:
            bound[:, ~np.isfinite(bias)] = np.nan
    return allowed, flushed


def _float_terms(a: Floats, b: Floats, bias: Floats) -> _Terms:
    depth = len(b)
    so_far = np.zeros((len(a), b.shape[1]))
    peak = np.zeros(so_far.shape)
    for first in range(0, depth, RUN):
        so_far += a[:, first : first + RUN] @ b[first : first + RUN]
        np.maximum(peak, np.abs(so_far), out=peak)
    total, squares = np.abs(a) @ np.abs(b) + np.abs(bias), a**2 @ b**2 + bias**2
    return _Terms(min(depth, 256) + depth // RUN + 8, total, squares, peak + np.abs(bias))


def _rounded_blocks(lifted: NDArray[np.float32], lift: Floats, levels: Floats, scales: Floats, zero_points: Floats,
                    block_size: int) -> tuple[Floats, _Terms]:
    """The activations as level 4 rounds them, and the terms of sums over blocks."""
    m, count = len(lifted), scales.shape[1]
    blocks = lifted.reshape(m, count, block_size)
    maxima = np.abs(blocks).max(axis=2)
    block_lift = np.where(maxima < 2.0**-64, 2.0**64, 1.0).astype(np.float32)
    a_scales = maxima * block_lift / np.float32(127)
    codes = np.rint(blocks * block_lift[..., None] / np.where(a_scales > 0, a_scales, np.float32(1))[..., None])
    codes = codes.astype(np.float64)
    a_scales = a_scales.astype(np.float64) / block_lift / lift[:, None]
    by_block = levels.reshape(len(levels), count, block_size)
    products = a_scales[:, None] * scales
    sizes = np.abs(products)
    points = zero_points.reshape(by_block.shape)

    def dots(left: Floats, right: Floats) -> Floats:
        """[m, count, size] and [n, count, size] → [m, n, count]."""
        return np.matmul(left.transpose(1, 0, 2), right.transpose(1, 2, 0)).transpose(1, 2, 0)

    stored = by_block + points
    offsets = products * points[..., 0] * codes.sum(axis=2)[:, None]
    if block_size > 8192:
        # Of n:m weights, kernels may add 128 to the activations instead, exactly in smaller blocks.
        offsets = np.abs(offsets) + sizes * 128 * np.abs(by_block.sum(axis=2))
    so_far = [np.abs(np.cumsum(part, axis=2)).max(axis=2) for part in (products * dots(codes, stored), offsets)]
    total = (sizes * dots(np.abs(codes), stored) + np.abs(offsets)).sum(axis=2)
    squares = (sizes**2 * dots(codes**2, stored**2) + offsets**2).sum(axis=2)
    terms = _Terms(2 * count + 16, total, squares, np.maximum(*so_far))
    return (codes * a_scales[..., None]).reshape(lifted.shape), terms


def _rounded_runs(a: Floats, lift: Floats, levels: Floats, scales: Floats, zero_points: Floats,
                  weight: PackedWeight) -> tuple[Floats, _Terms]:
    """What rounding in runs allows, and the terms of sums over runs."""
    layout = weight.layout
    shape = (len(a), layout.columns)
    allowed, total, squares, peak, so_far = (np.zeros(shape) for _ in range(5))
    count = 0
    for rows in layout.row_ranges():
        for first in range(rows.start, rows.stop, RUN):
            run = slice(first, min(first + RUN, rows.stop))
            scaled = a[:, run, None] * scales[run]  # [m, rows, blocks]
            smallest = 16256 * 2.0**-126 / lift
            step = np.maximum(np.abs(scaled).max(axis=1), smallest[:, None]) / 16256
            per_column = np.abs(levels[run]).sum(axis=0)
            # Half a step, and what the step's own rounding makes of 16256 of them.
            allowed += 0.502 * np.repeat(step, layout.block_size, axis=1) * per_column
            dots = a[:, run] @ (levels[run] * np.repeat(scales[run], layout.block_size, axis=1))
            sums = np.repeat(scaled.sum(axis=1), layout.block_size, axis=1) * zero_points[first]
            total += np.abs(dots + sums) + np.abs(sums)
            squares += (dots + sums) ** 2 + sums**2
            so_far += dots
            # A run's sum is taken from its products at once.
            np.maximum(peak, np.abs(so_far) + np.abs(dots + sums), out=peak)
            count += 1
    return allowed, _Terms(2 * count + 8, total, squares, peak)
