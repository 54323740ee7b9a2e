import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isa import available_isas
from onnx import numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, RuntimeException
from op_samples import (
    gather_model,
    layouts,
    op_model,
    random_row_bits,
    random_weight,
    relative_error,
    session_options,
)

import fips_ort
from fips_ort.layout import BIT_WIDTHS, PATTERNS, Layout, Pattern
from fips_ort.ops import ATTRIBUTES
from fips_ort.packed import PackedWeight, unpack
from fips_ort.reference import q_gather, q_matmul
from fips_ort.row_order import stored_rows

MODES = [(False, 0), (False, 4), (True, 0), (True, 4)]


def native_session(model: onnx.ModelProto | str) -> onnxruntime.InferenceSession:
    options = session_options()
    fips_ort.register(options)
    return onnxruntime.InferenceSession(model if isinstance(model, str) else model.SerializeToString(), options)


def sizes(layout: Layout, trans_b: bool) -> tuple[int, int]:
    return (layout.columns, layout.rows) if trans_b else (layout.rows, layout.columns)


def tolerance(
    a: np.ndarray, weight: PackedWeight, trans_b: bool, accuracy_level: int, expected: np.ndarray
) -> np.ndarray:
    """What sums in another order may differ by, [..., N]; at level 4 without transB, also what docs/ops.md allows."""
    allowed = np.full(expected.shape, 5e-6 * np.abs(expected).max())
    layout = weight.layout
    if trans_b or accuracy_level == 0 or layout.pattern.keep:
        return allowed
    levels, scales, _ = unpack(weight)
    sizes = np.abs(levels + 0.5 * layout.midrise)
    for rows in layout.row_ranges():
        for first in range(rows.start, rows.stop, 64):
            run = slice(first, min(first + 64, rows.stop))
            # Every product of activation and scale is rounded to a multiple of 1/16256 of the largest: by half of that.
            scaled = np.abs(a[..., run, None] * scales[run].astype(np.float32))
            step = scaled.max(axis=-2) / 16256
            total = sizes[run].sum(axis=0)
            allowed += 0.5001 * np.repeat(step, layout.block_size, axis=-1) * total
    return allowed


def zero_functions() -> Sequence[onnx.FunctionProto]:
    """Deliberately wrong bodies, so that a right answer can only come from the native kernels."""
    functions = []
    for name in ("QMatMul", "SparseQMatMul", "BitmapQMatMul"):
        inputs = "A, codes, scales, bias, row_bits" if name == "QMatMul" else "A, codes, pattern, scales, bias"
        functions.append(onnx.parser.parse_function(
            f'<domain: "ai.fips", opset_import: ["" : 18]> {name} <{", ".join(ATTRIBUTES[name])}> ({inputs}) => (Y)'
            "{ zero = Constant <value_float = 0.0> () n = Constant <value_int: int = @N> ()"
            "  one = Constant <value_ints = [1]> () n_1 = Reshape (n, one) batch = Shape <end = -1> (A)"
            "  shape = Concat <axis = 0> (batch, n_1) Y = Expand (zero, shape) }",
        ))
    return functions


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FIPS_ORT_ISA", request.param)
    return str(request.param)


@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_agree_with_the_reference(isa: str, pattern: str, trans_b: bool, accuracy_level: int) -> None:
    rng = np.random.default_rng(PATTERNS.index(pattern))
    for block_size in (64, 192):
        for index, layout in enumerate(layouts(pattern, block_size, rows_unit=7, blocks=3)):
            weight = random_weight(rng, layout)
            k, n = sizes(layout, trans_b)
            a = rng.standard_normal(((1, 2, 5, 17)[index % 4], k)).astype(np.float32)
            bias = rng.standard_normal(n).astype(np.float32) if index % 3 else None
            expected = q_matmul(a, weight, trans_b=trans_b, bias=bias, accuracy_level=accuracy_level)
            model = op_model(weight, trans_b, accuracy_level, bias, functions=zero_functions())
            (actual,) = native_session(model).run(None, {"A": a})
            assert np.all(np.abs(actual - expected) <= tolerance(a, weight, trans_b, accuracy_level, expected)), layout


@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
@pytest.mark.parametrize(("pattern", "block_size"), [("dense", 8), ("dense", 24), ("dense", 160), ("bitmap", 40),
                                                     ("bitmap", 32), ("1:4", 96), ("2:4", 16), ("2:8", 32)])
