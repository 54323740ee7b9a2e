"""The baseline at 4 bits: onnxruntime reads the bytes as they are meant."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from causal_lm_samples import tiny_language_model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from exporters.nbits import NBitsEmbedding, NBitsLinear, NBitsWeight, pack_nbits, quantize_blocks, with_nbits


def values_of(weight: NBitsWeight) -> NDArray[np.float32]:
    """What codes and scales stand for: float32 [N, K]."""
    codes = weight.codes.numpy()
    levels = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1).astype(np.float32) - 8
    values: NDArray[np.float32] = (levels * weight.scales.numpy()[..., None]).reshape(len(codes), -1)
    return values[:, : weight.shape[1]]


def test_levels_use_the_whole_range_and_round_to_nearest() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    levels, scales = quantize_blocks(weight, 16)
    blocks = levels.reshape(6, 4, 16)
    # The entry of largest magnitude gets the lowest level, whatever its sign.
    largest = np.abs(weight.reshape(6, 4, 16)).argmax(axis=-1)
    assert (np.take_along_axis(blocks, largest[..., None], -1) == -8).all()
    error = np.abs(levels * np.repeat(scales.astype(np.float32), 16, axis=1) - weight)
    step = np.repeat(np.abs(scales).astype(np.float32), 16, axis=1)
    clipped = levels == 7
    assert (error[~clipped] <= step[~clipped] * (0.5 + 2**-8)).all()
    assert (error[clipped] <= step[clipped] * (1.0 + 2**-8)).all()


def test_a_zero_block_stays_zero() -> None:
    levels, scales = quantize_blocks(np.zeros((2, 32), np.float32), 16)
    assert not levels.any()
    assert not scales.any()


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond float16"):
        quantize_blocks(np.full((1, 16), 1e9, np.float32), 16)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([16, 32]), st.integers(1, 5), st.integers(0, 2**31))
def test_packed_codes_are_in_the_ops_order(block_size: int, rows: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(-8, 8, (rows, 3 * block_size)).astype(np.int8)
    stored = pack_nbits(levels, block_size)
    assert stored.shape == (rows, 3, block_size // 2)
    pairs = np.stack([stored & 15, stored >> 4], axis=-1).reshape(rows, -1).astype(np.int8) - 8
    np.testing.assert_array_equal(pairs, levels)


def run(node: onnx.NodeProto, inputs: dict[str, Any], constants: dict[str, Any], shape: list[int]) -> Any:
    """What onnxruntime computes for one node with these inputs and initializers."""
    (name, value), = inputs.items()
    kind = TensorProto.FLOAT if value.dtype == np.float32 else TensorProto.INT64
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, kind, list(value.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]


@pytest.mark.parametrize(
    ("features", "block_size"), [(128, 16), (128, 32), (128, 64), (208, 32), (208, 128), (72, 16), (100, 64)]
)
def test_onnxruntime_multiplies_with_the_stored_bytes(features: int, block_size: int) -> None:
    torch.manual_seed(0)
    weight = NBitsWeight(torch.randn(24, features), block_size)
    layer = NBitsLinear(weight, None, "layer", 0)
    assert torch.equal(layer.scales, layer.scales.half().float())
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **layer.attributes)
    x = np.random.default_rng(1).standard_normal((5, features)).astype(np.float32)
    y = run(node, {"x": x}, {"codes": layer.codes.numpy(), "scales": layer.scales.numpy()}, [5, 24])
    np.testing.assert_allclose(y, x @ values_of(weight).T, atol=1e-4)


def test_onnxruntime_looks_up_the_stored_bytes() -> None:
    torch.manual_seed(0)
    weight = NBitsWeight(torch.randn(40, 64), 16)
    table = NBitsEmbedding(weight, None)
    attributes = {"bits": 4, "block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    inputs = ["codes", "ids", "scales"]
    node = helper.make_node("GatherBlockQuantized", inputs, ["y"], domain="com.microsoft", **attributes)
    ids = np.array([[0, 39, 7], [7, 21, 1]])
    stored = {"codes": table.codes.numpy(), "scales": table.scales.numpy()}
    rows = run(node, {"ids": ids}, stored, [2, 3, 64])
    np.testing.assert_array_equal(rows, values_of(weight)[ids])


@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
def test_every_layer_of_a_language_model_has_4_bits(kind: str) -> None:
    dense = tiny_language_model(kind)
    model: Any = with_nbits(dense, 16, accuracy_level=4)
    assert not any(isinstance(module, nn.Linear | nn.Embedding) for module in model.modules())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, NBitsEmbedding)
    assert (table.codes.data_ptr() == head.codes.data_ptr()) == (kind == "gemma3")
    assert model.model.layers[1].mlp.down_proj.attributes["accuracy_level"] == 4


def test_tables_are_quantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 32)
    whole = NBitsWeight(weight, 16)
    monkeypatch.setattr("exporters.nbits._ROWS_AT_ONCE", 7)
    parts = NBitsWeight(weight, 16)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)
