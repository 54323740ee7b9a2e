"""The ops of domain ``ai.fips`` as ONNX functions: how an artefact runs without the native library.

The bodies are written in ONNX's textual syntax and are the executable specification of the ops beside
:mod:`fips_ort.packed`. Everything except the product itself depends on initializers only, so ONNX Runtime
folds the decoding into a float32 matrix when it loads a model with graph optimizations on. It keeps every
intermediate result until then, so codes and masks stay uint8 and bool, and indices int32, as long as they can.
"""

from collections.abc import Collection

import onnx
import onnx.parser

from fips_ort.bits import CHUNK
from fips_ort.layout import BIT_WIDTHS, STEP_GROUPS, TILE_ROWS
from fips_ort.ops import (
    ATTRIBUTES,
    BITMAP_Q_MATMUL,
    CACHED_ATTENTION,
    DOMAIN,
    Q_GATHER,
    Q_MATMUL,
    QK_NORM_CACHED_ATTENTION,
    SPARSE_Q_MATMUL,
)

MINIMUM_OPSET = 18
"""The first ONNX opset with every operator of the bodies (BitwiseAnd)."""


def op_functions(ops: Collection[str] = tuple(ATTRIBUTES), opset: int = MINIMUM_OPSET) -> list[onnx.FunctionProto]:
    """The functions of ``ops``, generic over all attributes and over the optional inputs.

    ``opset`` is the ONNX opset that the model imports: functions and model must import the same one. Raises
    ValueError below 18. ``accuracy_level`` is a permission to round activations, which the functions do not use.
    """
    if opset < MINIMUM_OPSET:
        raise ValueError(f"the functions need opset {MINIMUM_OPSET} or later, got {opset}")
    return [_function(opset, name, *_SIGNATURES[name]) for name in ATTRIBUTES if name in ops]


def _function(opset: int, name: str, inputs: str, outputs: str, body: str) -> onnx.FunctionProto:
    microsoft = ', "com.microsoft" : 1' if "com.microsoft." in body else ""
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}{microsoft}]>'
    attributes = ", ".join(ATTRIBUTES[name])
    return onnx.parser.parse_function(f"{header}\n{name} <{attributes}> ({inputs}) => ({outputs})\n{{\n{body}}}")


def _attribute(name: str) -> str:
    """``name`` as an int64 vector of one element."""
    return f"""
    {name}_scalar = Constant <value_int: int = @{name}> ()
    {name}_1 = Reshape ({name}_scalar, one)
"""


def _ints(*values: int, dtype: str = "uint8") -> str:
    """A constant vector in textual syntax."""
    return f"{dtype}[{len(values)}] {{{', '.join(map(str, values))}}}"


_CONSTANTS = f"""
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    minus_one = Constant <value_ints = [-1]> ()
    seven = Constant <value_ints = [7]> ()
    eight = Constant <value_ints = [8]> ()
    four = Constant <value_ints = [4]> ()
    zero_0 = Squeeze (zero)
    one_0 = Squeeze (one)
    widths = Constant <value_ints = [{", ".join(map(str, BIT_WIDTHS))}]> ()
""" + "".join(f"""
    index_{bits} = Constant <value_ints = [{index}]> ()
    next_{bits} = Constant <value_ints = [{index + 1}]> ()
""" for index, bits in enumerate(BIT_WIDTHS))

# segment_sizes [4].
_SEGMENT_SIZES = f"""
    {"".join(_attribute(f"size_{bits}bit") for bits in BIT_WIDTHS)}
    segment_sizes = Concat <axis = 0> ({", ".join(f"size_{bits}bit_1" for bits in BIT_WIDTHS)})
"""

# rows and columns of the whole matrix; segment_rows and segment_columns [4] of the submatrices.
_SIZES = f"""
    {_CONSTANTS}
    {"".join(_attribute(name) for name in ("K", "N", "transB", "block_size", "segment_axis"))}
    {_SEGMENT_SIZES}
    transposed = Cast <to = 9> (transB_1)
    rows = Where (transposed, N_1, K_1)
    columns = Where (transposed, K_1, N_1)
    along_columns = Cast <to = 9> (segment_axis_1)
    segment_rows = Where (along_columns, rows, segment_sizes)
    segment_columns = Where (along_columns, segment_sizes, columns)
""" + "".join(f"""
    rows_{bits} = Gather (segment_rows, index_{bits})
    columns_{bits} = Gather (segment_columns, index_{bits})
    shape_{bits} = Concat <axis = 0> (rows_{bits}, columns_{bits})
""" for bits in BIT_WIDTHS)


