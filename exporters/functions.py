"""The ops of domain ``ai.fips`` as ONNX functions: how an artefact runs without the native library.

The bodies are written in ONNX's textual syntax and are the executable specification of the ops beside
:mod:`fips_ort.packed`. Everything except the product itself depends on initializers only, so ONNX Runtime
folds the decoding into a float32 matrix when it loads a model with graph optimizations on. It keeps every
intermediate result until then, so codes and masks stay uint8 and bool, and positions int32, as long as they can.
"""

import onnx
import onnx.parser

from fips_ort.layout import BIT_WIDTHS
from fips_ort.ops import ATTRIBUTES, DOMAIN, Q_MATMUL, SPARSE_Q_MATMUL

MINIMUM_OPSET = 18
"""The first ONNX opset with every operator of the bodies (BitwiseAnd)."""


def op_functions(opset: int = MINIMUM_OPSET) -> list[onnx.FunctionProto]:
    """QMatMul and SparseQMatMul, generic over all attributes and over the optional bias.

    ``opset`` is the ONNX opset that the model imports: functions and model must import the same one. Raises
    ValueError below 18. ``accuracy_level`` is a permission to round activations, which the functions do not use.
    """
    if opset < MINIMUM_OPSET:
        raise ValueError(f"the functions need opset {MINIMUM_OPSET} or later, got {opset}")
    return [
        _function(opset, Q_MATMUL, "A, codes, scales, bias",
                  _SIZES + _DENSE_COUNTS + _CODES + _DENSE_VALUES + _PRODUCT),
        _function(opset, SPARSE_Q_MATMUL, "A, codes, pattern, scales, bias",
                  _SIZES + _MASK + _CODES + _SPARSE_VALUES + _PRODUCT),
    ]


def _function(opset: int, name: str, inputs: str, body: str) -> onnx.FunctionProto:
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>'
    attributes = ", ".join(ATTRIBUTES[name])
    return onnx.parser.parse_function(f"{header}\n{name} <{attributes}> ({inputs}) => (Y)\n{{\n{body}}}")


def _attribute(name: str) -> str:
    """``name`` as an int64 vector of one element."""
    return f"""
    {name}_scalar = Constant <value_int: int = @{name}> ()
    {name}_1 = Reshape ({name}_scalar, one)
"""


def _ints(*values: int, dtype: str = "uint8") -> str:
    """A constant vector in textual syntax."""
    return f"{dtype}[{len(values)}] {{{', '.join(map(str, values))}}}"


# rows, columns, segment_sizes [4], entry_ends [5]: where each segment starts and ends among all entries.
_SIZES = f"""
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    minus_one = Constant <value_ints = [-1]> ()
    seven = Constant <value_ints = [7]> ()
    eight = Constant <value_ints = [8]> ()
    widths = Constant <value_ints = [{", ".join(map(str, BIT_WIDTHS))}]> ()
    {"".join(_attribute(name) for name in ("K", "N", "transB", "block_size", "segment_axis"))}
    {"".join(_attribute(f"size_{bits}bit") for bits in BIT_WIDTHS)}
    transposed = Cast <to = 9> (transB_1)
    rows = Where (transposed, N_1, K_1)
    columns = Where (transposed, K_1, N_1)
    along_columns = Cast <to = 9> (segment_axis_1)
    segment_sizes = Concat <axis = 0> ({", ".join(f"size_{bits}bit_1" for bits in BIT_WIDTHS)})
    across = Where (along_columns, rows, columns)
    entry_counts = Mul (segment_sizes, across)
    entry_ends_tail = CumSum (entry_counts, zero)
    entry_ends = Concat <axis = 0> (zero, entry_ends_tail)
"""

# counts [4]: stored codes of each segment.
_DENSE_COUNTS = """
    counts = Identity (entry_counts)
"""

# mask bool [entries] in segment order; place int32 [entries]: number of kept entries up to and including this one.
# A pattern entry is compared with the positions 0 … of-1 of its group; a bitmap's single bit with 1.
_MASK = f"""
    {_attribute("keep")}{_attribute("of")}
    index_bits_by_of = Constant <value_ints = [0, 1, 0, 0, 2, 0, 0, 0, 3]> ()
    index_bits = Gather (index_bits_by_of, of_1)
    pattern_column = Unsqueeze (pattern, minus_one)
    bit_shifts = Constant <value = {_ints(0, 1, 2, 3, 4, 5, 6, 7)}> ()
    low_bit = Constant <value = {_ints(1)}> ()
    pattern_shifted = BitShift <direction = "RIGHT"> (pattern_column, bit_shifts)
    pattern_bits = BitwiseAnd (pattern_shifted, low_bit)
    entry_shape = Concat <axis = 0> (minus_one, index_bits)
    entry_bits = Reshape (pattern_bits, entry_shape)
    bit_values = Constant <value = {_ints(1, 2, 4)}> ()
    entry_bit_values = Slice (bit_values, zero, index_bits)
    entry_bit_column = Unsqueeze (entry_bit_values, minus_one)
    pattern_entries = MatMulInteger (entry_bits, entry_bit_column)
    group_shape = Concat <axis = 0> (minus_one, keep_1)
    group_entries = Reshape (pattern_entries, group_shape)
    first_entry = Slice (group_entries, zero, one, one)
    last_start = Sub (keep_1, one)
    last_entry = Slice (group_entries, last_start, keep_1, one)
    is_bitmap = Equal (of_1, one)
    first_position = Cast <to = 7> (is_bitmap)
    last_position = Add (first_position, of_1)
    first_position_0 = Squeeze (first_position)
    last_position_0 = Squeeze (last_position)
    one_0 = Squeeze (one)
    positions_int64 = Range (first_position_0, last_position_0, one_0)
    positions = Cast <to = 6> (positions_int64)
    is_first = Equal (first_entry, positions)
    is_last = Equal (last_entry, positions)
    group_mask = Or (is_first, is_last)
    mask = Reshape (group_mask, minus_one)
    mask_int32 = Cast <to = 6> (mask)
    place = CumSum (mask_int32, zero)
    no_places = Constant <value = {_ints(0, dtype="int32")}> ()
    places = Concat <axis = 0> (no_places, place)
    code_ends_int32 = Gather (places, entry_ends)
    code_ends = Cast <to = 7> (code_ends_int32)
    code_ends_head = Slice (code_ends, zero, minus_one)
    five = Constant <value_ints = [5]> ()
    code_ends_tail = Slice (code_ends, one, five)
    counts = Sub (code_ends_tail, code_ends_head)
"""