def test_every_batch_size_and_odd_shapes(isa: str, pattern: str, block_size: int, trans_b: bool,
                                         accuracy_level: int) -> None:
    rng = np.random.default_rng(block_size)
    layout = Layout(37, 7 * block_size, block_size, (5, 11, 0, 21), midrise=True, pattern=Pattern.parse(pattern))
    weight = random_weight(rng, layout)
    k, n = sizes(layout, trans_b)
    bias = rng.standard_normal(n).astype(np.float32)
    session = native_session(op_model(weight, trans_b, accuracy_level, bias))
    a = rng.standard_normal((70, k)).astype(np.float32)
    expected = q_matmul(a, weight, trans_b=trans_b, bias=bias, accuracy_level=accuracy_level)
    allowed = tolerance(a, weight, trans_b, accuracy_level, expected)
    for m in range(1, 71):
        (actual,) = session.run(None, {"A": a[:m]})
        assert np.all(np.abs(actual - expected[:m]) <= allowed[:m]), m


@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
@pytest.mark.parametrize("pattern", ["dense", "bitmap", "2:4"])
def test_few_rows_and_segments_of_many_blocks(isa: str, pattern: str, trans_b: bool, accuracy_level: int) -> None:
    """Segments along the columns that start and end amid a vector of scales."""
    rng = np.random.default_rng(0)
    segments = (3 * 32, 17 * 32, 32, 19 * 32)
    for midrise in (False, True):
        layout = Layout(71, 40 * 32, 32, segments, 1, midrise, Pattern.parse(pattern))
        weight = random_weight(rng, layout)
        k, n = sizes(layout, trans_b)
        bias = rng.standard_normal(n).astype(np.float32)
        session = native_session(op_model(weight, trans_b, accuracy_level, bias))
        for m in range(1, 6):
            a = rng.standard_normal((m, k)).astype(np.float32)
            expected = q_matmul(a, weight, trans_b=trans_b, bias=bias, accuracy_level=accuracy_level)
            (actual,) = session.run(None, {"A": a})
            allowed = tolerance(a, weight, trans_b, accuracy_level, expected)
            assert np.all(np.abs(actual - expected) <= allowed), (m, midrise)


@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
@pytest.mark.parametrize("pattern", ["dense", "bitmap", "1:4", "2:4"])
@pytest.mark.parametrize("block_size", [64, 128, 320])
def test_kernels_for_whole_chunks(isa: str, pattern: str, block_size: int, trans_b: bool, accuracy_level: int) -> None:
    """Block sizes with kernels of their own, from one row to 512, rows cut amid a tile and a run of 64."""
    rng = np.random.default_rng(block_size)
    for axis, segments in ((1, (0, block_size, 2 * block_size, block_size)), (0, (0, 21, 83, 100))):
        rows, columns = (204, 4 * block_size) if axis else (204, 2 * block_size)
        layout = Layout(rows, columns, block_size, segments, axis, bool(axis), Pattern.parse(pattern))
        weight = random_weight(rng, layout)
        k, n = sizes(layout, trans_b)
        bias = rng.standard_normal(n).astype(np.float32)
        session = native_session(op_model(weight, trans_b, accuracy_level, bias))
        a = rng.standard_normal((512, k)).astype(np.float32) * rng.uniform(0.1, 10, k).astype(np.float32)
        expected = q_matmul(a, weight, trans_b=trans_b, bias=bias, accuracy_level=accuracy_level)
        allowed = tolerance(a, weight, trans_b, accuracy_level, expected)
        for m in (1, 2, 3, 4, 5, 8, 15, 64, 129, 512):
            (actual,) = session.run(None, {"A": a[:m]})
            assert np.all(np.abs(actual - expected[:m]) <= allowed[:m]), (axis, m)


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("pattern", ["dense", "bitmap", "1:4"])
@pytest.mark.parametrize(("axis", "segments"), [(0, (0, 130, 71, 499)), (1, (0, 64, 128, 64))])
def test_sums_cut_into_parts(isa: str, axis: int, segments: tuple[int, ...], pattern: str, accuracy_level: int) -> None:
    """B = S, few rows of A: as the reference, and to the last bit the same on one thread and on three."""
    rng = np.random.default_rng(axis)
    layout = Layout(700, 256, 64, segments, axis, bool(axis), Pattern.parse(pattern))
    weight = random_weight(rng, layout)
    bias = rng.standard_normal(256).astype(np.float32)
    model = op_model(weight, False, accuracy_level, bias, functions=zero_functions()).SerializeToString()
    sessions = []
    for threads in (1, 3):
        options = session_options()
        options.intra_op_num_threads = threads
        fips_ort.register(options)
        sessions.append(onnxruntime.InferenceSession(model, options))
    for m in range(1, 6):
        a = rng.standard_normal((m, 700)).astype(np.float32) * rng.uniform(0.1, 10, 700).astype(np.float32)
        expected = q_matmul(a, weight, trans_b=False, bias=bias, accuracy_level=accuracy_level)
        one, three = (session.run(None, {"A": a})[0] for session in sessions)
        assert np.all(np.abs(one - expected) <= tolerance(a, weight, False, accuracy_level, expected)), m
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("block_size", [64, 128, 192, 256])
def test_bytes_are_taken_apart_after_interleaving(isa: str, bits: int, block_size: int) -> None:
    """B = S, one row of A: whole vectors of stored bytes, and what is left, as the other kernels compute them."""
    rng = np.random.default_rng(block_size + bits)
    for blocks in (1, 4, 5, 13):
        layout = Layout.uniform(150, blocks * block_size, bits, block_size)
        weight = random_weight(rng, layout)
        session = native_session(op_model(weight, False, 4, functions=zero_functions()))
        a = rng.standard_normal((2, 150)).astype(np.float32) * rng.uniform(0.1, 10, 150).astype(np.float32)
        (one,), (two,) = session.run(None, {"A": a[:1]}), session.run(None, {"A": a})
        expected = q_matmul(a, weight, trans_b=False, accuracy_level=4)
        assert np.all(np.abs(two - expected) <= tolerance(a, weight, False, 4, expected)), blocks
        np.testing.assert_array_equal(one, two[:1])