def _ends(name: str, counts: str) -> str:
    """{name} [5]: where each of four parts of ``counts`` elements starts and ends."""
    return f"""
    {name}_tail = CumSum ({counts}, zero)
    {name} = Concat <axis = 0> (zero, {name}_tail)
"""


# --- the order of rows -----------------------------------------------------------------------------------------


def _rows_of_width(bits: int, before: str) -> str:
    """order_{bits} int64 [rows]: ``before``, but where rows of this width are stored."""
    return f"""
    width_{bits} = Constant <value = {_ints(bits, dtype="int32")}> ()
    has_width_{bits} = Equal (row_widths, width_{bits})
    counted_{bits} = Cast <to = 7> (has_width_{bits})
    earlier_{bits} = CumSum <exclusive = 1> (counted_{bits}, zero)
    segment_start_{bits} = Gather (segment_ends, index_{bits})
    stored_row_{bits} = Add (earlier_{bits}, segment_start_{bits})
    order_{bits} = Where (has_width_{bits}, stored_row_{bits}, {before})
"""


def _row_order(rows: str) -> str:
    """stored_order int64: where each of ``rows`` [1] rows is stored.

    QuantizeLinear adds its zero point, if there is one, to zeros: so an input that is not there becomes zeros. No row
    has 0 bits; all keep their places then.
    """
    before = ("stored_places", *(f"order_{bits}" for bits in BIT_WIDTHS))
    return f"""
    no_values = ConstantOfShape <value = float[1] {{0.0}}> ({rows})
    unit_scales = ConstantOfShape <value = float[1] {{1.0}}> ({rows})
    given_widths = QuantizeLinear <axis = 0> (no_values, unit_scales, row_bits)
    row_widths = Cast <to = 6> (given_widths)
    all_rows_0 = Squeeze ({rows})
    stored_places = Range (zero_0, all_rows_0, one_0)
    {_ends("segment_ends", "segment_sizes")}
    {"".join(map(_rows_of_width, BIT_WIDTHS, before))}
    stored_order = Identity (order_{BIT_WIDTHS[-1]})
"""


# --- chunks of 64 ----------------------------------------------------------------------------------------------


def _plane(name: str, stored: str, bits: int, shape: str = "chunk_shape") -> str:
    """{name} [chunks, w] uint8 from a plane of chunks, ``stored`` [chunks, w · bits / 8]. ``shape``: [-1, w]."""
    return f"""
    {name}_columns = Unsqueeze ({stored}, one)
    {name}_places = Constant <value = uint8[{8 // bits}, 1] {{{", ".join(map(str, range(0, 8, bits)))}}}> ()
    {name}_shifted = BitShift <direction = "RIGHT"> ({name}_columns, {name}_places)
    {name}_lowest = Constant <value = {_ints((1 << bits) - 1)}> ()
    {name}_fields = BitwiseAnd ({name}_shifted, {name}_lowest)
    {name} = Reshape <allowzero = 1> ({name}_fields, {shape})
"""


def _two_planes(
    name: str, stored: str, low_end: str = "sixteen", high_end: str = "twenty_four", shape: str = "chunk_shape"
) -> str:
    """{name} [chunks, w] uint8 from ``stored`` [chunks, 3 · w / 8]: a plane of the lower two bits, which ends at the
    value called ``low_end``, and one of the highest bit, which ends at ``high_end``."""
    return f"""
    {name}_low_bytes = Slice ({stored}, zero, {low_end}, one)
    {name}_high_bytes = Slice ({stored}, {low_end}, {high_end}, one)
    {_plane(f"{name}_low", f"{name}_low_bytes", 2, shape)}
    {_plane(f"{name}_high", f"{name}_high_bytes", 1, shape)}
    {name}_two = Constant <value = {_ints(2)}> ()
    {name}_moved = BitShift <direction = "LEFT"> ({name}_high, {name}_two)
    {name} = BitwiseOr ({name}_low, {name}_moved)
"""


_CHUNK_SIZES = f"""
    sixteen = Constant <value_ints = [16]> ()
    twenty_four = Constant <value_ints = [24]> ()
    chunk_shape = Constant <value_ints = [-1, {CHUNK}]> ()
    chunk_bytes = Mul (widths, eight)
"""


def _segment_bytes(bits: int) -> str:
    """bytes_{bits}: the stored codes of one segment. Needs byte_counts [4] and byte_ends [5]."""
    return f"""
    byte_start_{bits} = Gather (byte_ends, index_{bits})
    byte_end_{bits} = Gather (byte_ends, next_{bits})
    bytes_{bits} = Slice (codes, byte_start_{bits}, byte_end_{bits})
"""


