"""The ops of domain ``ai.fips``: names and attributes, shared by exporters, kernels' tests and validation."""

from fips_ort.layout import BIT_WIDTHS, Layout

DOMAIN = "ai.fips"
VERSION = 1
Q_MATMUL = "QMatMul"
SPARSE_Q_MATMUL = "SparseQMatMul"
BITMAP_Q_MATMUL = "BitmapQMatMul"
_COMMON = (
    "K", "N", "transB", "block_size", "segment_axis", *(f"size_{bits}bit" for bits in BIT_WIDTHS), "midrise",
    "accuracy_level",
)
ATTRIBUTES = {Q_MATMUL: _COMMON, SPARSE_Q_MATMUL: (*_COMMON, "keep", "of"), BITMAP_Q_MATMUL: _COMMON}
"""Attribute names per op; all are integers and all are present on every node."""


def op_type(layout: Layout) -> str:
    """The op that multiplies with a weight of this layout."""
    if layout.pattern.is_n_of_m:
        return SPARSE_Q_MATMUL
    return BITMAP_Q_MATMUL if layout.pattern.keep else Q_MATMUL


def node_attributes(layout: Layout, trans_b: bool, accuracy_level: int) -> dict[str, int]:
    """All attributes of a node that reads a weight of this layout as B = S.T (``trans_b``) or B = S."""
    if accuracy_level not in (0, 4):
        raise ValueError(f"accuracy_level must be 0 or 4, got {accuracy_level}")
    attributes = {
        "K": layout.columns if trans_b else layout.rows,
        "N": layout.rows if trans_b else layout.columns,
        "transB": int(trans_b),
        "block_size": layout.block_size,
        "segment_axis": layout.segment_axis,
        **{f"size_{bits}bit": size for bits, size in zip(BIT_WIDTHS, layout.segments, strict=True)},
        "midrise": int(layout.midrise),
        "accuracy_level": accuracy_level,
    }
    if layout.pattern.is_n_of_m:
        attributes |= {"keep": layout.pattern.keep, "of": layout.pattern.of}
    return attributes
