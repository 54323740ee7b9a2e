"""Packed weights: integer codes, scales and mask ↔ the bytes stored in an artefact.

This file is the specification of the byte formats; the ONNX functions and the native kernels are tested
against it. Codes and pattern are byte streams (:mod:`fips_ort.bits`), one after another per segment, each
segment's submatrix in row-major order and filled up to whole bytes:

- ``codes``: stored levels as ``q + 2**(bits-1)``; all entries if dense, else only the kept ones in order.
- ``pattern``: nothing if dense; for n:m the index of each kept entry within its m columns, ascending
  (2 bits for m = 4, 3 bits for m = 8); for a bitmap one bit per entry, 1 = kept.
- ``scales``: float16 [rows, columns / block_size], over the whole matrix, whatever its segments.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fips_ort.bits import pack_bits, packed_size, unpack_bits
from fips_ort.layout import Layout


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A matrix as stored: ``codes`` and ``pattern`` uint8 vectors, ``scales`` float16 (see module docstring).

    Raises ValueError if a stream's length does not follow from the layout (for a bitmap: from its popcount).
    """

    layout: Layout
    codes: NDArray[np.uint8]
    pattern: NDArray[np.uint8]
    scales: NDArray[np.float16]

    def __post_init__(self) -> None:
        layout = self.layout
        if self.scales.shape != layout.scales_shape or self.scales.dtype != np.float16:
            actual = f"{self.scales.dtype} {self.scales.shape}"
            raise ValueError(f"scales are {actual}, expected float16 {layout.scales_shape}")
        pattern_bytes, code_bytes = _stream_sizes(layout, self.pattern)
        if self.pattern.size != pattern_bytes:
            raise ValueError(f"pattern has {self.pattern.size} bytes, expected {pattern_bytes}")
        if self.codes.size != code_bytes:
            raise ValueError(f"codes have {self.codes.size} bytes, expected {code_bytes}")

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, pattern and scales."""
        return self.codes.nbytes + self.pattern.nbytes + self.scales.nbytes


def pack(levels: NDArray[np.int8], scales: NDArray[np.float16], mask: NDArray[np.bool_] | None,
         layout: Layout) -> PackedWeight:
    """Pack signed ``levels`` (int8 [rows, columns]) with their ``scales`` and ``mask`` (bool [rows, columns]).

    ``mask`` is None exactly if the pattern is dense; levels where it is False are not stored. Raises ValueError
    if a stored level does not fit its bit-width or the mask does not follow the n:m pattern.
    """
    if levels.shape != (layout.rows, layout.columns):
        raise ValueError(f"levels have shape {levels.shape}, expected {(layout.rows, layout.columns)}")
    dense = layout.pattern.keep == 0
    if dense != (mask is None):
        raise ValueError(f"pattern {layout.pattern} {'takes no' if dense else 'needs a'} mask")
    code_parts, pattern_parts = [], []
    for bits, rows, columns in layout.submatrices():
        part = levels[rows, columns].astype(np.int16) + (1 << (bits - 1))
        if mask is not None:
            kept = mask[rows, columns]
            pattern_parts.append(_pack_mask(kept, layout))
            part = part[kept]
        if part.size and (part.min() < 0 or part.max() >> bits):
            raise ValueError(f"levels outside the range of {bits} bits")
        code_parts.append(pack_bits(part.astype(np.uint8), bits))
    pattern = np.concatenate(pattern_parts) if pattern_parts else np.zeros(0, np.uint8)
    return PackedWeight(layout, np.concatenate(code_parts), pattern, np.ascontiguousarray(scales))


def unpack(packed: PackedWeight) -> tuple[NDArray[np.int8], NDArray[np.float16], NDArray[np.bool_] | None]:
    """Inverse of :func:`pack`: (levels, scales, mask); levels of entries that are not kept are 0."""
    layout = packed.layout
    levels = np.zeros((layout.rows, layout.columns), np.int8)
    mask = None if layout.pattern.keep == 0 else np.zeros(levels.shape, np.bool_)
    code_start = pattern_start = 0
    for bits, rows, columns in layout.submatrices():
        shape = levels[rows, columns].shape
        if mask is None:
            kept = np.ones(shape, np.bool_)
        else:
            count = _pattern_count(shape, layout)
            size = packed_size(count, layout.pattern.index_bits)
            kept = _unpack_mask(packed.pattern[pattern_start:pattern_start + size], shape, layout)
            mask[rows, columns] = kept
            pattern_start += size
        count = int(kept.sum())
        size = packed_size(count, bits)
        stored = unpack_bits(packed.codes[code_start:code_start + size], bits, count)
        part = np.zeros(shape, np.int8)
        part[kept] = (stored.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
        levels[rows, columns] = part
        code_start += size
    return levels, packed.scales, mask


def dequantize(packed: PackedWeight) -> NDArray[np.float32]:
    """The matrix that a packed weight stands for: float32 [rows, columns], exact (no rounding happens)."""
    levels, scales, mask = unpack(packed)
    values = levels.astype(np.float32)
    if packed.layout.midrise:
        values += np.float32(0.5)
    values *= np.repeat(scales.astype(np.float32), packed.layout.block_size, axis=1)
    if mask is not None:
        values[~mask] = 0.0
    return values


def _pack_mask(kept: NDArray[np.bool_], layout: Layout) -> NDArray[np.uint8]:
    pattern = layout.pattern
    if not pattern.is_n_of_m:
        return pack_bits(kept.astype(np.uint8), 1)
    groups = kept.reshape(-1, pattern.of)
    counts = groups.sum(axis=1)
    if not np.all(counts == pattern.keep):
        raise ValueError(f"mask does not keep exactly {pattern.keep} of every {pattern.of} columns")
    return pack_bits(np.nonzero(groups)[1].astype(np.uint8), pattern.index_bits)


def _unpack_mask(stream: NDArray[np.uint8], shape: tuple[int, ...], layout: Layout) -> NDArray[np.bool_]:
    pattern = layout.pattern
    entries = unpack_bits(stream, pattern.index_bits, _pattern_count(shape, layout))
    if not pattern.is_n_of_m:
        return entries.astype(np.bool_).reshape(shape)
    indices = entries.reshape(-1, pattern.keep)
    if pattern.keep > 1 and not np.all(np.diff(indices.astype(np.int16), axis=1) > 0):
        raise ValueError("indices of the n:m pattern are not ascending")
    groups = np.zeros((indices.shape[0], pattern.of), np.bool_)
    np.put_along_axis(groups, indices.astype(np.intp), True, axis=1)
    return groups.reshape(shape)


def _pattern_count(shape: tuple[int, ...], layout: Layout) -> int:
    """Entries in the pattern stream of a submatrix."""
    size = shape[0] * shape[1]
    pattern = layout.pattern
    return size // pattern.of * pattern.keep if pattern.is_n_of_m else size


def _stream_sizes(layout: Layout, pattern_stream: NDArray[np.uint8]) -> tuple[int, int]:
    """(pattern bytes, code bytes) that a layout asks for; a bitmap's code bytes depend on its popcount."""
    pattern_bytes = code_bytes = 0
    for bits, rows, columns in layout.submatrices():
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        count = shape[0] * shape[1]
        if layout.pattern.keep:
            entries = _pattern_count(shape, layout)
            size = packed_size(entries, layout.pattern.index_bits)
            if layout.pattern.is_n_of_m:
                count = entries
            else:
                part = pattern_stream[pattern_bytes:pattern_bytes + size]
                count = int(np.unpackbits(part, count=min(entries, part.size * 8), bitorder="little").sum())
            pattern_bytes += size
        code_bytes += packed_size(count, bits)
    return pattern_bytes, code_bytes