def _chunk_codes(bits: int, stored: str) -> str:
    """codes_{bits} uint8 [chunks, 64] from ``stored`` [chunks, 8 · bits]."""
    return _two_planes("codes_3", stored) if bits == 3 else _plane(f"codes_{bits}", stored, bits)


def _dense_entries(bits: int) -> str:
    """entry_codes_{bits} uint8 [rows, columns]. Rows are whole chunks, then a shorter one of rest_{bits} columns, which
    may be 0."""
    rest = f"rest_codes_{bits}"
    if bits == 3:
        rest_codes = _two_planes(rest, "rest_3_bytes", "rest_3_low", "rest_size_3", "rest_shape_3")
    else:
        rest_codes = _plane(rest, f"rest_{bits}_bytes", bits, f"rest_shape_{bits}")
    return f"""
    stored_shape_{bits} = Concat <axis = 0> (rows_{bits}, row_bytes_{bits})
    stored_rows_{bits} = Reshape <allowzero = 1> (bytes_{bits}, stored_shape_{bits})
    whole_chunks_{bits} = Gather (whole_chunks, index_{bits})
    chunk_bytes_{bits} = Constant <value_ints = [{8 * bits}]> ()
    whole_size_{bits} = Mul (whole_chunks_{bits}, chunk_bytes_{bits})
    whole_bytes_{bits} = Slice (stored_rows_{bits}, zero, whole_size_{bits}, one)
    all_chunks_{bits} = Mul (rows_{bits}, whole_chunks_{bits})
    whole_shape_{bits} = Concat <axis = 0> (all_chunks_{bits}, chunk_bytes_{bits})
    stored_{bits} = Reshape <allowzero = 1> (whole_bytes_{bits}, whole_shape_{bits})
    {_chunk_codes(bits, f"stored_{bits}")}
    whole_columns_{bits} = Mul (whole_chunks_{bits}, chunk)
    whole_codes_shape_{bits} = Concat <axis = 0> (rows_{bits}, whole_columns_{bits})
    whole_codes_{bits} = Reshape <allowzero = 1> (codes_{bits}, whole_codes_shape_{bits})
    rest_{bits} = Sub (columns_{bits}, whole_columns_{bits})
    rest_shape_{bits} = Concat <axis = 0> (rows_{bits}, rest_{bits})
    rest_{bits}_bytes = Slice (stored_rows_{bits}, whole_size_{bits}, row_bytes_{bits}, one)
    rest_size_{bits} = Sub (row_bytes_{bits}, whole_size_{bits})
    rest_{bits}_low = Div (rest_{bits}, four)
    {rest_codes}
    entry_codes_{bits} = Concat <axis = 1> (whole_codes_{bits}, {rest})
"""


# Sizes of dense rows. Needs segment_columns [4].
_DENSE_ROWS = f"""
    {_CHUNK_SIZES}
    chunk = Constant <value_ints = [{CHUNK}]> ()
    bits_of_rows = Mul (segment_columns, widths)
    row_bytes = Div (bits_of_rows, eight)
    whole_chunks = Div (segment_columns, chunk)
""" + "".join(f"""
    row_bytes_{bits} = Gather (row_bytes, index_{bits})
""" for bits in BIT_WIDTHS)

# entry_codes_{bits} uint8 [rows, columns] of each segment; stored_order.
_DENSE = f"""
    {_row_order("rows")}
    {_DENSE_ROWS}
    byte_counts = Mul (segment_rows, row_bytes)
    {_ends("byte_ends", "byte_counts")}
    {"".join(_segment_bytes(bits) + _dense_entries(bits) for bits in BIT_WIDTHS)}
"""


def _kept(name: str, chunks: str, bits: int) -> str:
    """{name}_first and {name}_last [rows, groups, 1]: what ``chunks`` [chunks, 64] hold for the first and for the last
    kept entry of each group."""
    return f"""
    {name}_tiles = Reshape <allowzero = 1> ({chunks}, tiled_shape_{bits})
    {name}_by_rows = Transpose <perm = [0, 3, 1, 4, 2]> ({name}_tiles)
    {name}_all_rows = Reshape <allowzero = 1> ({name}_by_rows, grouped_shape_{bits})
    {name}_rows = Slice ({name}_all_rows, zero, rows_{bits})
    {name}_first = Slice ({name}_rows, zero, one, two)
    {name}_last = Slice ({name}_rows, last_kept, keep_1, two)
"""


