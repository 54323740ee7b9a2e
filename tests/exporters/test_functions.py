from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument
from op_samples import (
    gather_model,
    layouts,
    op_model,
    random_row_bits,
    random_weight,
    relative_error,
    session_options,
)

from exporters.functions import op_functions
from fips_ort.layout import BITMAP, PATTERNS, Layout, Pattern
from fips_ort.packed import pack
from fips_ort.reference import q_gather, q_matmul


def knows_opset(opset: int) -> bool:
    """Whether this onnxruntime runs models of that opset: 1.17 knows 20 and older, 1.23 knows 23."""
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [value],
                              [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), session_options())
    except (Fail, InvalidArgument):
        return False
    return True


OPSETS = [opset for opset in (18, 20, 21, 23) if knows_opset(opset)]


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_functions_agree_with_the_reference(pattern: str, trans_b: bool) -> None:
    rng = np.random.default_rng(PATTERNS.index(pattern))
    for index, layout in enumerate(layouts(pattern)):
        weight = random_weight(rng, layout)
        k, n = (layout.columns, layout.rows) if trans_b else (layout.rows, layout.columns)
        a = rng.standard_normal((4, k)).astype(np.float32)
        bias = rng.standard_normal(n).astype(np.float32) if index % 2 else None
        expected = q_matmul(a, weight, trans_b=trans_b, bias=bias)
        model = op_model(weight, trans_b, 4 * (index % 3 == 0), bias, opset=OPSETS[index % len(OPSETS)])
        onnx.checker.check_model(model, full_check=True)
        for optimize in (False, True):
            session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(optimize))
            (actual,) = session.run(None, {"A": a})
            assert relative_error(actual, expected) < 2e-6, (layout, optimize)


@pytest.mark.parametrize("shape", [(), (2, 3), (0,), (2, 0), (1, 2, 3)])
def test_activations_of_any_rank(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout.uniform(6, 64, 3, 32, pattern=BITMAP))
    a = rng.standard_normal((*shape, 64)).astype(np.float32)
    model = op_model(weight, True, batch=[f"batch_{axis}" for axis in range(len(shape))])
    (actual,) = onnxruntime.InferenceSession(model.SerializeToString(), session_options()).run(None, {"A": a})
    np.testing.assert_allclose(actual, q_matmul(a, weight), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kept", [False, True])
def test_bitmaps_that_keep_nothing_or_everything(kept: bool) -> None:
    layout = Layout(9, 64, 32, (3, 2, 3, 1), pattern=BITMAP, midrise=True)
    rng = np.random.default_rng(0)
    mask = np.full((9, 64), kept)
    weight = pack(rng.integers(-2, 2, (9, 64)).astype(np.int8), np.ones((9, 2), np.float16), mask, layout)
    a = rng.standard_normal((2, 64)).astype(np.float32)
    (actual,) = onnxruntime.InferenceSession(
        op_model(weight, True).SerializeToString(), session_options(),
    ).run(None, {"A": a})
    np.testing.assert_allclose(actual, q_matmul(a, weight), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pattern", ["dense", "bitmap", "2:8"])
def test_decoding_is_folded_when_the_model_is_loaded(pattern: str, tmp_path) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout(64, 64, 32, (16, 16, 16, 16), pattern=Pattern.parse(pattern)))
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(op_model(weight, True).SerializeToString(), options)
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert sorted(node.op_type for node in graph.node) == ["Concat", "Flatten", "Gemm", "Reshape", "Shape"]
    assert [64, 64] in [list(tensor.dims) for tensor in graph.initializer]


ORDERED = [(3, 5, 4, 9), (0, 5, 0, 3), (4, 0, 0, 0), (0, 0, 1, 0)]
"""Rows of each width."""


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (72, 24)])
def test_outputs_have_the_order_of_row_bits(columns: int, block_size: int, optimize: bool) -> None:
    rng = np.random.default_rng(0)
    for index, segments in enumerate(ORDERED):
        layout = Layout(sum(segments), columns, block_size, segments, midrise=bool(index % 2))
        weight, row_bits = random_weight(rng, layout), random_row_bits(rng, layout)
        a = rng.standard_normal((3, columns)).astype(np.float32)
        for bias in (None, rng.standard_normal(layout.rows).astype(np.float32)):
            for constant in (False, True):
                model = op_model(weight, True, 0, bias, row_bits=row_bits, constant=constant,
                                 opset=OPSETS[index % len(OPSETS)])
                onnx.checker.check_model(model, full_check=True)
                session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(optimize))
                feeds = {"codes": weight.codes, "scales": weight.scales, "row_bits": row_bits}
                feeds |= {} if bias is None else {"bias": bias}
                (actual,) = session.run(None, {"A": a} | ({} if constant else feeds))
                expected = q_matmul(a, weight, bias=bias, row_bits=row_bits)
                assert relative_error(actual, expected) < 2e-6, (segments, constant)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (72, 24)])
def test_rows_are_looked_up_exactly(columns: int, block_size: int, optimize: bool) -> None:
    rng = np.random.default_rng(0)
    for index, segments in enumerate(ORDERED):
        layout = Layout(sum(segments), columns, block_size, segments, midrise=bool(index % 2))
        weight = random_weight(rng, layout)
        for row_bits in (None, random_row_bits(rng, layout)):
            model = gather_model(weight, row_bits, opset=OPSETS[index % len(OPSETS)], shape=("batch", "length"))
            onnx.checker.check_model(model, full_check=True)
            options = session_options(optimize)
            # onnxruntime 1.17 makes its plan of memory without the results that were empty.
            options.enable_mem_pattern = False
            session = onnxruntime.InferenceSession(model.SerializeToString(), options)
            for shape in ((1, 1), (2, 9), (0, 3), (3, 0)):
                indices = rng.integers(0, layout.rows, shape)
                (actual,) = session.run(None, {"indices": indices})
                np.testing.assert_array_equal(actual, q_gather(indices, weight, row_bits))
            for index_outside in (-1, -layout.rows, layout.rows, 1 << 40, -(1 << 62)):
                with pytest.raises(InvalidArgument, match="indices element out of data bounds"):
                    session.run(None, {"indices": np.array([[0, index_outside]])})


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 3)])
def test_indices_of_any_rank(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout(9, 64, 32, (2, 3, 3, 1)))
    indices = rng.integers(0, 9, shape)
    model = gather_model(weight, shape=[f"axis_{axis}" for axis in range(len(shape))])
    (actual,) = onnxruntime.InferenceSession(model.SerializeToString(), session_options()).run(
        None, {"indices": indices}
    )
    np.testing.assert_array_equal(actual, q_gather(indices, weight))


def test_looking_up_never_decodes_the_table(tmp_path: Path) -> None:
    """What onnxruntime folds when it loads the model: nothing of the size of the table but the table."""
    rng = np.random.default_rng(0)
    layout = Layout(1024, 256, 64, (100, 0, 924, 0))
    weight, row_bits = random_weight(rng, layout), random_row_bits(rng, layout)
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(gather_model(weight, row_bits).SerializeToString(), options)
    sizes = sorted(len(tensor.raw_data) for tensor in onnx.load(tmp_path / "optimized.onnx").graph.initializer)
    assert sizes[-1] == weight.codes.nbytes
    assert sizes[-2] <= 8 * layout.rows  # where each row is stored


def test_functions_refuse_opsets_without_their_operators() -> None:
    with pytest.raises(ValueError, match="need opset 18 or later, got 17"):
        op_functions(opset=17)
