"""How a quantized matrix is laid out in bytes: shape, bit-widths, scales and sparsity pattern.

A packed weight is a matrix ``S`` of ``rows × columns``. Each row is cut into *blocks* of ``block_size``
columns; a block has one float16 scale. One axis (``segment_axis``; the rank axis of the factorization) may be
cut into up to four *segments* stored with 8, 4, 3 and 2 bits, always in this order (graded precision: rank
entries can be permuted freely, so sorting them by bit-width loses nothing).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fips_ort.bits import packed_size

BIT_WIDTHS = (8, 4, 3, 2)
"""Bit-widths of the segments, in the order in which they are stored."""
Segments = tuple[int, ...]
"""How many entries along an axis each of :data:`BIT_WIDTHS` has, in this order."""
TILE_ROWS = 16
"""Rows whose entries lie together in n:m weights."""
STEP_GROUPS = 4
"""Groups of m columns whose entries lie together in n:m weights."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which entries of a matrix are stored.

    ``keep`` of every ``of`` consecutive columns are stored (n:m), except for the two special forms
    :data:`DENSE` (everything) and :data:`BITMAP` (any set, one bit per entry).
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        if (self.keep, self.of) not in _PATTERN_NAMES:
            raise ValueError(f"unsupported pattern {self.keep}:{self.of}; supported: {', '.join(PATTERNS)}")

    @classmethod
    def parse(cls, name: str) -> "Pattern":
        """The pattern called ``name``, one of :data:`PATTERNS`. Raises ValueError for others."""
        for key, known in _PATTERN_NAMES.items():
            if known == name:
                return cls(*key)
        raise ValueError(f"unsupported pattern {name!r}; supported: {', '.join(PATTERNS)}")

    def __str__(self) -> str:
        return _PATTERN_NAMES[self.keep, self.of]

    @property
    def is_n_of_m(self) -> bool:
        """Whether the same number of entries is kept in every group of columns."""
        return self.of > 1

    @property
    def index_bits(self) -> int:
        """Bits of one entry of the pattern stream: an index within its ``of`` columns, or a bitmap bit."""
        return {0: 0, 1: 1, 4: 2, 8: 3}[self.of]