def _n_of_m_entries(bits: int) -> str:
    return f"""
    {_segment_bytes(bits)}
    bytes_shape_{bits} = Constant <value_ints = [-1, {8 * bits}]> ()
    stored_{bits} = Reshape (bytes_{bits}, bytes_shape_{bits})
    {_chunk_codes(bits, f"stored_{bits}")}
    tiles_{bits} = Gather (tiles, index_{bits})
    steps_{bits} = Gather (steps, index_{bits})
    tiled_shape_{bits} = Concat <axis = 0> (tiles_{bits}, steps_{bits}, keep_1, tile_rows, step_groups)
    all_rows_{bits} = Mul (tiles_{bits}, tile_rows)
    groups_{bits} = Mul (steps_{bits}, step_groups)
    grouped_shape_{bits} = Concat <axis = 0> (all_rows_{bits}, groups_{bits}, keep_1)
    chunk_start_{bits} = Gather (chunk_ends, index_{bits})
    chunk_end_{bits} = Gather (chunk_ends, next_{bits})
    indices_{bits} = Slice (indices, chunk_start_{bits}, chunk_end_{bits})
    {_kept(f"place_{bits}", f"indices_{bits}", bits)}
    {_kept(f"code_{bits}", f"codes_{bits}", bits)}
    is_first_{bits} = Equal (place_{bits}_first, positions)
    is_last_{bits} = Equal (place_{bits}_last, positions)
    group_codes_{bits} = Where (is_first_{bits}, code_{bits}_first, code_{bits}_last)
    entry_codes_{bits} = Reshape <allowzero = 1> (group_codes_{bits}, shape_{bits})
    group_mask_{bits} = Or (is_first_{bits}, is_last_{bits})
    mask_{bits} = Reshape <allowzero = 1> (group_mask_{bits}, shape_{bits})
"""


def _scale_rows(bits: int) -> str:
    """scale_index_{bits}: where a segment's rows are among the rows of all tiles."""
    return f"""
    scale_start_{bits} = Gather (scale_starts, index_{bits})
    scale_count_{bits} = Gather (scale_counts, index_{bits})
    scale_end_{bits} = Add (scale_start_{bits}, scale_count_{bits})
    scale_first_{bits} = Squeeze (scale_start_{bits})
    scale_limit_{bits} = Squeeze (scale_end_{bits})
    scale_index_{bits} = Range (scale_first_{bits}, scale_limit_{bits}, one_0)
"""


# entry_codes_{bits} uint8 and mask_{bits} bool [rows, columns] of each segment; scale_matrix [rows, blocks].
_N_OF_M = f"""
    {_attribute("keep")}{_attribute("of")}
    two = Constant <value_ints = [2]> ()
    tile_rows = Constant <value_ints = [{TILE_ROWS}]> ()
    tile_rows_less_one = Constant <value_ints = [{TILE_ROWS - 1}]> ()
    step_groups = Constant <value_ints = [{STEP_GROUPS}]> ()
    last_kept = Sub (keep_1, one)
    tile_reach = Add (segment_rows, tile_rows_less_one)
    tiles = Div (tile_reach, tile_rows)
    step_columns = Mul (of_1, step_groups)
    steps = Div (segment_columns, step_columns)
    tile_steps = Mul (tiles, steps)
    chunk_counts = Mul (tile_steps, keep_1)
    {_ends("chunk_ends", "chunk_counts")}
    {_CHUNK_SIZES}
    byte_counts = Mul (chunk_counts, chunk_bytes)
    {_ends("byte_ends", "byte_counts")}
    index_bits_by_of = Constant <value_ints = [0, 0, 0, 0, 2, 0, 0, 0, 3]> ()
    index_bits = Gather (index_bits_by_of, of_1)
    index_bytes = Mul (index_bits, eight)
    index_shape = Concat <axis = 0> (minus_one, index_bytes)
    stored_indices = Reshape (pattern, index_shape)
    missing_bytes = Sub (twenty_four, index_bytes)
    padding = Concat <axis = 0> (zero, zero, zero, missing_bytes)
    padded_indices = Pad (stored_indices, padding)
    {_two_planes("small_indices", "padded_indices")}
    indices = Cast <to = 6> (small_indices)
    of_0 = Squeeze (of_1)
    positions_int64 = Range (zero_0, of_0, one_0)
    positions = Cast <to = 6> (positions_int64)
    {"".join(_n_of_m_entries(bits) for bits in BIT_WIDTHS)}
    no_rows = Constant <value_ints = [0, 0, 0]> ()
    all_rows_once = Concat <axis = 0> (rows, no_rows)
    scale_counts = Where (along_columns, all_rows_once, segment_sizes)
    scale_reach = Add (scale_counts, tile_rows_less_one)
    scale_tiles = Div (scale_reach, tile_rows)
    scale_rows = Mul (scale_tiles, tile_rows)
    {_ends("scale_starts", "scale_rows")}
    {"".join(_scale_rows(bits) for bits in BIT_WIDTHS)}
    scale_index = Concat <axis = 0> ({", ".join(f"scale_index_{bits}" for bits in BIT_WIDTHS)})
    blocks_first = Transpose <perm = [0, 2, 1]> (scales)
    scale_blocks = Div (columns, block_size_1)
    scale_shape = Concat <axis = 0> (minus_one, scale_blocks)
    scales_of_tiles = Reshape (blocks_first, scale_shape)
    scale_matrix = Gather <axis = 0> (scales_of_tiles, scale_index)
"""


