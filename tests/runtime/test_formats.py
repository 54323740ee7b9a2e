import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_samples import layouts, random_levels, random_mask, random_weight

from fips_ort.bits import PLANES, pack_bits, pack_chunks, packed_size, unpack_bits, unpack_chunks
from fips_ort.layout import BIT_WIDTHS, BITMAP, DENSE, PATTERNS, Layout, Pattern
from fips_ort.ops import ATTRIBUTES, gather_attributes, node_attributes, op_type
from fips_ort.packed import PackedWeight, dequantize, pack, stack_rows, unpack
from fips_ort.reference import q_gather, q_matmul
from fips_ort.row_order import stored_order, stored_rows


@st.composite
def any_layout(draw: st.DrawFn) -> Layout:
    pattern = Pattern.parse(draw(st.sampled_from(PATTERNS)))
    unit = 8 * pattern.of // pattern.keep if pattern.is_n_of_m else 8
    block_size = unit * draw(st.integers(1, 3))
    axis = draw(st.sampled_from((0, 1)))
    sizes = draw(st.tuples(*[st.integers(0, 3)] * 4).filter(any))
    segments = tuple(size * (block_size if axis else 1) for size in sizes)
    other = draw(st.integers(1, 4))
    rows, columns = (other, sum(segments)) if axis else (sum(segments), other * block_size)
    return Layout(rows, columns, block_size, segments, axis, draw(st.booleans()), pattern)


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_bits_unpack_to_what_was_packed(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, count, dtype=np.uint8)
    stream = pack_bits(values, bits)
    assert stream.size == packed_size(count, bits)
    np.testing.assert_array_equal(unpack_bits(stream, bits, count), values)


def test_bits_are_least_significant_first() -> None:
    # 5 = 101, 3 = 011, 6 = 110: bit positions 0…8 hold 101 110 011.
    assert pack_bits(np.array([5, 3, 6], np.uint8), 3).tolist() == [0b10011101, 0b1]


def test_bits_refuse_values_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="value 8 does not fit in 3 bits"):
        pack_bits(np.array([1, 8], np.uint8), 3)
    with pytest.raises(ValueError, match="bits must be 1…8, got 9"):
        pack_bits(np.zeros(1, np.uint8), 9)
    with pytest.raises(ValueError, match="2 bytes is too short for 6 values of 3 bits"):
        unpack_bits(np.zeros(2, np.uint8), 3, 6)