ORDERED = [(40, 70, 900, 60), (100, 0, 2300, 0), (0, 0, 700, 0), (0, 1, 0, 63), (1, 0, 0, 0)]
"""Rows of each width."""


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (256, 128), (72, 24)])
@pytest.mark.parametrize("segments", ORDERED)
def test_outputs_have_the_order_of_row_bits(isa: str, segments: tuple[int, ...], columns: int, block_size: int,
                                            accuracy_level: int) -> None:
    """As the reference, and each output to the last bit what it is in the order of storage."""
    rng = np.random.default_rng(columns)
    layout = Layout(sum(segments), columns, block_size, segments, midrise=accuracy_level == 4)
    weight, row_bits = random_weight(rng, layout), random_row_bits(rng, layout)
    stored = native_session(op_model(weight, True, accuracy_level, functions=zero_functions()))
    for bias in (None, rng.standard_normal(layout.rows).astype(np.float32)):
        model = op_model(weight, True, accuracy_level, bias, row_bits=row_bits, functions=zero_functions())
        session = native_session(model)
        for m in (1, 2, 5, 40):
            a = rng.standard_normal((m, columns)).astype(np.float32)
            expected = q_matmul(a, weight, bias=bias, row_bits=row_bits, accuracy_level=accuracy_level)
            (actual,) = session.run(None, {"A": a})
            assert np.all(np.abs(actual - expected) <= tolerance(a, weight, True, accuracy_level, expected)), m
            (unordered,) = stored.run(None, {"A": a})
            unordered = unordered[:, stored_rows(row_bits, layout)]
            np.testing.assert_array_equal(actual, unordered if bias is None else unordered + bias)