# --- streams ---------------------------------------------------------------------------------------------------


def _segment_codes(bits: int) -> str:
    """stored_{bits}: uint8 [kept entries of one segment].

    Codes are cut out of the bytes they touch: the byte where a code starts, shifted down, and for 3 bits the
    byte where it ends, shifted up. A shift by 7 leaves nothing within the lowest 3 bits.
    """
    unpacked = {
        8: "    all_8 = Identity (bytes_8)\n",
        4: _narrow(4),
        2: _narrow(2),
        3: f"""
    no_bytes = Constant <value = {_ints(0, 0)}> ()
    filled_3 = Concat <axis = 0> (bytes_3, no_bytes)
    filled_count_3 = Add (count_3, seven)
    groups_3 = Div (filled_count_3, eight)
    three = Constant <value_ints = [3]> ()
    whole_3 = Mul (groups_3, three)
    exact_3 = Slice (filled_3, zero, whole_3)
    triple = Constant <value_ints = [-1, 3]> ()
    triples = Reshape (exact_3, triple)
    start_byte = Constant <value_ints = [0, 0, 0, 1, 1, 1, 2, 2]> ()
    end_byte = Constant <value_ints = [0, 0, 1, 1, 1, 2, 2, 2]> ()
    start_shift = Constant <value = {_ints(0, 3, 6, 1, 4, 7, 2, 5)}> ()
    end_shift = Constant <value = {_ints(7, 7, 2, 7, 7, 1, 7, 7)}> ()
    starts_3 = Gather <axis = 1> (triples, start_byte)
    ends_3 = Gather <axis = 1> (triples, end_byte)
    low_3 = BitShift <direction = "RIGHT"> (starts_3, start_shift)
    high_3 = BitShift <direction = "LEFT"> (ends_3, end_shift)
    both_3 = BitwiseOr (low_3, high_3)
    lowest_3 = Constant <value = {_ints(7)}> ()
    codes_3 = BitwiseAnd (both_3, lowest_3)
    all_3 = Reshape (codes_3, minus_one)
""",
    }[bits]
    return f"""
    count_{bits} = Gather (counts, index_{bits})
    byte_start_{bits} = Gather (byte_ends, index_{bits})
    byte_end_{bits} = Gather (byte_ends, next_{bits})
    bytes_{bits} = Slice (codes, byte_start_{bits}, byte_end_{bits})
    {unpacked}
    stored_{bits} = Slice (all_{bits}, zero, count_{bits})
"""


def _narrow(bits: int) -> str:
    """all_{bits}: the codes of 4 or 2 bits, which never straddle bytes."""
    return f"""
    column_{bits} = Unsqueeze (bytes_{bits}, minus_one)
    shift_{bits} = Constant <value = {_ints(*range(0, 8, bits))}> ()
    shifted_{bits} = BitShift <direction = "RIGHT"> (column_{bits}, shift_{bits})
    lowest_{bits} = Constant <value = {_ints((1 << bits) - 1)}> ()
    codes_{bits} = BitwiseAnd (shifted_{bits}, lowest_{bits})
    all_{bits} = Reshape (codes_{bits}, minus_one)
"""


def _bitmap_entries(bits: int) -> str:
    return f"""
    entry_start_{bits} = Gather (entry_ends, index_{bits})
    entry_end_{bits} = Gather (entry_ends, next_{bits})
    vector_mask_{bits} = Slice (mask, entry_start_{bits}, entry_end_{bits})
    mask_{bits} = Reshape <allowzero = 1> (vector_mask_{bits}, shape_{bits})
    vector_codes_{bits} = Slice (all_entry_codes, entry_start_{bits}, entry_end_{bits})
    entry_codes_{bits} = Reshape <allowzero = 1> (vector_codes_{bits}, shape_{bits})
"""


