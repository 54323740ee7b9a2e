"""Linear layers, token table and output layer outside the MLPs as stored, by their paths in the model (numpy only).

Rows are outputs: [out_features, in_features] of a linear layer, [tokens, width] of a table; where a block size does not
divide them, they are filled up. A table may have its rows in tiers of bits: it is stored tier by tier, and ``row_bits``
says which tier each token is in (:mod:`fips_ort.row_order`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.packed_file import PackedReader, PackedWriter
from fips_ort.layout import Layout, Segments, fitting_block_size, padded_to_blocks
from fips_ort.packed import PackedWeight
from fips_ort.row_order import stored_rows

_FORMAT = "fips-packed-rest"
_VERSION = 1
_SMALLEST_BLOCK = 16
"""Smaller blocks would double the bits of 4-bit weights, and few kernels take them."""


def rest_block_size(features: int, block_size: int) -> int:
    """The size of the blocks in which rows of ``features`` values take the fewest bits, ``block_size`` at most
    (:func:`fips_ort.layout.fitting_block_size`)."""
    return fitting_block_size(features, block_size, _SMALLEST_BLOCK)


def rest_layout(features: int, segments: Segments, block_size: int) -> Layout:
    """The layout of rows of ``features`` values, as many with 8, 4, 3 and 2 bits as ``segments`` says.

    ``block_size``: at most (:func:`rest_block_size`). Levels are midrise: at few bits none is lost to being the only
    one without a counterpart, and at 8 it makes no difference.
    """
    block_size = rest_block_size(features, block_size)
    return Layout(sum(segments), padded_to_blocks(features, block_size), block_size, segments, midrise=True)


@dataclass(frozen=True, slots=True, eq=False)
class PackedTable:
    """A table whose row ``n`` belongs to token ``n``: ``row_bits`` uint8 [tokens] has the bits of each, or is None if
    rows are stored in the order of tokens. Raises ValueError if ``row_bits`` do not fit the layout of ``weight``."""

    weight: PackedWeight
    row_bits: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        stored_rows(self.row_bits, self.weight.layout)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.weight.nbytes + (0 if self.row_bits is None else self.row_bits.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class PackedRest:
    """Weights by module path: ``linears``, and ``tables`` of tokens. An output layer that is tied to the token table
    has none of its own."""

    linears: dict[str, PackedWeight] = field(default_factory=dict)
    tables: dict[str, PackedTable] = field(default_factory=dict)

    def weights(self) -> dict[str, PackedWeight]:
        """Every packed weight once, by its path."""
        return {**self.linears, **{path: table.weight for path, table in self.tables.items()}}


def save_packed_rest(rest: PackedRest, path: Path) -> None:
    """Write ``rest`` as one safetensors file. Inverse: :func:`load_packed_rest`."""
    writer = PackedWriter()
    linears = {name: writer.weight(name, weight) for name, weight in rest.linears.items()}
    tables = {
        name: {
            "layout": writer.weight(name, table.weight),
            "row_bits": writer.optional(name, "row_bits", table.row_bits),
        }
        for name, table in rest.tables.items()
    }
    writer.save(path, _FORMAT, {"version": _VERSION, "linears": linears, "tables": tables})


def load_packed_rest(path: Path) -> PackedRest:
    """Read what :func:`save_packed_rest` wrote. Raises ValueError if the file is of another kind or version."""
    with PackedReader(path, _FORMAT, _VERSION) as reader:
        structure: Mapping[str, Any] = reader.structure
        return PackedRest(
            {name: reader.weight(name, layout) for name, layout in structure["linears"].items()},
            {
                name: PackedTable(
                    reader.weight(name, entry["layout"]), reader.optional(name, "row_bits", entry["row_bits"])
                )
                for name, entry in structure["tables"].items()
            },
        )