def test_rows_of_huge_and_tiny_activations_have_the_order_of_row_bits(isa: str) -> None:
    rng = np.random.default_rng(0)
    layout = Layout(700, 128, 64, (40, 0, 660, 0))
    weight, row_bits = random_weight(rng, layout), random_row_bits(rng, layout)
    bias = rng.standard_normal(700).astype(np.float32)
    a = rng.standard_normal((3, 128)).astype(np.float32) * np.array([[1e30], [1], [1e-35]], np.float32)
    session = native_session(op_model(weight, True, 4, bias, row_bits=row_bits, functions=zero_functions()))
    (actual,) = session.run(None, {"A": a})
    expected = q_matmul(a, weight, bias=bias, row_bits=row_bits, accuracy_level=4)
    assert np.all(np.abs(actual - expected) <= 5e-6 * np.abs(expected).max(axis=1, keepdims=True))


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (2048, 512), (72, 24)])
@pytest.mark.parametrize("segments", ORDERED)
def test_rows_are_looked_up_exactly(isa: str, segments: tuple[int, ...], columns: int, block_size: int,
                                    constant: bool) -> None:
    rng = np.random.default_rng(columns)
    layout = Layout(sum(segments), columns, block_size, segments, midrise=constant)
    weight = random_weight(rng, layout)
    for row_bits in (None, random_row_bits(rng, layout)):
        session = native_session(gather_model(weight, row_bits, shape=("batch", "length"), constant=constant))
        feeds = {} if constant else {"codes": weight.codes, "scales": weight.scales}
        if row_bits is not None and not constant:
            feeds["row_bits"] = row_bits
        for shape in ((1, 1), (0, 3), (2, 600)):
            indices = rng.integers(0, layout.rows, shape)
            (actual,) = session.run(None, {"indices": indices, **feeds})
            np.testing.assert_array_equal(actual, q_gather(indices, weight, row_bits))
        for outside in (-1, layout.rows, 1 << 40, -(1 << 63)):
            message = f"ai.fips.QGather: indices has {outside}, which is not one of the {layout.rows} rows"
            with pytest.raises(InvalidArgument, match=message):
                session.run(None, {"indices": np.array([[0, outside]]), **feeds})


def test_a_table_serves_both_of_its_readers(tmp_path: Path) -> None:
    """One set of initializers for QGather and QMatMul: in memory once, with what both find out about it."""
    rng = np.random.default_rng(0)
    layout = Layout(1 << 17, 640, 64, (1 << 13, 0, (1 << 17) - (1 << 13), 0))
    weight = PackedWeight(layout, rng.integers(0, 256, layout.code_bytes(), dtype=np.uint8), np.zeros(0, np.uint8),
                          np.ones(layout.scales_shape, np.float16))
    row_bits = random_row_bits(rng, layout)
    gather, product = gather_model(weight, row_bits), op_model(weight, True, 4, row_bits=row_bits)
    product.graph.node.append(gather.graph.node[0])
    product.graph.input.append(gather.graph.input[0])
    product.graph.output.append(gather.graph.output[0])
    onnx.save(product, tmp_path / "model.onnx", save_as_external_data=True, location="weights")
    onnx.save(op_model(weight_of("dense"), True), tmp_path / "small.onnx")
    result = subprocess.run([sys.executable, "-c", TABLE_SCRIPT, tmp_path / "model.onnx", tmp_path / "small.onnx"],
                            capture_output=True, text=True, check=True)
    files = sum(path.stat().st_size for path in (tmp_path / "model.onnx", tmp_path / "weights"))
    assert int(result.stdout) < 1.1 * files


@pytest.mark.parametrize("pattern", ["dense", "bitmap"])
def test_scales_that_are_not_finite_stay_in_their_row(isa: str, pattern: str) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout.uniform(9, 3 * 64, 3, 64, midrise=True, pattern=Pattern.parse(pattern)))
    weight.scales[4] = np.inf
    a = rng.standard_normal((1, 3 * 64)).astype(np.float32)
    (actual,) = native_session(op_model(weight, True, 4, functions=zero_functions())).run(None, {"A": a})
    assert np.isfinite(actual).tolist() == [[row != 4 for row in range(9)]]


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("pattern", ["dense", "bitmap", "1:4"])
def test_long_rows(isa: str, pattern: str, accuracy_level: int) -> None:
    """Rows of so many bytes that kernels take them one by one; several do not fit into what is decoded at once."""
    rng = np.random.default_rng(0)
    layout = Layout(23, 8320, 64, (2, 7, 9, 5), pattern=Pattern.parse(pattern))
    weight = random_weight(rng, layout)
    session = native_session(op_model(weight, True, accuracy_level, functions=zero_functions()))
    for m in (1, 2, 3, 7):
        a = rng.standard_normal((m, 8320)).astype(np.float32)
        expected = q_matmul(a, weight, trans_b=True, accuracy_level=accuracy_level)
        (actual,) = session.run(None, {"A": a})
        assert np.all(np.abs(actual - expected) <= tolerance(a, weight, True, accuracy_level, expected)), m