# entry_codes_{bits} uint8 and mask_{bits} bool [rows, columns] of each segment; scale_matrix [rows, blocks].
# place int32 [entries]: number of kept entries up to and including this one. The code appended to the stored ones is
# what entries before the first kept one (place 0) pick up.
_BITMAP = f"""
    pattern_column = Unsqueeze (pattern, minus_one)
    bit_shifts = Constant <value = {_ints(0, 1, 2, 3, 4, 5, 6, 7)}> ()
    low_bit = Constant <value = {_ints(1)}> ()
    pattern_shifted = BitShift <direction = "RIGHT"> (pattern_column, bit_shifts)
    pattern_bits = BitwiseAnd (pattern_shifted, low_bit)
    entry_bits = Reshape (pattern_bits, minus_one)
    mask = Cast <to = 9> (entry_bits)
    mask_int32 = Cast <to = 6> (entry_bits)
    place = CumSum (mask_int32, zero)
    no_places = Constant <value = {_ints(0, dtype="int32")}> ()
    places = Concat <axis = 0> (no_places, place)
    entry_counts = Mul (segment_rows, segment_columns)
    {_ends("entry_ends", "entry_counts")}
    code_ends_int32 = Gather (places, entry_ends)
    code_ends = Cast <to = 7> (code_ends_int32)
    code_ends_head = Slice (code_ends, zero, minus_one)
    five = Constant <value_ints = [5]> ()
    code_ends_tail = Slice (code_ends, one, five)
    counts = Sub (code_ends_tail, code_ends_head)
    bit_counts = Mul (counts, widths)
    filled_bit_counts = Add (bit_counts, seven)
    byte_counts = Div (filled_bit_counts, eight)
    {_ends("byte_ends", "byte_counts")}
    {"".join(_segment_codes(bits) for bits in BIT_WIDTHS)}
    any_code = Constant <value = {_ints(0)}> ()
    kept_codes = Concat <axis = 0> (stored_8, stored_4, stored_3, stored_2, any_code)
    previous = Constant <value = {_ints(-1, dtype="int32")}> ()
    kept_index = Add (place, previous)
    all_entry_codes = Gather (kept_codes, kept_index)
    {"".join(_bitmap_entries(bits) for bits in BIT_WIDTHS)}
    scale_matrix = Identity (scales)
"""


# --- values and product ----------------------------------------------------------------------------------------


def _offset(bits: int, size: str) -> str:
    """The zero point of one segment, less half a level if midrise, ``size`` [1] times: once per row or column."""
    return f"""
    middle_{bits} = Constant <value_floats = [{1 << (bits - 1)}.0]> ()
    offset_{bits} = Sub (middle_{bits}, rise)
    offsets_{bits} = Expand (offset_{bits}, {size}_{bits}{"bit_1" if size == "size" else ""})
"""


def _of_all_segments(name: str, axis: str) -> str:
    """{name}_matrix [rows, columns] from the segments' submatrices."""
    return f"    {name}_matrix = Concat <{axis}> ({', '.join(f'{name}_{bits}' for bits in BIT_WIDTHS)})\n"


def _offset_vector(size: str) -> str:
    """offset_vector: the offset of every row, or of every column if the columns are cut, in the order of storage."""
    return f"""
    {_attribute("midrise")}
    half = Constant <value_floats = [0.5]> ()
    midrise_float = Cast <to = 1> (midrise_1)
    rise = Mul (midrise_float, half)
    {"".join(_offset(bits, size) for bits in BIT_WIDTHS)}
    offset_vector = Concat <axis = 0> ({", ".join(f"offsets_{bits}" for bits in BIT_WIDTHS)})
    offset_by_row = Constant <value_ints = [-1, 1, 1]> ()
    block_count = Div (columns, block_size_1)
    block_shape = Concat <axis = 0> (rows, block_count, block_size_1)
"""


def _centred(codes: str, offset: str) -> str:
    """centred float32 [rows, blocks, block_size]: what the codes stand for before scaling. Needs scale_matrix."""
    return f"""
    code_blocks = Reshape <allowzero = 1> ({codes}, block_shape)
    entry_values = Cast <to = 1> (code_blocks)
    centred = Sub (entry_values, {offset})
    scales_float = Cast <to = 1> (scale_matrix)
    block_scales = Unsqueeze (scales_float, minus_one)
"""


_SEGMENT_AXIS = "axis: int = @segment_axis"

# entry_codes_matrix [rows, columns]; offset [rows or 1, 1 or blocks, 1 or block_size].
_STORED_VALUES = f"""
    {_offset_vector("size")}
    offset_by_column = Concat <axis = 0> (one, minus_one, block_size_1)
    offset_shape = Where (along_columns, offset_by_column, offset_by_row)
    offset = Reshape (offset_vector, offset_shape)
    {_of_all_segments("entry_codes", _SEGMENT_AXIS)}
"""

# An offset for all rows has only place 0, where the first row is if columns are cut.
_DENSE_VALUES = f"""
    {_STORED_VALUES}
    ordered_codes = Gather (entry_codes_matrix, stored_order)
    offset_rows = Shape <start = 0, end = 1> (offset)
    offset_order = Slice (stored_order, zero, offset_rows)
    ordered_offset = Gather (offset, offset_order)
    scale_matrix = Gather (scales, stored_order)
    {_centred("ordered_codes", "ordered_offset")}
    scaled_blocks = Mul (centred, block_scales)
"""

_SPARSE_VALUES = f"""
    {_STORED_VALUES}
    {_centred("entry_codes_matrix", "offset")}
    {_of_all_segments("mask", _SEGMENT_AXIS)}
    mask_blocks = Reshape (mask_matrix, block_shape)
    nothing = Constant <value_float = 0.0> ()
    unscaled = Where (mask_blocks, centred, nothing)
    scaled_blocks = Mul (unscaled, block_scales)
"""

_PRODUCT = """
    matrix_shape = Concat <axis = 0> (rows, columns)
    S = Reshape (scaled_blocks, matrix_shape)
    A_rows = Flatten <axis = -1> (A)
    Y_rows = Gemm <transB: int = @transB> (A_rows, S, bias)
    A_batch = Shape <start = 0, end = -1> (A)
    Y_shape = Concat <axis = 0> (A_batch, N_1)
    Y = Reshape <allowzero = 1> (Y_rows, Y_shape)
"""


# --- looking rows up -------------------------------------------------------------------------------------------


def _looked_up(bits: int) -> str:
    """entry_codes_{bits} uint8 [rows, columns] of the rows of this width among those looked up; rows_{bits} [1]: how
    many they are; places_{bits}: their places among all that are looked up."""
    return f"""
    segment_end_{bits} = Gather (segment_ends, next_{bits})
    begun_{bits} = GreaterOrEqual (stored_rows, segment_start_{bits})
    not_ended_{bits} = Less (stored_rows, segment_end_{bits})
    is_here_{bits} = And (begun_{bits}, not_ended_{bits})
    place_row_{bits} = NonZero (is_here_{bits})
    places_{bits} = Squeeze (place_row_{bits}, zero)
    rows_{bits} = Shape (places_{bits})
    columns_{bits} = Identity (columns)
    stored_rows_of_{bits} = Gather (stored_rows, places_{bits})
    rows_in_segment_{bits} = Sub (stored_rows_of_{bits}, segment_start_{bits})
    row_starts_in_segment_{bits} = Mul (rows_in_segment_{bits}, row_bytes_{bits})
    byte_start_{bits} = Gather (byte_ends, index_{bits})
    row_starts_{bits} = Add (row_starts_in_segment_{bits}, byte_start_{bits})
    row_start_column_{bits} = Unsqueeze (row_starts_{bits}, one)
    row_bytes_{bits}_0 = Squeeze (row_bytes_{bits})
    bytes_of_row_{bits} = Range (zero_0, row_bytes_{bits}_0, one_0)
    byte_index_{bits} = Add (row_start_column_{bits}, bytes_of_row_{bits})
    bytes_{bits} = Gather (codes, byte_index_{bits})
    {_dense_entries(bits)}
"""


# Only the rows that are looked up are decoded. An index below 0 becomes one past the end, for ONNX would count it from
# the end: Gather refuses both.
_GATHER = f"""
    {_CONSTANTS}
    {"".join(_attribute(name) for name in ("K", "N", "block_size"))}
    {_SEGMENT_SIZES}
    {_row_order("N_1")}
    columns = Identity (K_1)
    segment_columns = Expand (columns, four)
    {_DENSE_ROWS}
    byte_counts = Mul (segment_sizes, row_bytes)
    {_ends("byte_ends", "byte_counts")}
    is_below_zero = Less (indices, zero)
    checked_indices = Where (is_below_zero, N_1, indices)
    index_vector = Reshape (checked_indices, minus_one)
    stored_rows = Gather (stored_order, index_vector)
    rows = Shape (stored_rows)
    {"".join(_looked_up(bits) for bits in BIT_WIDTHS)}
    all_places = Concat <axis = 0> ({", ".join(f"places_{bits}" for bits in BIT_WIDTHS)})
    {_offset_vector("rows")}
    {_of_all_segments("entry_codes", "axis = 0")}
    place_column = Unsqueeze (all_places, one)
    rows_0 = Squeeze (rows)
    order_by_width = Range (zero_0, rows_0, one_0)
    order = ScatterND (order_by_width, place_column, order_by_width)
    ordered_codes = Gather (entry_codes_matrix, order)
    ordered_offset_vector = Gather (offset_vector, order)
    offset_shape = Concat <axis = 0> (rows, one, one)
    ordered_offset = Reshape <allowzero = 1> (ordered_offset_vector, offset_shape)
    scale_matrix = Gather (scales, stored_rows)
    {_centred("ordered_codes", "ordered_offset")}
    scaled_blocks = Mul (centred, block_scales)
    Y_batch = Shape (indices)
    Y_shape = Concat <axis = 0> (Y_batch, columns)
    Y = Reshape <allowzero = 1> (scaled_blocks, Y_shape)
"""