_PATTERN_NAMES = {(0, 0): "dense", (1, 1): "bitmap", (1, 4): "1:4", (2, 4): "2:4", (1, 8): "1:8", (2, 8): "2:8"}
PATTERNS = tuple(_PATTERN_NAMES.values())
"""Names of all patterns."""
DENSE = Pattern(0, 0)
BITMAP = Pattern(1, 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything about a packed weight except its data.

    ``segments`` holds the number of entries along ``segment_axis`` (0 = rows, 1 = columns) stored with each of
    :data:`BIT_WIDTHS`. ``midrise``: a signed level ``q`` in ``-2**(bits-1) … 2**(bits-1)-1`` stands for
    ``(q + 0.5) * scale`` instead of ``q * scale``, which uses all levels symmetrically and has no zero.

    Raises ValueError for sizes that do not fit together: every cut along the columns must be a multiple of
    ``block_size``, and a block must hold whole bytes of stored codes.
    """

    rows: int
    columns: int
    block_size: int
    segments: Segments
    segment_axis: int = 0
    midrise: bool = False
    pattern: Pattern = field(default=DENSE)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"rows and columns must be positive, got {self.rows} x {self.columns}")
        if self.segment_axis not in (0, 1):
            raise ValueError(f"segment_axis must be 0 or 1, got {self.segment_axis}")
        if self.block_size < 1 or self.columns % self.block_size:
            raise ValueError(f"block_size {self.block_size} does not divide the {self.columns} columns")
        check_block_size(self.block_size, self.pattern)
        length = self.columns if self.segment_axis else self.rows
        if len(self.segments) != len(BIT_WIDTHS):
            raise ValueError(f"segments {self.segments} are not {len(BIT_WIDTHS)}, one for each of {BIT_WIDTHS} bits")
        if min(self.segments) < 0 or sum(self.segments) != length:
            raise ValueError(
                f"segments {self.segments} do not add up to the {length} entries of axis {self.segment_axis}",
            )
        if self.segment_axis == 1 and any(size % self.block_size for size in self.segments):
            raise ValueError(
                f"segments {self.segments} along the columns are not multiples of block_size {self.block_size}",
            )

    @classmethod
    def uniform(cls, rows: int, columns: int, bits: int, block_size: int, *, midrise: bool = False,
                segment_axis: int = 0, pattern: Pattern = DENSE) -> "Layout":
        """A layout with one of :data:`BIT_WIDTHS` for the whole matrix."""
        segments = segments_with({bits: columns if segment_axis else rows})
        return cls(rows, columns, block_size, segments, segment_axis, midrise, pattern)

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape of the float16 scales: (rows, blocks per row)."""
        return self.rows, self.columns // self.block_size

    @property
    def stored_scales_shape(self) -> tuple[int, ...]:
        """Shape of the scales as they are stored: (rows, blocks per row), for n:m (tiles, blocks per row, 16)."""
        if not self.pattern.is_n_of_m:
            return self.scales_shape
        tiles = sum(self.tiles(rows.stop - rows.start) for rows in self.row_ranges())
        return tiles, self.scales_shape[1], TILE_ROWS

    @property
    def pattern_bytes(self) -> int:
        """Bytes of the stored pattern."""
        if self.pattern.is_n_of_m:
            return sum(self._chunks(part) for part in self.submatrices()) * 8 * self.pattern.index_bits
        return sum(packed_size(_entries(part), self.pattern.index_bits) for part in self.submatrices())

    def code_bytes(self, kept: Sequence[int] | None = None) -> int:
        """Bytes of the stored codes. ``kept``: how many entries each non-empty segment keeps; needed for bitmaps only,
        which raise ValueError without it."""
        parts = self.submatrices()
        if self.pattern.is_n_of_m:
            return sum(self._chunks(part) * 8 * part[0] for part in parts)
        if self.pattern.keep == 0:
            return sum(_entries(part) * part[0] // 8 for part in parts)
        if kept is None:
            raise ValueError("the bytes of a bitmap's codes depend on how many entries are kept")
        return sum(packed_size(count, bits) for count, (bits, _, _) in zip(kept, parts, strict=True))

    def tiles(self, rows: int) -> int:
        """Tiles of 16 rows that hold ``rows`` rows of a segment."""
        return -(-rows // TILE_ROWS)

    def steps(self, columns: int) -> int:
        """Steps of 4 groups in ``columns`` columns of a segment (n:m)."""
        return columns // (STEP_GROUPS * self.pattern.of)

    def row_ranges(self) -> list[slice]:
        """The rows of each non-empty segment, or all rows if the columns are cut."""
        return [slice(0, self.rows)] if self.segment_axis else [rows for _, rows, _ in self.submatrices()]

    def _chunks(self, part: tuple[int, slice, slice]) -> int:
        """Chunks of codes in one segment (n:m)."""
        _, rows, columns = part
        return self.tiles(rows.stop - rows.start) * self.steps(columns.stop - columns.start) * self.pattern.keep

    def submatrices(self) -> list[tuple[int, slice, slice]]:
        """``(bits, rows, columns)`` of each non-empty segment, in storage order."""
        result = []
        start = 0
        for bits, size in zip(BIT_WIDTHS, self.segments, strict=True):
            if size:
                part = slice(start, start + size)
                rows, columns = slice(0, self.rows), slice(0, self.columns)
                result.append((bits, rows, part) if self.segment_axis else (bits, part, columns))
            start += size
        return result


def segments_with(sizes: Mapping[int, int]) -> Segments:
    """Segments with these ``sizes`` by their bits, and empty ones for the other widths. Raises ValueError for bits
    that are none of :data:`BIT_WIDTHS`."""
    for bits in sizes:
        if bits not in BIT_WIDTHS:
            raise ValueError(f"bits must be one of {sorted(BIT_WIDTHS)}, got {bits}")
    return tuple(sizes.get(bits, 0) for bits in BIT_WIDTHS)


def _entries(part: tuple[int, slice, slice]) -> int:
    _, rows, columns = part
    return (rows.stop - rows.start) * (columns.stop - columns.start)


def smallest_block_size(pattern: Pattern) -> int:
    """The block size of which all others are multiples: the stored codes of one block fill whole bytes at every
    bit-width."""
    return 8 * pattern.of // pattern.keep if pattern.is_n_of_m else 8


def check_block_size(block_size: int, pattern: Pattern) -> None:
    """Raise ValueError unless the stored codes of one block fill whole bytes at every bit-width."""
    smallest = smallest_block_size(pattern)
    if block_size % smallest:
        raise ValueError(f"block_size {block_size} is not a multiple of {smallest}, as pattern {pattern} needs")


def padded_to_blocks(columns: int, block_size: int) -> int:
    """``columns`` and as many more as fill the last block."""
    return -(-columns // block_size) * block_size


def fitting_block_size(columns: int, block_size: int, smallest: int) -> int:
    """The one of ``block_size``, its half, its quarter and so on, down to ``smallest``, with which a row of ``columns``
    values takes the fewest bits: 4 for a value, also for those that fill the last block, and 16 for a scale. The
    largest of equals, so ``block_size`` itself wherever it divides ``columns``."""
    best, fewest = block_size, 0
    while block_size >= smallest:
        length = padded_to_blocks(columns, block_size)
        bits = 4 * length + 16 * (length // block_size)
        if not fewest or bits < fewest:
            best, fewest = block_size, bits
        block_size //= 2
    return best
