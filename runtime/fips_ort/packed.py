"""Packed weights: integer codes, scales and mask ↔ the bytes stored in an artefact.

This file is the specification of the byte formats; the ONNX functions and the native kernels are tested
against it. ``codes`` and ``pattern`` hold one part per segment, one after another (:mod:`fips_ort.bits` has chunks and
streams). Levels are stored as ``q + 2**(bits-1)``.

- *Dense*: ``codes`` has the rows of the segment one after another, each in chunks of 64 consecutive columns, the last
  of which may be shorter. ``pattern`` is empty.
- *n:m*: only kept entries are stored. A *tile* is 16 consecutive rows (the last one of a segment is filled up with
  zeros); a *step* is 4 consecutive groups of m columns. ``codes`` has tile after tile, in a tile step after step, in
  a step for each of the n kept entries of a group, in ascending order, one chunk: the 16 rows' 4 groups, row by row.
  ``pattern`` has chunks in the same order, with each entry's index within its group: 2 bits for m = 4, 3 for m = 8.
- *Bitmap*: ``codes`` is a stream of the kept entries in row-major order, ``pattern`` a stream of one bit per entry,
  1 = kept.
- ``scales`` are float16: [rows, columns / block_size], over the whole matrix, whatever its segments; for n:m
  [tiles, columns / block_size, 16], so that the scales of a tile lie together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fips_ort.bits import CHUNK, pack_bits, pack_chunks, packed_size, unpack_bits, unpack_chunks
from fips_ort.layout import STEP_GROUPS, TILE_ROWS, Layout, Pattern


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
        if self.scales.shape != layout.stored_scales_shape or self.scales.dtype != np.float16:
            actual = f"{self.scales.dtype} {self.scales.shape}"
            raise ValueError(f"scales are {actual}, expected float16 {layout.stored_scales_shape}")
        if self.pattern.size != layout.pattern_bytes:
            raise ValueError(f"pattern has {self.pattern.size} bytes, expected {layout.pattern_bytes}")
        expected = layout.code_bytes(_bitmap_counts(layout, self.pattern))
        if self.codes.size != expected:
            raise ValueError(f"codes have {self.codes.size} bytes, expected {expected}")

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, pattern and scales."""
        return self.codes.nbytes + self.pattern.nbytes + self.scales.nbytes


def pack(levels: NDArray[np.int8], scales: NDArray[np.float16], mask: NDArray[np.bool_] | None,
         layout: Layout) -> PackedWeight:
    """Pack signed ``levels`` (int8 [rows, columns]) with their ``scales`` (float16 [rows, blocks]) and ``mask`` (bool
    [rows, columns]).

    ``mask`` is None exactly if the pattern is dense; levels where it is False are not stored. Raises ValueError
    if a stored level does not fit its bit-width or the mask does not follow the n:m pattern.
    """
    if levels.shape != (layout.rows, layout.columns):
        raise ValueError(f"levels have shape {levels.shape}, expected {(layout.rows, layout.columns)}")
    if (layout.pattern.keep == 0) != (mask is None):
        raise ValueError(f"pattern {layout.pattern} {'needs a' if layout.pattern.keep else 'takes no'} mask")
    if scales.shape != layout.scales_shape:
        raise ValueError(f"scales have shape {scales.shape}, expected {layout.scales_shape}")
    code_parts, pattern_parts = [], []
    for bits, rows, columns in layout.submatrices():
        shifted = levels[rows, columns].astype(np.int16) + (1 << (bits - 1))
        kept = None if mask is None else mask[rows, columns]
        stored = shifted if kept is None else shifted[kept]
        if stored.size and (stored.min() < 0 or stored.max() >> bits):
            raise ValueError(f"levels outside the range of {bits} bits")
        codes = shifted.astype(np.uint8)
        if kept is None:
            code_parts.append(_pack_rows(codes, bits))
        elif layout.pattern.is_n_of_m:
            groups = kept.reshape(-1, layout.pattern.of)
            if not np.all(groups.sum(axis=1) == layout.pattern.keep):
                raise ValueError(
                    f"mask does not keep exactly {layout.pattern.keep} of every {layout.pattern.of} columns"
                )
            index = np.nonzero(groups)[1].astype(np.uint8).reshape(len(kept), -1)
            code_parts.append(pack_chunks(_in_tiles(codes[kept].reshape(len(kept), -1), layout.pattern), bits))
            pattern_parts.append(pack_chunks(_in_tiles(index, layout.pattern), layout.pattern.index_bits))
        else:
            code_parts.append(pack_bits(codes[kept], bits))
            pattern_parts.append(pack_bits(kept.astype(np.uint8), 1))
    if layout.pattern.is_n_of_m:
        scales = np.concatenate([_scales_in_tiles(scales[rows]) for rows in layout.row_ranges()])
    return PackedWeight(layout, _joined(code_parts), _joined(pattern_parts), np.ascontiguousarray(scales))