# --- attention -------------------------------------------------------------------------------------------------

_ATTENTION_INPUTS = (
    "qkv, past_key, past_value, seqlens_k, total_sequence_length, position_ids, cos_cache, sin_cache"
)
_ATTENTION_OUTPUTS = "Y, present_key, present_value"


def _normed(part: str) -> str:
    """{part}_normed [batch, tokens, heads * head_size]: every head of {part}_heads divided by its root mean square,
    times {part}_norm."""
    return f"""
    {part}_apart = Reshape ({part}_heads, apart)
    {part}_squares = Mul ({part}_apart, {part}_apart)
    {part}_mean = ReduceMean ({part}_squares, minus_one)
    {part}_shifted = Add ({part}_mean, epsilon_0)
    {part}_root = Sqrt ({part}_shifted)
    {part}_divided = Div ({part}_apart, {part}_root)
    {part}_unit = Mul ({part}_divided, {part}_norm)
    {part}_together = Concat <axis = 0> (keep_length, minus_one, {part}_width)
    {part}_normed = Reshape ({part}_unit, {part}_together)
"""


def _attention(queries: str, keys: str) -> str:
    """Y, present_key and present_value by ONNX Runtime's own operators; ``queries`` and ``keys``: names of what is
    rotated."""
    epsilon = "epsilon_0 = Constant <value_float: float = @epsilon> ()"
    normed = "".join((epsilon, *map(_normed, "qk"))) if queries == "q_normed" else ""
    return f"""
    keep_length = Constant <value_ints = [0]> ()
    minus_one = Constant <value_ints = [-1]> ()
    two = Constant <value_ints = [2]> ()
    q_scalar = Constant <value_int: int = @num_heads> ()
    k_scalar = Constant <value_int: int = @kv_num_heads> ()
    q_count = Reshape (q_scalar, minus_one)
    k_count = Reshape (k_scalar, minus_one)
    kv_count = Mul (k_count, two)
    all_count = Add (q_count, kv_count)
    width = Shape <start = 2, end = 3> (qkv)
    head_size = Div (width, all_count)
    q_width = Mul (q_count, head_size)
    k_width = Mul (k_count, head_size)
    widths = Concat <axis = 0> (q_width, k_width, k_width)
    q_heads, k_heads, v_heads = Split <axis = -1> (qkv, widths)
    apart = Concat <axis = 0> (keep_length, minus_one, head_size)
    {normed}
    q_rotated = com.microsoft.RotaryEmbedding <interleaved = 0> ({queries}, position_ids, cos_cache, sin_cache)
    k_rotated = com.microsoft.RotaryEmbedding <interleaved = 0> ({keys}, position_ids, cos_cache, sin_cache)
    Y, present_key, present_value = com.microsoft.GroupQueryAttention <
        num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale,
        local_window_size: int = @local_window_size, do_rotary = 0>
        (q_rotated, k_rotated, v_heads, past_key, past_value, seqlens_k, total_sequence_length)
"""


_SIGNATURES = {
    Q_MATMUL: ("A, codes, scales, bias, row_bits", "Y", _SIZES + _DENSE + _DENSE_VALUES + _PRODUCT),
    SPARSE_Q_MATMUL: ("A, codes, pattern, scales, bias", "Y", _SIZES + _N_OF_M + _SPARSE_VALUES + _PRODUCT),
    BITMAP_Q_MATMUL: ("A, codes, pattern, scales, bias", "Y", _SIZES + _BITMAP + _SPARSE_VALUES + _PRODUCT),
    Q_GATHER: ("indices, codes, scales, row_bits", "Y", _GATHER),
    CACHED_ATTENTION: (_ATTENTION_INPUTS, _ATTENTION_OUTPUTS, _attention("q_heads", "k_heads")),
    QK_NORM_CACHED_ATTENTION: (
        f"{_ATTENTION_INPUTS}, q_norm, k_norm", _ATTENTION_OUTPUTS, _attention("q_normed", "k_normed")
    ),
}
"""Inputs, outputs and body of each op."""