def _segment_codes(index: int, bits: int) -> str:
    """stored_{bits}: uint8 [counts[index]], the codes of one segment.

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
    index_{bits} = Constant <value_ints = [{index}]> ()
    next_{bits} = Constant <value_ints = [{index + 1}]> ()
    count_{bits} = Slice (counts, index_{bits}, next_{bits})
    byte_start_{bits} = Slice (byte_ends, index_{bits}, next_{bits})
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


_CODES = f"""
    bit_counts = Mul (counts, widths)
    filled_bit_counts = Add (bit_counts, seven)
    byte_counts = Div (filled_bit_counts, eight)
    byte_ends_tail = CumSum (byte_counts, zero)
    byte_ends = Concat <axis = 0> (zero, byte_ends_tail)
    {"".join(_segment_codes(index, bits) for index, bits in enumerate(BIT_WIDTHS))}
"""


def _matrix(name: str) -> str:
    """{name}_blocks [rows, blocks, block_size] from {name} [entries] in segment order."""
    parts = "".join(f"""
    {name}_entries_{bits} = Slice ({name}, entry_start_{bits}, entry_end_{bits})
    {name}_matrix_{bits} = Reshape <allowzero = 1> ({name}_entries_{bits}, matrix_shape_{bits})
""" for bits in BIT_WIDTHS)
    names = ", ".join(f"{name}_matrix_{bits}" for bits in BIT_WIDTHS)
    return f"""
    {parts}
    {name}_matrix = Concat <axis: int = @segment_axis> ({names})
    {name}_blocks = Reshape ({name}_matrix, block_shape)
"""


def _segment_values(index: int, bits: int) -> str:
    """Shape and places of one segment; its zero point, less half a level if midrise, once per row or column."""
    return f"""
    entry_start_{bits} = Gather (entry_ends, index_{bits})
    entry_end_{bits} = Gather (entry_ends, next_{bits})
    by_rows_{bits} = Concat <axis = 0> (size_{bits}bit_1, columns)
    by_columns_{bits} = Concat <axis = 0> (rows, size_{bits}bit_1)
    matrix_shape_{bits} = Where (along_columns, by_columns_{bits}, by_rows_{bits})
    middle_{bits} = Constant <value_floats = [{1 << (bits - 1)}.0]> ()
    offset_{bits} = Sub (middle_{bits}, rise)
    offsets_{bits} = Expand (offset_{bits}, size_{bits}bit_1)
"""


# entry_codes → centred float32 [rows, blocks, block_size]: what they stand for before scaling; and the scales.
_VALUES = f"""
    {_attribute("midrise")}
    half = Constant <value_floats = [0.5]> ()
    midrise_float = Cast <to = 1> (midrise_1)
    rise = Mul (midrise_float, half)
    {"".join(_segment_values(index, bits) for index, bits in enumerate(BIT_WIDTHS))}
    block_shape = Concat <axis = 0> (rows, minus_one, block_size_1)
    offset_vector = Concat <axis = 0> ({", ".join(f"offsets_{bits}" for bits in BIT_WIDTHS)})
    offset_by_row = Constant <value_ints = [-1, 1, 1]> ()
    offset_by_column = Concat <axis = 0> (one, minus_one, block_size_1)
    offset_shape = Where (along_columns, offset_by_column, offset_by_row)
    offset = Reshape (offset_vector, offset_shape)
    {_matrix("entry_codes")}
    entry_values = Cast <to = 1> (entry_codes_blocks)
    centred = Sub (entry_values, offset)
    scales_float = Cast <to = 1> (scales)
    block_scales = Unsqueeze (scales_float, minus_one)
"""

_DENSE_VALUES = f"""
    entry_codes = Concat <axis = 0> (stored_8, stored_4, stored_3, stored_2)
    {_VALUES}
    scaled_blocks = Mul (centred, block_scales)
"""

# The code appended to the stored ones is what entries before the first kept one (place 0) pick up.
_SPARSE_VALUES = f"""
    any_code = Constant <value = {_ints(0)}> ()
    kept_codes = Concat <axis = 0> (stored_8, stored_4, stored_3, stored_2, any_code)
    previous = Constant <value = {_ints(-1, dtype="int32")}> ()
    kept_index = Add (place, previous)
    entry_codes = Gather (kept_codes, kept_index)
    {_VALUES}
    {_matrix("mask")}
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