@pytest.mark.parametrize("shape", [(), (2, 3), (0,), (2, 0), (1, 2, 3)])
@pytest.mark.parametrize("trans_b", [False, True])
def test_activations_of_any_rank(shape: tuple[int, ...], trans_b: bool) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout.uniform(6, 64, 3, 32))
    a = rng.standard_normal((*shape, sizes(weight.layout, trans_b)[0])).astype(np.float32)
    model = op_model(weight, trans_b, batch=[f"batch_{axis}" for axis in range(len(shape))])
    (actual,) = native_session(model).run(None, {"A": a})
    expected = q_matmul(a, weight, trans_b=trans_b)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("pattern", ["dense", "bitmap", "1:4"])
def test_large_products_run_in_parallel_tiles(pattern: str, trans_b: bool) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout(640, 2304, 128, (128, 128, 128, 256), pattern=Pattern.parse(pattern)))
    a = rng.standard_normal((33, sizes(weight.layout, trans_b)[0])).astype(np.float32)
    (actual,) = native_session(op_model(weight, trans_b)).run(None, {"A": a})
    assert relative_error(actual, q_matmul(a, weight, trans_b=trans_b)) < 5e-6


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_in_their_row(isa: str, value: float, accuracy_level: int) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout.uniform(8, 64, 4, 32, midrise=True))
    a = rng.standard_normal((3, 64)).astype(np.float32)
    a[1, 5] = value
    (actual,) = native_session(op_model(weight, True, accuracy_level)).run(None, {"A": a})
    assert not np.isfinite(actual[1]).any()
    expected = q_matmul(a[::2], weight, accuracy_level=accuracy_level)
    assert relative_error(actual[::2], expected) < 5e-6


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_model_with_and_without_the_library(pattern: str) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout(32, 128, 64, (8, 8, 8, 8), midrise=True, pattern=Pattern.parse(pattern)))
    model = op_model(weight, True, 0, rng.standard_normal(32).astype(np.float32))
    a = rng.standard_normal((5, 128)).astype(np.float32)
    (native,) = native_session(model).run(None, {"A": a})
    (portable,) = onnxruntime.InferenceSession(model.SerializeToString(), session_options()).run(None, {"A": a})
    assert relative_error(native, portable) < 5e-6


def test_the_profile_names_the_native_kernel(tmp_path: Path) -> None:
    weight = random_weight(np.random.default_rng(0), Layout.uniform(8, 64, 4, 32))
    a = np.ones((1, 64), np.float32)
    executed = []
    for native in (False, True):
        options = session_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / f"profile_{native}")
        if native:
            fips_ort.register(options)
        session = onnxruntime.InferenceSession(op_model(weight, True).SerializeToString(), options)
        session.run(None, {"A": a})
        events = json.loads(Path(session.end_profiling()).read_text())
        executed.append({event["args"]["op_name"] for event in events if event.get("args", {}).get("op_name")})
    portable, native_ops = executed
    assert "QMatMul" not in portable
    assert "Gemm" in portable
    assert native_ops == {"QMatMul"}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_weights_may_be_inputs(pattern: str) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout(12, 128, 64, (3, 3, 3, 3), pattern=Pattern.parse(pattern)))
    a = rng.standard_normal((2, 128)).astype(np.float32)
    feeds = {"A": a, "codes": weight.codes, "scales": weight.scales}
    if pattern != "dense":
        feeds["pattern"] = weight.pattern
    session = native_session(op_model(weight, True, constant=False))
    (actual,) = session.run(None, feeds)
    assert relative_error(actual, q_matmul(a, weight)) < 5e-6


def replace(model: onnx.ModelProto, name: str, value: np.ndarray) -> onnx.ModelProto:
    (proto,) = [proto for proto in model.graph.initializer if proto.name == name]
    proto.CopyFrom(numpy_helper.from_array(value, name))
    return model


def set_attribute(model: onnx.ModelProto, name: str, value: int) -> onnx.ModelProto:
    (attribute,) = [attribute for attribute in model.graph.node[0].attribute if attribute.name == name]
    attribute.i = value
    return model


def weight_of(pattern: str) -> PackedWeight:
    layout = Layout(12, 128, 64, (3, 3, 3, 3), pattern=Pattern.parse(pattern))
    return random_weight(np.random.default_rng(0), layout)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_truncated_codes_are_refused_when_the_session_is_made(pattern: str) -> None:
    weight = weight_of(pattern)
    model = replace(op_model(weight, True), "codes", weight.codes[:-1])
    message = f"codes has {weight.codes.size - 1} bytes, expected {weight.codes.size}"
    with pytest.raises(RuntimeException, match=message):
        native_session(model)


