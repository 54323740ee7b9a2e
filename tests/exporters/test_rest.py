import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from causal_lm_samples import tiny_language_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from packed_samples import PIXEL_SHAPE, images, random_packed, tiny_model
from torch import nn

from exporters.modules import install_packed
from exporters.nbits import (
    NBitsEmbedding,
    NBitsLinear,
    pack_nbits,
    quantize_blocks,
    quantize_table,
    table_of_codes,
    table_of_values,
    unpack_nbits,
)
from exporters.passes import as_float16
from exporters.rest import fix_position_embeddings, quantize_embedding, quantize_linears, round_to_float16


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
@pytest.mark.parametrize(
    ("features", "block_size"), [(128, 16), (128, 32), (128, 64), (208, 32), (208, 128), (72, 16), (100, 64)]
)
def test_onnxruntime_reads_the_stored_bytes_as_we_do(bits: int, features: int, block_size: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(features, 24)
    table = quantize_table(linear.weight, bits, block_size)
    stored = NBitsLinear(table, linear.bias, "layer")
    again = table_of_codes(table.codes, table.scales, bits, block_size, features)
    assert torch.equal(again.values, table.values)
    assert torch.equal(table_of_values(table.values, table.scales, bits, block_size).codes, table.codes)
    attributes = {"K": features, "N": 24, "bits": bits, "block_size": block_size}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 24])],
        [numpy_helper.from_array(getattr(stored, name).numpy(), name) for name in ("codes", "scales")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    x = np.random.default_rng(1).standard_normal((5, features)).astype(np.float32)
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


def test_blocks_suit_the_length_of_rows() -> None:
    model = quantize_linears(tiny_model("vit"), 4, 64)
    sizes = {(module.in_features, module.block_size) for module in model.modules() if isinstance(module, NBitsLinear)}
    assert sizes == {(32, 32), (64, 64)}
    table = quantize_embedding(tiny_language_model("llama"), 4, 64).get_input_embeddings()
    assert isinstance(table, NBitsEmbedding)
    assert (table.block_size, tuple(table.codes.shape)) == (32, (265, 16))
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


@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_looks_up_the_stored_bytes_as_we_do(bits: int) -> None:
    torch.manual_seed(0)
    stored = NBitsEmbedding(quantize_table(torch.randn(40, 64), bits, 16), torch.tensor(8.0))
    node = helper.make_node("GatherBlockQuantized", ["codes", "ids", "scales"], ["y"], domain="com.microsoft",
                            bits=bits, block_size=16, gather_axis=0, quantize_axis=1)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 64])],
        [numpy_helper.from_array(getattr(stored, name).numpy(), name) for name in ("codes", "scales")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    ids = np.array([[0, 39, 7], [7, 21, 1]])
    (rows,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"ids": ids})
    np.testing.assert_array_equal(8 * rows, stored(torch.from_numpy(ids)).numpy())


@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
def test_token_table_and_output_layer_are_quantized_together(kind: str) -> None:
    dense = tiny_language_model(kind)
    tied = dense.config.tie_word_embeddings
    assert tied == (kind == "gemma3")
    # Copies of the copy keep what it shares.
    model = round_to_float16(quantize_embedding(dense, 4, 16, accuracy_level=4))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(dense.get_input_embeddings()).__name__.endswith("Embedding")
    assert isinstance(table, NBitsEmbedding)
    assert isinstance(head, NBitsLinear)
    assert (head.name, head.accuracy_level) == ("lm_head", 4)
    for part in ("codes", "scales", "values"):
        assert (getattr(table, part).data_ptr() == getattr(head, part).data_ptr()) == tied, part
    weight = dense.get_input_embeddings().weight
    scale = 32**0.5 if kind == "gemma3" else 1.0
    ids = torch.arange(265)[None]
    torch.testing.assert_close(table(ids)[0], scale * table.values, rtol=1e-6, atol=0)
    levels, scales = quantize_blocks(weight.detach().numpy(), 4, 16)
    expected = levels * np.repeat(scales.astype(np.float32), 16, axis=1)
    np.testing.assert_array_equal(table.values.numpy(), expected)
    with torch.inference_mode():
        logits, before = model(ids[:, :20]).logits, dense(ids[:, :20]).logits
    assert not torch.equal(logits, before)
    assert torch.nn.functional.cosine_similarity(logits.flatten(), before.flatten(), dim=0) > 0.9


def test_linear_layers_leave_the_output_layer_alone() -> None:
    model = quantize_linears(tiny_language_model("mistral"), 4, 32)
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.model.layers[1].mlp.down_proj, NBitsLinear)


def test_token_tables_that_cannot_be_quantized_are_refused() -> None:
    with pytest.raises(ValueError, match="ViTForImageClassification has no token table"):
        quantize_embedding(tiny_model("vit"), 4, 16)

    class Doubled(nn.Embedding):
        pass

    model = tiny_language_model("llama")
    model.model.embed_tokens.__class__ = Doubled
    with pytest.raises(ValueError, match="token table is a Doubled"):
        quantize_embedding(model, 4, 16)


def test_tables_are_quantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 32)
    whole = quantize_table(weight, 4, 16)
    monkeypatch.setattr("exporters.nbits._ROWS_AT_ONCE", 7)
    parts = quantize_table(weight, 4, 16)
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in ("codes", "scales", "values"))


def test_numbers_computed_from_the_configuration_are_not_rounded() -> None:
    model = tiny_language_model("gemma3")
    rounded = round_to_float16(model)
    assert not torch.equal(model.model.norm.weight, rounded.model.norm.weight)
    assert torch.equal(model.model.embed_tokens.embed_scale, rounded.model.embed_tokens.embed_scale)
    frequencies = [module.model.rotary_emb.sliding_attention_inv_freq for module in (model, rounded)]
    assert torch.equal(*frequencies)


def test_float16_is_found_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.passes._NUMBERS_AT_ONCE", 8)
    array = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float16).astype(np.float32)
    half = as_float16(array)
    assert half is not None
    np.testing.assert_array_equal(half, array.astype(np.float16))
    array[8, 3] = 1e6
    assert as_float16(array) is None