@pytest.mark.parametrize("bits", sorted(PLANES))
@given(count=st.integers(0, 3), width=st.sampled_from(range(0, 65, 8)), seed=st.integers(0, 2**32 - 1))
def test_chunks_unpack_to_what_was_packed(bits: int, count: int, width: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (2, count, width), dtype=np.uint8)
    chunks = pack_chunks(values, bits)
    assert chunks.shape == (2, count, width * bits // 8)
    np.testing.assert_array_equal(unpack_chunks(chunks, bits), values)


def test_chunks_by_hand() -> None:
    values = np.zeros(64, np.uint8)
    values[[0, 16, 37, 63]] = 3, 2, 1, 3
    # 2 bits: 16 bytes; integer n is in byte n mod 16, at bit 2 floor(n / 16).
    expected = np.zeros(16, np.uint8)
    expected[0], expected[5], expected[15] = 3 | 2 << 2, 1 << 4, 3 << 6
    np.testing.assert_array_equal(pack_chunks(values, 2), expected)
    # 3 bits: the same for the lower two, then 8 bytes of the highest: byte n mod 8, bit floor(n / 8).
    values[[9, 63]] = 4, 7
    high = np.zeros(8, np.uint8)
    high[1], high[7] = 1 << 1, 1 << 7
    np.testing.assert_array_equal(pack_chunks(values, 3), np.concatenate([expected, high]))


def test_chunks_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(ValueError, match="value 4 does not fit in 2 bits"):
        pack_chunks(np.full(64, 4, np.uint8), 2)
    with pytest.raises(ValueError, match=r"chunks hold up to 64 integers, in eights, of .* bits; got 36 of 2 bits"):
        pack_chunks(np.zeros(36, np.uint8), 2)
    with pytest.raises(ValueError, match="got 72 of 2 bits"):
        pack_chunks(np.zeros(72, np.uint8), 2)
    with pytest.raises(ValueError, match="got 64 of 5 bits"):
        pack_chunks(np.zeros(64, np.uint8), 5)


@given(any_layout(), st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse_of_pack(layout: Layout, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels, mask = random_levels(rng, layout), random_mask(rng, layout)
    scales = rng.uniform(0.1, 1.0, layout.scales_shape).astype(np.float16)
    packed = pack(levels, scales, mask, layout)
    again, scales_again, mask_again = unpack(packed)
    np.testing.assert_array_equal(again, levels if mask is None else levels * mask)
    np.testing.assert_array_equal(scales_again, scales)
    assert (mask_again is None) == (mask is None)
    if mask is not None:
        np.testing.assert_array_equal(mask_again, mask)
    expected = (levels + 0.5 * layout.midrise) * np.repeat(scales.astype(np.float64), layout.block_size, axis=1)
    if mask is not None:
        expected = expected * mask
    np.testing.assert_array_equal(dequantize(packed), expected)


def test_dequantized_by_hand() -> None:
    layout = Layout(rows=2, columns=8, block_size=8, segments=(1, 0, 0, 1), pattern=BITMAP, midrise=True)
    levels = np.array([[100, 0, 0, 0, 0, 0, 0, -128], [0, 1, -2, 0, 0, 0, 0, 0]], np.int8)
    mask = np.array([[1, 0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 1, 0]], bool)
    packed = pack(levels, np.array([[2.0], [0.5]], np.float16), mask, layout)
    # 8 bits: 100 + 128, -128 + 128. 2 bits: 1 + 2 = 11, -2 + 2 = 00, 0 + 2 = 10, least significant first.
    assert packed.codes.tolist() == [228, 0, 0b100011]
    assert packed.pattern.tolist() == [0b10000001, 0b01000110]
    expected = np.zeros((2, 8), np.float32)
    expected[0, 0], expected[0, 7] = 201.0, -255.0
    expected[1, 1], expected[1, 2], expected[1, 6] = 0.75, -0.75, 0.25
    np.testing.assert_array_equal(dequantize(packed), expected)


def test_n_of_m_by_hand() -> None:
    """Two rows of 2:4: one tile, one step of four groups, two chunks for the first and second kept entries."""
    layout = Layout.uniform(2, 16, 4, 16, pattern=Pattern(2, 4))
    mask = np.array([[1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1],
                     [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0]], bool)
    levels = np.stack([np.arange(-8, 8), np.arange(7, -9, -1)]).astype(np.int8)
    packed = pack(levels, np.array([[1.0], [2.0]], np.float16), mask, layout)
    indices, codes = np.zeros((2, 64), np.uint8), np.zeros((2, 64), np.uint8)
    # Row 0 is in integers 0 to 3 of the chunks, row 1 in 4 to 7; the rows that are missing are zero.
    indices[0, :8], indices[1, :8] = [0, 1, 0, 2, 2, 0, 1, 0], [1, 3, 3, 3, 3, 1, 2, 2]
    codes[0, :8] = [0, 5, 8, 14, 13, 11, 6, 3]
    codes[1, :8] = [1, 7, 11, 15, 12, 10, 5, 1]
    np.testing.assert_array_equal(packed.pattern, pack_chunks(indices, 2).reshape(-1))
    np.testing.assert_array_equal(packed.codes, pack_chunks(codes, 4).reshape(-1))
    assert packed.scales.tolist() == [[[1.0, 2.0, *[0.0] * 14]]]
    np.testing.assert_array_equal(dequantize(packed), levels * mask * np.array([[1], [2]]))


def test_short_chunks_by_hand() -> None:
    # 8 integers of 3 bits: 2 bytes of the lower two bits, 4 integers in each; 1 byte of the highest.
    values = np.array([1, 2, 3, 4, 5, 6, 7, 0], np.uint8)
    assert pack_chunks(values, 3).tolist() == [0b11_01_11_01, 0b00_10_00_10, 0b1111000]


def test_dense_rows_are_cut_into_chunks_by_hand() -> None:
    layout = Layout(2, 96, 32, (0, 0, 32, 64), segment_axis=1)
    levels = np.random.default_rng(0).integers(-2, 2, (2, 96)).astype(np.int8)
    packed = pack(levels, np.ones((2, 3), np.float16), None, layout)
    left = (levels[:, :32] + 4).astype(np.uint8)
    right = (levels[:, 32:] + 2).astype(np.uint8)
    expected = [pack_chunks(left, 3).reshape(-1), pack_chunks(right, 2).reshape(-1)]
    np.testing.assert_array_equal(packed.codes, np.concatenate(expected))


def whole(count: int, unit: int) -> int:
    return -(-count // unit) * unit


@pytest.mark.parametrize("pattern", PATTERNS)
def test_stored_bytes(pattern: str) -> None:
    """No byte beyond what entries take, but for rows that fill up a tile."""
    rng = np.random.default_rng(0)
    for layout in layouts(pattern):
        weight = random_weight(rng, layout)
        parts = [(bits, rows.stop - rows.start, columns.stop - columns.start)
                 for bits, rows, columns in layout.submatrices()]
        blocks = layout.columns // layout.block_size
        if layout.pattern.is_n_of_m:
            tiled = [whole(rows, 16) * columns * layout.pattern.keep // layout.pattern.of for _, rows, columns in parts]
            assert weight.codes.size * 8 == sum(kept * bits for kept, (bits, _, _) in zip(tiled, parts, strict=True))
            assert weight.pattern.size * 8 == sum(tiled) * layout.pattern.index_bits
            rows = [layout.rows] if layout.segment_axis else [rows for _, rows, _ in parts]
            assert weight.scales.size == sum(whole(count, 16) for count in rows) * blocks
        elif layout.pattern == DENSE:
            assert weight.codes.size * 8 == sum(rows * columns * bits for bits, rows, columns in parts)
            assert (weight.pattern.size, weight.scales.size) == (0, layout.rows * blocks)
        else:
            assert weight.pattern.size * 8 == layout.rows * layout.columns
            assert weight.scales.size == layout.rows * blocks
        assert weight.nbytes == weight.codes.size + weight.pattern.size + 2 * weight.scales.size


def test_layout_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="block_size 48 does not divide the 64 columns"):
        Layout.uniform(4, 64, 4, 48)
    with pytest.raises(ValueError, match="block_size 16 is not a multiple of 32, as pattern 1:4 needs"):
        Layout.uniform(4, 64, 4, 16, pattern=Pattern(1, 4))
    with pytest.raises(ValueError, match=r"segments \(1, 1, 1, 0\) do not add up to the 4 entries of axis 0"):
        Layout(4, 64, 16, (1, 1, 1, 0))
    with pytest.raises(ValueError, match=r"segments \(2, 2\) are not 4, one for each of \(8, 4, 3, 2\) bits"):
        Layout(4, 64, 16, (2, 2))
    with pytest.raises(ValueError, match="not multiples of block_size 16"):
        Layout(4, 64, 16, (8, 56, 0, 0), segment_axis=1)
    with pytest.raises(ValueError, match="bits must be one of"):
        Layout.uniform(4, 64, 5, 16)
    with pytest.raises(ValueError, match=r"rows and columns must be positive, got 0 x 64"):
        Layout.uniform(0, 64, 4, 16)
    with pytest.raises(ValueError, match="segment_axis must be 0 or 1, got 2"):
        Layout(4, 64, 16, (4, 0, 0, 0), segment_axis=2)
    with pytest.raises(ValueError, match="unsupported pattern 3:4"):
        Pattern(3, 4)
    with pytest.raises(ValueError, match="unsupported pattern '4:4'"):
        Pattern.parse("4:4")


def test_pack_refuses_what_the_layout_cannot_hold() -> None:
    layout = Layout.uniform(1, 32, 2, 32, pattern=Pattern(1, 4))
    scales = np.ones((1, 1), np.float16)
    mask = np.tile([True, False, False, False], 8)[None]
    with pytest.raises(ValueError, match="outside the range of 2 bits"):
        pack(np.full((1, 32), 2, np.int8), scales, mask, layout)
    with pytest.raises(ValueError, match="exactly 1 of every 4"):
        pack(np.zeros((1, 32), np.int8), scales, ~mask, layout)
    with pytest.raises(ValueError, match="needs a mask"):
        pack(np.zeros((1, 32), np.int8), scales, None, layout)
    with pytest.raises(ValueError, match="levels have shape"):
        pack(np.zeros((2, 32), np.int8), scales, mask, layout)


@given(
    st.lists(st.tuples(st.sampled_from([8, 4, 3, 2]), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_stacked_rows_are_those_of_the_parts(parts: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = sorted(parts, reverse=True)
    weights = [random_weight(rng, Layout.uniform(rows, 96, bits, 32, midrise=True)) for bits, rows in parts]
    stacked = stack_rows(weights)
    np.testing.assert_array_equal(dequantize(stacked), np.concatenate([dequantize(weight) for weight in weights]))
    assert stacked.nbytes == sum(weight.nbytes for weight in weights)


def test_rows_that_do_not_go_together_are_refused() -> None:
    rng = np.random.default_rng(0)
    three, four, wide, midrise, cut, sparse = (
        random_weight(rng, layout)
        for layout in (
            Layout.uniform(4, 64, 3, 32),
            Layout.uniform(4, 64, 4, 32),
            Layout.uniform(4, 96, 3, 32),
            Layout.uniform(4, 64, 3, 32, midrise=True),
            Layout(4, 64, 32, (0, 32, 32, 0), segment_axis=1),
            Layout.uniform(4, 64, 3, 32, pattern=BITMAP),
        )
    )
    assert stack_rows([four, three]).layout.segments == (0, 4, 4, 0)
    with pytest.raises(ValueError, match=r"rows of \[3, 4\] bits, one after another, do not fall in bits"):
        stack_rows([three, four])
    for other in (wide, midrise, cut, sparse):
        with pytest.raises(ValueError, match="cannot follow those of"):
            stack_rows([three, other])
    with pytest.raises(ValueError, match="cannot follow those of"):
        stack_rows([cut, cut])


def test_packed_weight_refuses_wrong_streams() -> None:
    weight = random_weight(np.random.default_rng(0), Layout.uniform(2, 64, 3, 32, pattern=BITMAP))
    layout, codes, pattern, scales = weight.layout, weight.codes, weight.pattern, weight.scales
    with pytest.raises(ValueError, match=f"codes have {codes.size - 1} bytes, expected {codes.size}"):
        PackedWeight(layout, codes[:-1], pattern, scales)
    with pytest.raises(ValueError, match="pattern has 15 bytes, expected 16"):
        PackedWeight(layout, codes, pattern[:-1], scales)
    with pytest.raises(ValueError, match=r"scales are float16 \(1, 2\), expected float16 \(2, 2\)"):
        PackedWeight(layout, codes, pattern, scales[:1])
    with pytest.raises(ValueError, match="scales are float32"):
        PackedWeight(layout, codes, pattern, scales.astype(np.float32))


def test_unpack_refuses_indices_that_do_not_ascend() -> None:
    weight = random_weight(np.random.default_rng(0), Layout.uniform(1, 16, 4, 16, pattern=Pattern(2, 4)))
    bad = PackedWeight(weight.layout, weight.codes, np.zeros_like(weight.pattern), weight.scales)
    with pytest.raises(ValueError, match="not ascending"):
        unpack(bad)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reference_is_the_product_with_the_dequantized_matrix(pattern: str) -> None:
    rng = np.random.default_rng(0)
    for layout in layouts(pattern):
        weight = random_weight(rng, layout)
        stored = dequantize(weight).astype(np.float64)
        a = rng.standard_normal((2, 3, layout.columns)).astype(np.float32)
        bias = rng.standard_normal(layout.rows).astype(np.float32)
        exact = a @ stored.T + bias
        np.testing.assert_allclose(q_matmul(a, weight, bias=bias), exact, rtol=0, atol=2e-6 * np.abs(exact).max())
        # Rounding to 255 levels: at most half a step per activation, against weights of at most |stored|.
        steps = np.abs(a).reshape(2, 3, -1, layout.block_size).max(axis=-1) / 127
        bound = np.repeat(steps, layout.block_size, axis=-1) @ np.abs(stored).T / 2
        assert np.all(np.abs(q_matmul(a, weight, bias=bias, accuracy_level=4) - exact) <= 1.001 * bound + 1e-5)


def test_int8_activations_by_hand() -> None:
    layout = Layout.uniform(1, 16, 8, 8)
    levels = np.arange(16, dtype=np.int8)[None]
    weight = pack(levels, np.array([[2.0, 1.0]], np.float16), None, layout)
    a = np.zeros((1, 16), np.float32)
    a[0, 1], a[0, 2] = 127.0, 0.5      # step 1: rounds to 127 and, half to even, 0; the second block is all zeros
    np.testing.assert_array_equal(q_matmul(a, weight, accuracy_level=4), [[254.0]])
    with pytest.raises(ValueError, match="accuracy_level must be 0 or 4, got 1"):
        q_matmul(a, weight, accuracy_level=1)


def test_attributes_of_nodes() -> None:
    layout = Layout(rows=3, columns=64, block_size=32, segments=(1, 0, 2, 0), midrise=True, pattern=Pattern(2, 8))
    attributes = node_attributes(layout, True, 4)
    assert attributes == {
        "K": 64, "N": 3, "transB": 1, "block_size": 32, "segment_axis": 0, "size_8bit": 1, "size_4bit": 0,
        "size_3bit": 2, "size_2bit": 0, "midrise": 1, "accuracy_level": 4, "keep": 2, "of": 8,
    }
    assert tuple(attributes) == ATTRIBUTES[op_type(layout)]
    plain = Layout.uniform(3, 64, 2, 32)
    bitmap = Layout.uniform(3, 64, 3, 32, pattern=BITMAP)
    assert (op_type(plain), op_type(layout), op_type(bitmap)) == ("QMatMul", "SparseQMatMul", "BitmapQMatMul")
    assert "keep" not in node_attributes(bitmap, True, 0)
    assert tuple(node_attributes(plain, False, 0)) == ATTRIBUTES["QMatMul"]
    assert (node_attributes(plain, False, 0)["K"], node_attributes(plain, False, 0)["N"]) == (3, 64)
    with pytest.raises(ValueError, match="accuracy_level must be 0 or 4, got 2"):
        node_attributes(plain, True, 2)


@given(st.lists(st.sampled_from(BIT_WIDTHS), min_size=1, max_size=60))
def test_order_of_rows_and_its_inverse(widths: list[int]) -> None:
    row_bits = np.array(widths, np.uint8)
    layout = Layout(len(widths), 8, 8, tuple(widths.count(bits) for bits in BIT_WIDTHS))
    order, stored = stored_order(row_bits), stored_rows(row_bits, layout)
    np.testing.assert_array_equal(row_bits[order], np.repeat(np.array(BIT_WIDTHS), layout.segments))
    np.testing.assert_array_equal(order[stored], np.arange(len(widths)))
    # Of one width in the order of their numbers.
    for bits in BIT_WIDTHS:
        assert np.all(np.diff(stored[row_bits == bits]) == 1)


def test_rows_without_an_order_of_their_own_stay_where_they_are() -> None:
    np.testing.assert_array_equal(stored_rows(None, Layout(4, 8, 8, (1, 1, 1, 1))), [0, 1, 2, 3])
    np.testing.assert_array_equal(stored_rows(np.array([3, 8, 2, 3], np.uint8), Layout(4, 8, 8, (1, 0, 2, 1))),
                                  [1, 0, 3, 2])


@pytest.mark.parametrize(("row_bits", "message"), [
    (np.array([8, 4, 3, 5], np.uint8), r"row_bits\[3\] is 5, not one of \(8, 4, 3, 2\)"),
    (np.array([8, 4, 3, 2], np.int64), r"row_bits are int64 \(4,\), expected a vector of uint8"),
    (np.array([[8, 4, 3, 2]], np.uint8), r"row_bits are uint8 \(1, 4\), expected a vector of uint8"),
    (np.array([8, 4, 3, 3], np.uint8), r"row_bits have \(1, 1, 2, 0\) rows of \(8, 4, 3, 2\) bits, the segments"),
    (np.array([8, 4, 3], np.uint8), r"row_bits have \(1, 1, 1, 0\) rows"),
])
def test_orders_that_do_not_fit_are_refused(row_bits: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stored_rows(row_bits, Layout(4, 8, 8, (1, 1, 1, 1)))


def test_only_dense_weights_cut_into_rows_have_an_order_or_are_looked_up() -> None:
    row_bits = np.full(4, 4, np.uint8)
    columns, bitmap = (Layout.uniform(4, 8, 4, 8, segment_axis=1), Layout.uniform(4, 8, 4, 8, pattern=BITMAP))
    for layout in (columns, bitmap):
        with pytest.raises(ValueError, match="row_bits are for dense weights cut into segments of rows"):
            stored_rows(row_bits, layout)
        with pytest.raises(ValueError, match="QGather reads dense weights cut into rows"):
            gather_attributes(layout)
    weight = random_weight(np.random.default_rng(0), Layout.uniform(4, 8, 4, 8))
    with pytest.raises(ValueError, match="row_bits need trans_b"):
        q_matmul(np.ones((1, 4), np.float32), weight, trans_b=False, row_bits=row_bits)
    assert tuple(gather_attributes(weight.layout)) == ATTRIBUTES["QGather"]


@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_a_table_packed_in_the_order_of_its_widths_means_the_table(accuracy_level: int) -> None:
    """Rows in an order of their own → packed by widths → looked up and multiplied in their order again."""
    rng = np.random.default_rng(0)
    row_bits = rng.choice(np.array(BIT_WIDTHS, np.uint8), 50)
    halves = (1 << (row_bits.astype(np.int64) - 1))[:, None]
    levels = rng.integers(-halves, halves, (50, 32)).astype(np.int8)
    scales = rng.uniform(0.1, 1, (50, 2)).astype(np.float16)
    table = levels * np.repeat(scales.astype(np.float32), 16, axis=1)
    order = stored_order(row_bits)
    layout = Layout(50, 32, 16, tuple(int(np.sum(row_bits == bits)) for bits in BIT_WIDTHS))
    weight = pack(levels[order], scales[order], None, layout)
    indices = rng.integers(0, 50, (3, 4))
    np.testing.assert_array_equal(q_gather(indices, weight, row_bits), table[indices])
    np.testing.assert_array_equal(q_gather(indices, weight), table[order][indices])
    a, bias = rng.standard_normal((2, 32)).astype(np.float32), rng.standard_normal(50).astype(np.float32)
    ordered = q_matmul(a, weight, bias=bias, row_bits=row_bits, accuracy_level=accuracy_level)
    stored = q_matmul(a, weight, bias=bias[order], accuracy_level=accuracy_level)
    np.testing.assert_array_equal(ordered[:, order], stored)
    np.testing.assert_allclose(ordered, a @ table.T + bias, rtol=0, atol=0.05 * np.abs(a @ table.T).max())


@pytest.mark.parametrize("index", [-1, 50, 1 << 40, -(1 << 62)])
def test_rows_that_do_not_exist_are_not_looked_up(index: int) -> None:
    weight = random_weight(np.random.default_rng(0), Layout.uniform(50, 8, 4, 8))
    with pytest.raises(IndexError, match=f"index {index} is outside of the 50 rows"):
        q_gather(np.array([0, index]), weight)
