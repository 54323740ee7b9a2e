import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument
from op_samples import layouts, op_model, random_weight, relative_error, session_options

from exporters.functions import op_functions
from fips_ort.layout import BITMAP, PATTERNS, Layout, Pattern
from fips_ort.packed import pack
from fips_ort.reference import q_matmul


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


def test_functions_refuse_opsets_without_their_operators() -> None:
    with pytest.raises(ValueError, match="need opset 18 or later, got 17"):
        op_functions(17)
