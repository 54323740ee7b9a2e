"""What lies outside the MLPs as stored: packed layers and tables, float16 numbers, fixed position embeddings."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_lm_samples import tiny_language_model
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_samples import PIXEL_SHAPE, images, random_packed, tiny_model
from rest_samples import with_packed_linears, with_packed_tables
from torch import nn

from exporters.modules import PackedEmbedding, PackedLayer, PackedOutput, install_packed
from exporters.packed_model import save_packed_model
from exporters.packed_rest import PackedRest, PackedTable, load_packed_rest, save_packed_rest
from exporters.passes import as_float16
from exporters.rest import fix_position_embeddings, install_rest, packed_rest, round_to_float16
from fips_ort.packed import dequantize
from fips_ort.row_order import stored_rows
from pipeline.quantization.rest_weights import quantize_rows, quantize_table
from pipeline.recipe.schema import Tier


def test_only_what_is_packed_is_replaced() -> None:
    dense = tiny_model("vit")
    model = with_packed_linears(install_packed(dense, random_packed(dense, "1:4")), 3, 32, skip=["classifier"])
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    assert packed == {f"vit.layers.{i}.attention.{p}_proj" for i in range(3) for p in "qkvo"}
    assert packed_rest(model).linears.keys() == packed
    assert type(model.classifier) is nn.Linear
    assert not any(isinstance(module, PackedLayer) for module in dense.modules())
    layer, linear = model.vit.layers[0].attention.q_proj, dense.vit.layers[0].attention.q_proj
    x = torch.randn(2, 5, 32)
    expected = x @ torch.from_numpy(dequantize(layer.stored)).T + linear.bias.half().float()
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("features", [40, 72, 96])
def test_filled_blocks_compute_the_same(features: int) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(features, 7))
    layer = with_packed_linears(dense, 4, 64)[0]  # type: ignore[index]
    assert isinstance(layer, PackedLayer)
    assert layer.layout.columns >= features == layer.in_features
    x = torch.randn(3, features)
    expected = x @ layer.values[:, :features].T + dense[0].bias.half().float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert float((layer.values[:, :features] - dense[0].weight).abs().max()) < 0.05 * features**-0.5 * 2


@pytest.mark.parametrize("path", ["lm_head", "model.norm", "model.layers.7.self_attn.q_proj"])
def test_paths_that_lead_to_no_linear_layer_are_refused(path: str) -> None:
    weight = quantize_rows(torch.randn(8, 32), 4, 16)
    with pytest.raises(ValueError, match=f"{path} is no linear layer of the model"):
        install_rest(tiny_language_model("llama"), PackedRest(linears={path: weight}))
    with pytest.raises(ValueError, match=r"model\.norm is no table of tokens"):
        install_rest(tiny_language_model("llama"), PackedRest(tables={"model.norm": PackedTable(weight)}))


def test_float16_rounds_the_rest_and_leaves_packed_storage_alone() -> None:
    dense = tiny_model("vit")
    packed = random_packed(dense, "bitmap")
    before = with_packed_linears(install_packed(dense, packed), 8, 32, skip=["classifier"])
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


@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
@pytest.mark.parametrize("bits", [3, (Tier(bits=8, tokens=20), Tier(bits=2))])
def test_token_table_and_output_layer_are_packed_together(kind: str, bits: int | tuple[Tier, ...]) -> None:
    dense = tiny_language_model(kind)
    tied = dense.config.tie_word_embeddings
    assert tied == (kind == "gemma3")
    # Copies of the copy keep what it shares.
    model: Any = round_to_float16(with_packed_tables(dense, bits, 16, accuracy_level=4))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(dense.get_input_embeddings()).__name__.endswith("Embedding")
    assert isinstance(table, PackedEmbedding)
    assert isinstance(head, PackedOutput)
    assert (head.name, head.matrix.accuracy_level) == ("lm_head", 4)
    assert (head.matrix is table) == tied
    rest = packed_rest(model)
    assert rest.tables.keys() == ({"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"})
    for path, stored in rest.tables.items():
        weight = dense.get_submodule(path).weight
        values = dequantize(stored.weight)[stored_rows(stored.row_bits, stored.weight.layout)]
        matrix = table if path == "model.embed_tokens" else head.matrix
        np.testing.assert_array_equal(matrix.values.numpy(), values)
        # Rows are those of their tokens, in whatever order they are stored.
        similar = torch.nn.functional.cosine_similarity(matrix.values, weight.detach())
        similar[weight.detach().abs().amax(dim=1) == 0] = 1.0  # padding
        assert float(similar.min()) > 0.8
        if stored.row_bits is not None:
            assert float(similar[torch.from_numpy(stored.row_bits == 8)].min()) > 0.999
    scale = 32**0.5 if kind == "gemma3" else 1.0
    ids = torch.arange(265)[None]
    torch.testing.assert_close(table(ids)[0], scale * table.values, rtol=1e-6, atol=0)
    x = torch.randn(4, 32)
    torch.testing.assert_close(head(x), x @ head.values.T)


def test_token_tables_of_another_kind_are_refused() -> None:
    class Doubled(nn.Embedding):
        pass

    model = tiny_language_model("llama")
    model.model.embed_tokens.__class__ = Doubled
    with pytest.raises(ValueError, match="token table is a Doubled"):
        with_packed_tables(model, 4, 16)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["all", "linears", "tables"]), st.integers(0, 2**31))
def test_saved_weights_are_the_same(parts: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row_bits = torch.from_numpy(np.random.default_rng(seed).choice(np.array([8, 4, 3, 2], np.uint8), 30))
    linears = {"a.q_proj": quantize_rows(torch.randn(5, 40, generator=generator), 3, 32)}
    tables = {
        "embed": quantize_table(torch.randn(30, 32, generator=generator), row_bits, 16),
        "head": quantize_table(torch.randn(9, 16, generator=generator), torch.full((9,), 4, dtype=torch.uint8), 16),
    }
    rest = PackedRest(linears if parts != "tables" else {}, tables if parts != "linears" else {})
    with tempfile.TemporaryDirectory() as folder:
        save_packed_rest(rest, Path(folder) / "rest.safetensors")
        loaded = load_packed_rest(Path(folder) / "rest.safetensors")
    assert loaded.weights().keys() == rest.weights().keys()
    for name, weight in rest.weights().items():
        again = loaded.weights()[name]
        assert again.layout == weight.layout
        for part in ("codes", "pattern", "scales"):
            np.testing.assert_array_equal(getattr(again, part), getattr(weight, part))
    for name, table in rest.tables.items():
        assert (loaded.tables[name].row_bits is None) == (table.row_bits is None)
        if table.row_bits is not None:
            np.testing.assert_array_equal(loaded.tables[name].row_bits, table.row_bits)


def test_another_file_is_refused(tmp_path: Path) -> None:
    dense = tiny_model("vit")
    save_packed_model(random_packed(dense, "1:4"), tmp_path / "packed.safetensors")
    with pytest.raises(ValueError, match="not a file of fips-packed-rest"):
        load_packed_rest(tmp_path / "packed.safetensors")


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
