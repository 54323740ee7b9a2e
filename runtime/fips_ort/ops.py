"""The ops of domain ``ai.fips``: names and attributes, shared by exporters, kernels' tests and validation."""

from fips_ort.layout import BIT_WIDTHS, Layout

DOMAIN = "ai.fips"
VERSION = 1
Q_MATMUL = "QMatMul"
SPARSE_Q_MATMUL = "SparseQMatMul"
BITMAP_Q_MATMUL = "BitmapQMatMul"
Q_GATHER = "QGather"
CACHED_ATTENTION = "CachedAttention"
QK_NORM_CACHED_ATTENTION = "QKNormCachedAttention"
_SEGMENTS = tuple(f"size_{bits}bit" for bits in BIT_WIDTHS)
_ATTENTION = ("num_heads", "kv_num_heads", "local_window_size", "scale")
_PRODUCT = ("K", "N", "transB", "block_size", "segment_axis", *_SEGMENTS, "midrise", "accuracy_level")
ATTRIBUTES = {
    Q_MATMUL: _PRODUCT,
    SPARSE_Q_MATMUL: (*_PRODUCT, "keep", "of"),
    BITMAP_Q_MATMUL: _PRODUCT,
    Q_GATHER: ("K", "N", "block_size", *_SEGMENTS, "midrise"),
    CACHED_ATTENTION: _ATTENTION,
    QK_NORM_CACHED_ATTENTION: (*_ATTENTION, "epsilon"),
}
"""Attribute names per op, all present on every node; all are integers but ``scale`` and ``epsilon``."""

HEAD_STEP = 16
"""Of what the size of heads is a multiple in the attention ops."""


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
        **dict(zip(_SEGMENTS, layout.segments, strict=True)),
        "midrise": int(layout.midrise),
        "accuracy_level": accuracy_level,
    }
    if layout.pattern.is_n_of_m:
        attributes |= {"keep": layout.pattern.keep, "of": layout.pattern.of}
    return attributes


def gather_attributes(layout: Layout) -> dict[str, int]:
    """All attributes of a QGather node that looks up rows of a weight of this layout. Raises ValueError unless it is
    dense and not cut into segments of columns."""
    if layout.pattern.keep or layout.segment_axis:
        cut = "columns" if layout.segment_axis else "rows"
        raise ValueError(f"QGather reads dense weights cut into rows; this one is {layout.pattern}, cut into {cut}")
    return {
        "K": layout.columns,
        "N": layout.rows,
        "block_size": layout.block_size,
        **dict(zip(_SEGMENTS, layout.segments, strict=True)),
        "midrise": int(layout.midrise),
    }