@pytest.mark.parametrize(("pattern", "stream", "value", "message"), [
    ("bitmap", "pattern", np.full(192, 255, np.uint8), "codes has .* bytes, expected 816"),
    ("bitmap", "pattern", np.zeros(191, np.uint8), "pattern has 191 bytes, expected 192"),
    ("2:4", "pattern", np.zeros(4 * 8 * 2 * 16, np.uint8), "indices of the n:m pattern are not ascending"),
    ("2:8", "pattern", np.zeros(4 * 4 * 2 * 24, np.uint8), "indices of the n:m pattern are not ascending"),
    ("1:4", "scales", np.ones((12, 2), np.float16), r"scales has shape \[12, 2\], expected \[4, 2, 16\]"),
    ("dense", "scales", np.ones((12, 1), np.float16), r"scales has shape \[12, 1\], expected \[12, 2\]"),
    ("dense", "codes", np.zeros((2, 408), np.uint8), "codes must be a vector"),
])
def test_malformed_streams_are_refused(pattern: str, stream: str, value: np.ndarray, message: str) -> None:
    with pytest.raises(RuntimeException, match=message):
        native_session(replace(op_model(weight_of(pattern), True), stream, value))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.booleans(),
    st.dictionaries(
        st.sampled_from(ATTRIBUTES["SparseQMatMul"]),
        st.sampled_from((-1, 0, 1, 2, 3, 4, 8, 63, 64, 128, 2**31, 2**40)),
        max_size=2,
    ),
    st.dictionaries(st.sampled_from(("codes", "pattern", "scales")), st.integers(0, 600), max_size=2),
    st.booleans(),
)
def test_whatever_a_node_says_it_runs_or_is_refused_with_a_message(
    pattern: str, trans_b: bool, attributes: dict[str, int], lengths: dict[str, int], constant: bool
) -> None:
    weight = weight_of(pattern)
    model = op_model(weight, trans_b, 4, constant=constant, functions=zero_functions())
    (node,) = model.graph.node
    for attribute in node.attribute:
        attribute.i = attributes.get(attribute.name, attribute.i)
    values = {"codes": weight.codes, "pattern": weight.pattern, "scales": weight.scales}
    values = {name: value for name, value in values.items() if name in node.input}
    values |= {name: np.resize(values[name], length) for name, length in lengths.items() if name in values}
    for name, value in values.items():
        if constant:
            replace(model, name, value)
        else:
            (declared,) = (proto for proto in model.graph.input if proto.name == name)
            declared.type.tensor_type.ClearField("shape")
    a = np.ones((3, 12 if not trans_b else 128), np.float32)
    try:
        (y,) = native_session(model).run(None, {"A": a, **({} if constant else values)})
    except (RuntimeException, InvalidArgument, Fail) as error:
        message = str(error)
    else:
        assert y.shape[0] == 3
        return
    assert attributes or lengths
    assert f"ai.fips.{node.op_type}: " in message


@pytest.mark.parametrize(("name", "value", "message"), [
    ("K", 0, "K and N must be positive"),
    ("transB", 2, "transB must be 0 or 1, got 2"),
    ("midrise", -1, "midrise must be 0 or 1, got -1"),
    ("segment_axis", 7, "segment_axis must be 0 or 1, got 7"),
    ("accuracy_level", 1, "accuracy_level must be 0 or 4, got 1"),
    ("block_size", 60, "block_size 60 does not divide the 128 columns"),
    ("block_size", 4, "block_size 4 is not a multiple of 16"),
    ("size_8bit", 4, "the segments do not add up to the 12 entries of axis 0"),
    ("size_2bit", 2, "the segments add up to 11, not to the 12 entries of axis 0"),
    ("keep", 3, "unsupported pattern: keep 3, of 4"),
])
def test_malformed_attributes_are_refused(name: str, value: int, message: str) -> None:
    model = set_attribute(op_model(weight_of("2:4"), True, functions=zero_functions()), name, value)
    with pytest.raises(RuntimeException, match=message):
        native_session(model)