def unpack(packed: PackedWeight) -> tuple[NDArray[np.int8], NDArray[np.float16], NDArray[np.bool_] | None]:
    """Inverse of :func:`pack`. Returns (levels int8 [rows, columns], scales float16 [rows, blocks], mask bool
    [rows, columns] or None); levels of entries that are not kept are 0."""
    layout, pattern = packed.layout, packed.layout.pattern
    levels = np.zeros((layout.rows, layout.columns), np.int8)
    mask = None if pattern.keep == 0 else np.zeros(levels.shape, np.bool_)
    codes, patterns = _Reader(packed.codes), _Reader(packed.pattern)
    for bits, rows, columns in layout.submatrices():
        count, width = shape = levels[rows, columns].shape
        kept = np.ones(shape, np.bool_)
        if pattern.keep == 0:
            stored = _unpack_rows(codes.bytes(count * width * bits // 8).reshape(count, -1), bits).reshape(-1)
        elif pattern.is_n_of_m:
            chunks_count = layout.tiles(count) * layout.steps(width) * pattern.keep
            index = _out_of_tiles(patterns.chunks(chunks_count, pattern.index_bits), count, pattern)
            indices = index.reshape(-1, pattern.keep)
            if pattern.keep > 1 and not np.all(np.diff(indices.astype(np.int16), axis=1) > 0):
                raise ValueError("indices of the n:m pattern are not ascending")
            groups = np.zeros((len(indices), pattern.of), np.bool_)
            np.put_along_axis(groups, indices.astype(np.intp), True, axis=1)
            kept = groups.reshape(shape)
            stored = _out_of_tiles(codes.chunks(chunks_count, bits), count, pattern).reshape(-1)
        else:
            kept = patterns.stream(count * width, 1).astype(np.bool_).reshape(shape)
            stored = codes.stream(int(kept.sum()), bits)
        part = np.zeros(shape, np.int8)
        part[kept] = (stored.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
        levels[rows, columns] = part
        if mask is not None:
            mask[rows, columns] = kept
    return levels, _logical_scales(packed), mask


def stack_rows(weights: Sequence[PackedWeight]) -> PackedWeight:
    """One weight of the rows of several, one after another. They are dense, cut along the rows if at all, have the same
    columns, blocks and kind of levels, and fall in bits. Raises ValueError for others."""
    layouts = [weight.layout for weight in weights]
    first = layouts[0]
    widths = [bits for layout in layouts for bits, _, _ in layout.submatrices()]
    for layout in layouts:
        whole = layout.pattern.keep == 0 and layout.segment_axis == 0
        if not whole or _rows_of(layout) != _rows_of(first):
            raise ValueError(f"rows of {layout} cannot follow those of {first}")
    if widths != sorted(widths, reverse=True):
        raise ValueError(f"rows of {widths} bits, one after another, do not fall in bits")
    segments = tuple(sum(sizes) for sizes in zip(*(layout.segments for layout in layouts), strict=True))
    return PackedWeight(
        replace(first, rows=sum(segments), segments=segments),
        np.concatenate([weight.codes for weight in weights]),
        weights[0].pattern,
        np.concatenate([weight.scales for weight in weights]),
    )


def _rows_of(layout: Layout) -> tuple[int, int, bool]:
    """What dense rows have in common: columns, size of their blocks, kind of their levels."""
    return layout.columns, layout.block_size, layout.midrise


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


def _pack_rows(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack each row in chunks: [rows, columns] → [rows, columns · bits / 8]."""
    rows, columns = codes.shape
    whole = columns // CHUNK * CHUNK
    chunks = pack_chunks(codes[:, :whole].reshape(rows, -1, CHUNK), bits).reshape(rows, -1)
    return np.concatenate([chunks, pack_chunks(codes[:, whole:], bits)], axis=1)


def _unpack_rows(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Inverse of :func:`_pack_rows`."""
    rows, size = stored.shape
    whole = size // (8 * bits) * (8 * bits)
    chunks = unpack_chunks(stored[:, :whole].reshape(rows, -1, 8 * bits), bits).reshape(rows, -1)
    return np.concatenate([chunks, unpack_chunks(stored[:, whole:], bits)], axis=1)


def _in_tiles(kept: NDArray[np.uint8], pattern: Pattern) -> NDArray[np.uint8]:
    """Bring what is stored for the kept entries from [rows, kept of a row] to [tiles, steps, n, 64], with zeros for
    missing rows."""
    filled = np.pad(kept, ((0, -len(kept) % TILE_ROWS), (0, 0)))
    tiles = filled.reshape(-1, TILE_ROWS, kept.shape[1] // (STEP_GROUPS * pattern.keep), STEP_GROUPS, pattern.keep)
    return tiles.transpose(0, 2, 4, 1, 3).reshape(len(tiles), -1, pattern.keep, CHUNK)


def _out_of_tiles(chunks: NDArray[np.uint8], rows: int, pattern: Pattern) -> NDArray[np.uint8]:
    """Inverse of :func:`_in_tiles`: [tiles · steps · n, 64] → [rows, kept of a row]."""
    tiles = chunks.reshape(-(-rows // TILE_ROWS), -1, pattern.keep, TILE_ROWS, STEP_GROUPS)
    return tiles.transpose(0, 3, 1, 4, 2).reshape(len(tiles) * TILE_ROWS, -1)[:rows]


def _scales_in_tiles(scales: NDArray[np.float16]) -> NDArray[np.float16]:
    """Bring scales from [rows, blocks] to [tiles, blocks, 16], with zeros for missing rows."""
    filled = np.pad(scales, ((0, -len(scales) % TILE_ROWS), (0, 0)))
    return filled.reshape(-1, TILE_ROWS, scales.shape[1]).swapaxes(1, 2)


def _logical_scales(packed: PackedWeight) -> NDArray[np.float16]:
    """The scales as [rows, blocks], however they are stored."""
    layout = packed.layout
    if not layout.pattern.is_n_of_m:
        return packed.scales
    parts, first = [], 0
    for rows in layout.row_ranges():
        count = rows.stop - rows.start
        tiles = packed.scales[first : first + layout.tiles(count)]
        parts.append(tiles.swapaxes(1, 2).reshape(-1, layout.scales_shape[1])[:count])
        first += len(tiles)
    return np.concatenate(parts)


def _joined(parts: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.concatenate([part.reshape(-1) for part in parts]) if parts else np.zeros(0, np.uint8)


def _bitmap_counts(layout: Layout, pattern: NDArray[np.uint8]) -> list[int] | None:
    """Kept entries of each segment of a bitmap whose ``pattern`` is complete."""
    if layout.pattern.keep == 0 or layout.pattern.is_n_of_m:
        return None
    return [int(part.sum()) for part in _bitmap_parts(layout, pattern)]


def _bitmap_parts(layout: Layout, pattern: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    reader = _Reader(pattern)
    for _, rows, columns in layout.submatrices():
        yield reader.stream((rows.stop - rows.start) * (columns.stop - columns.start), 1)


class _Reader:
    """Takes one part after another from the front of a vector of bytes."""

    def __init__(self, stored: NDArray[np.uint8]) -> None:
        self.rest = stored

    def chunks(self, count: int, bits: int) -> NDArray[np.uint8]:
        """Take ``count`` whole chunks: uint8 [count, 64]."""
        return unpack_chunks(self.bytes(count * 8 * bits).reshape(count, 8 * bits), bits)

    def stream(self, count: int, bits: int) -> NDArray[np.uint8]:
        """Take a stream of ``count`` integers: uint8 [count]."""
        return unpack_bits(self.bytes(packed_size(count, bits)), bits, count)

    def bytes(self, size: int) -> NDArray[np.uint8]:
        """Take ``size`` bytes as they are."""
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken
