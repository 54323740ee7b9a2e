import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from packed_samples import PIXEL_SHAPE, images, random_packed, tiny_model
from torch import nn

from exporters.modules import install_packed
from exporters.rest import (
    NBitsLinear,
    fix_position_embeddings,
    pack_nbits,
    quantize_blocks,
    quantize_linears,
    quantize_table,
    round_to_float16,
    unpack_nbits,
)


@pytest.mark.parametrize("bits", [4, 8])
def test_levels_use_the_whole_range_and_round_to_nearest(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    levels, scales = quantize_blocks(weight, bits, 16)
    lowest = -(1 << (bits - 1))
    blocks = levels.reshape(6, 4, 16)
    # The entry of largest magnitude gets the lowest level, whatever its sign.
    largest = np.abs(weight.reshape(6, 4, 16)).argmax(axis=-1)
    assert (np.take_along_axis(blocks, largest[..., None], -1) == lowest).all()
    error = np.abs(levels * np.repeat(scales.astype(np.float32), 16, axis=1) - weight)
    step = np.repeat(np.abs(scales).astype(np.float32), 16, axis=1)
    clipped = levels == -lowest - 1
    assert (error[~clipped] <= step[~clipped] * (0.5 - lowest * 2**-11)).all()
    assert (error[clipped] <= step[clipped] * (1.0 - lowest * 2**-11)).all()


def test_a_zero_block_stays_zero() -> None:
    levels, scales = quantize_blocks(np.zeros((2, 32), np.float32), 4, 16)
    assert not levels.any()
    assert not scales.any()


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond float16"):
        quantize_blocks(np.full((1, 16), 1e9, np.float32), 4, 16)
    with pytest.raises(ValueError, match="got 3"):
        quantize_blocks(np.zeros((1, 16), np.float32), 3, 16)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), st.sampled_from([16, 32]), st.integers(1, 5), st.integers(0, 2**31))
def test_pack_and_unpack_are_inverse(bits: int, block_size: int, rows: int, seed: int) -> None:
    half = 1 << (bits - 1)
    levels = np.random.default_rng(seed).integers(-half, half, (rows, 3 * block_size)).astype(np.int8)
    stored = pack_nbits(levels, bits, block_size)
    assert stored.shape == (rows, 3, block_size * bits // 8)
    np.testing.assert_array_equal(unpack_nbits(stored, bits), levels)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_onnxruntime_reads_the_stored_bytes_as_we_do(bits: int, block_size: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 24)
    stored = NBitsLinear(quantize_table(linear.weight, bits, block_size), linear.bias, "layer")
    attributes = {"K": 128, "N": 24, "bits": bits, "block_size": block_size}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 128])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 24])],
        [numpy_helper.from_array(getattr(stored, name).numpy(), name) for name in ("codes", "scales")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    x = np.random.default_rng(1).standard_normal((5, 128)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    with torch.inference_mode():
        expected = (stored(torch.from_numpy(x)) - stored.bias).numpy()
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(stored.scales.numpy(), stored.scales.half().float().numpy())


def test_only_linears_outside_mlps_and_skipped_ones_are_quantized() -> None:
    dense = tiny_model("vit")
    model = quantize_linears(install_packed(dense, random_packed(dense, "1:4")), 4, 32, skip=["classifier"])
    quantized = {name for name, module in model.named_modules() if isinstance(module, NBitsLinear)}
    assert quantized == {f"vit.layers.{i}.attention.{p}_proj" for i in range(3) for p in "qkvo"}
    assert type(model.classifier) is nn.Linear
    assert not any(isinstance(module, NBitsLinear) for module in dense.modules())


def test_uneven_block_size_names_every_offender() -> None:
    with pytest.raises(ValueError, match=r"block_size 48 .*q_proj \(32\).*fc2 \(64\).*classifier \(32\)"):
        quantize_linears(tiny_model("vit"), 4, 48)
    with pytest.raises(ValueError, match="not linear layers of the model: head"):
        quantize_linears(tiny_model("vit"), 4, 32, skip=["head"])


def test_float16_rounds_the_rest_and_leaves_packed_storage_alone() -> None:
    dense = tiny_model("vit")
    packed = random_packed(dense, "bitmap")
    before = quantize_linears(install_packed(dense, packed), 8, 32, skip=["classifier"])
    after = round_to_float16(before)
    weight = before.classifier.weight
    assert not torch.equal(after.classifier.weight, weight)
    assert torch.equal(after.classifier.weight, weight.half().float())
    for name in ("shared_bases.group_0", "vit.layers.0.mlp.fc1", "vit.layers.0.attention.q_proj"):
        assert torch.equal(after.get_submodule(name).values, before.get_submodule(name).values), name
    assert torch.equal(after.vit.layers[0].mlp.fc1.bias, before.vit.layers[0].mlp.fc1.bias)


def test_float16_names_what_it_cannot_hold() -> None:
    model = tiny_model("vit")
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e6
        model.vit.layernorm.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"vit\.layernorm\.bias, classifier\.weight"):
        round_to_float16(model)


def test_fixed_position_embeddings_compute_the_same() -> None:
    model = tiny_model("dinov2")
    x = torch.from_numpy(images(2))
    with torch.inference_mode():
        before = model(pixel_values=x).logits
        assert model.dinov2.embeddings.position_embeddings.shape[1] == 37
    fix_position_embeddings(model, *PIXEL_SHAPE[1:])
    with torch.inference_mode():
        after = model(pixel_values=x).logits
    assert model.dinov2.embeddings.position_embeddings.shape[1] == 17
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match="square images only"):
        fix_position_embeddings(model, 16, 20)


@pytest.mark.parametrize("kind", ["vit", "deit", "swin"])
def test_position_embeddings_interpolated_on_request_only_are_left_alone(kind: str) -> None:
    model = tiny_model(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fix_position_embeddings(model, 16, 16)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