@pytest.mark.parametrize(("row_bits", "message"), [
    (np.full(12, 4, np.uint8), "row_bits has 0 rows of 8 bits, the segment 3"),
    (np.repeat(np.array([8, 4, 3, 5], np.uint8), 3), "row_bits has 5 at 9, but no segment has so many bits"),
    (np.repeat(np.array([8, 4, 3], np.uint8), 3), "row_bits has 9 elements, expected 12"),
    (np.repeat(np.array([[8, 4, 3, 2]], np.uint8), 3, axis=0), "row_bits must be a vector"),
])
@pytest.mark.parametrize("constant", [False, True])
def test_orders_that_do_not_fit_are_refused(row_bits: np.ndarray, message: str, constant: bool) -> None:
    weight = weight_of("dense")
    for op, model in (("QMatMul", op_model(weight, True, row_bits=row_bits, constant=constant)),
                      ("QGather", gather_model(weight, row_bits, constant=constant))):
        first = {"A": np.ones((1, 128), np.float32)} if op == "QMatMul" else {"indices": np.zeros(1, np.int64)}
        feeds = {} if constant else {"codes": weight.codes, "scales": weight.scales, "row_bits": row_bits}
        with pytest.raises((RuntimeException, InvalidArgument), match=f"ai.fips.{op}: {message}"):
            native_session(model).run(None, first | feeds)


def test_an_order_of_columns_is_refused() -> None:
    weight = random_weight(np.random.default_rng(0), Layout.uniform(12, 64, 4, 64))
    row_bits = np.full(64, 4, np.uint8)
    with pytest.raises(RuntimeException, match="ai.fips.QMatMul: row_bits needs transB 1 and segment_axis 0"):
        native_session(op_model(weight, False, row_bits=row_bits))


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(ATTRIBUTES["QGather"]),
        st.sampled_from((-1, 0, 1, 2, 3, 8, 63, 64, 128, 2**31, 2**40)),
        max_size=1,
    ),
    st.dictionaries(st.sampled_from(("codes", "scales", "row_bits")), st.integers(0, 600), max_size=1),
    st.lists(st.sampled_from(BIT_WIDTHS), min_size=12, max_size=12) | st.none(),
    st.lists(st.integers(-2, 13) | st.integers(-(2**63), 2**63 - 1), max_size=3),
    st.booleans(),
)
def test_whatever_is_looked_up_is_a_row_or_refused_with_a_message(
    attributes: dict[str, int], lengths: dict[str, int], widths: list[int] | None, indices: list[int], constant: bool
) -> None:
    weight = weight_of("dense")
    sound = np.repeat(np.array(BIT_WIDTHS, np.uint8), 3)
    row_bits = sound if widths is None else np.array(widths, np.uint8)
    values = {"codes": weight.codes, "scales": weight.scales, "row_bits": row_bits}
    values |= {name: np.resize(values[name], length) for name, length in lengths.items()}
    model = gather_model(weight, row_bits, functions=[], constant=constant)
    for attribute in model.graph.node[0].attribute:
        attribute.i = attributes.get(attribute.name, attribute.i)
    for name, value in values.items():
        if constant:
            replace(model, name, value)
        else:
            (declared,) = (proto for proto in model.graph.input if proto.name == name)
            declared.type.tensor_type.ClearField("shape")
    try:
        feeds = {"indices": np.array(indices, np.int64), **({} if constant else values)}
        (y,) = native_session(model).run(None, feeds)
    except (RuntimeException, InvalidArgument, Fail) as error:
        message = str(error)
    else:
        assert y.shape[0] == len(indices)
        if not attributes and not lengths:
            np.testing.assert_array_equal(y, q_gather(np.array(indices, np.int64), weight, row_bits))
        return
    assert "ai.fips.QGather: " in message
    counts = tuple(int(np.sum(row_bits == bits)) for bits in BIT_WIDTHS)
    outside = any(not 0 <= index < 12 for index in indices)
    assert attributes or lengths or outside or counts != weight.layout.segments


@pytest.mark.parametrize(("name", "dtype"), [("indices", np.int32), ("codes", np.int8), ("scales", np.float32),
                                             ("row_bits", np.int64)])
def test_other_types_are_refused(name: str, dtype: type) -> None:
    model = gather_model(weight_of("dense"), np.repeat(np.array(BIT_WIDTHS, np.uint8), 3), constant=False, functions=[])
    (declared,) = (proto for proto in model.graph.input if proto.name == name)
    declared.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    with pytest.raises(InvalidGraph, match=f"Type .* of input parameter \\({name}\\)"):
        native_session(model)


def test_missing_attributes_are_refused() -> None:
    model = op_model(weight_of("dense"), True, functions=zero_functions())
    attributes = model.graph.node[0].attribute
    attributes.remove(next(attribute for attribute in attributes if attribute.name == "block_size"))
    with pytest.raises(RuntimeException,
                       match="attribute block_size is missing"):
        native_session(model)


def test_wrong_inputs_are_refused_at_run_time() -> None:
    weight = weight_of("bitmap")
    a = np.ones((2, 128), np.float32)
    session = native_session(op_model(weight, True, bias=np.ones(7, np.float32), functions=zero_functions()))
    with pytest.raises(InvalidArgument,
                       match=r"bias has shape \[7\], expected \[12\]"):
        session.run(None, {"A": a})
    model = op_model(weight, True, functions=zero_functions())
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    with pytest.raises(InvalidArgument,
                       match=r"A has shape \[2, 64\], expected \[..., 128\]"):
        native_session(model).run(None, {"A": a[:, :64]})


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPS_ORT_ISA", "avx9000")
    known = ", ".join(reversed(available_isas()))
    with pytest.raises(RuntimeException,
                       match=f"FIPS_ORT_ISA=avx9000: unknown, or this CPU lacks it; it has {known}$"):
        native_session(op_model(weight_of("dense"), True))


@pytest.mark.parametrize("function", ["RegisterCustomOps", "FipsOrtRegisterCustomOps"])
def test_onnxruntime_before_1_17_gets_a_clear_error(function: str) -> None:
    messages = []
    create_status_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version_type = ctypes.CFUNCTYPE(ctypes.c_void_p)

    @create_status_type
    def create_status(code: int, message: bytes) -> int:
        messages.append((code, message.decode()))
        return 1

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p).value)
    get_api = get_api_type(lambda version: None if version > 16 else ctypes.addressof(table))
    version_string = ctypes.create_string_buffer(b"1.16.3")
    get_version = get_version_type(lambda: ctypes.addressof(version_string))
    base = (ctypes.c_void_p * 2)(*[ctypes.cast(entry, ctypes.c_void_p).value for entry in (get_api, get_version)])
    register = getattr(ctypes.CDLL(str(fips_ort.library_path())), function)
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1
    assert messages == [(1, "fips_ort needs ONNX Runtime 1.17 or later, this is 1.16.3")]


NODES = 12
MEMORY_SCRIPT = """
import sys
import numpy as np, onnxruntime, psutil, fips_ort
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
fips_ort.register(options)
onnxruntime.InferenceSession(sys.argv[2], options)
before = psutil.Process().memory_info().rss
session = onnxruntime.InferenceSession(sys.argv[1], options)
session.run(None, {"A": np.ones((4, 8192), np.float32)})
print(psutil.Process().memory_info().rss - before)
"""


TABLE_SCRIPT = MEMORY_SCRIPT.replace('{"A": np.ones((4, 8192), np.float32)}',
                                     '{"A": np.ones((1, 640), np.float32), "indices": np.arange(3)}')


@pytest.mark.parametrize("external", [False, True])
def test_a_basis_read_by_many_nodes_is_in_memory_once(external: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layout = Layout.uniform(16384, 8192, 4, 64)
    weight = PackedWeight(
        layout, rng.integers(0, 256, 64 << 20, dtype=np.uint8), np.zeros(0, np.uint8),
        np.ones(layout.scales_shape, np.float16),
    )
    onnx.save(op_model(weight, True, nodes=NODES), tmp_path / "model.onnx", save_as_external_data=external,
              location="weights" if external else None)
    onnx.save(op_model(weight_of("dense"), True), tmp_path / "small.onnx")
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, tmp_path / "model.onnx", tmp_path / "small.onnx"],
        capture_output=True, text=True, check=True,
    )
    resident = int(result.stdout)
    if external:
        files = sum(path.stat().st_size for path in (tmp_path / "model.onnx", tmp_path / "weights"))
        activations = 4 * 4 * (8192 + NODES * 16384)
        assert resident < 1.1 * (files + activations)
    else:
        # A file without external data may be held once more, as the parsed model.
        assert resident < 2.5 * weight.nbytes
