import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from causal_lm_samples import (
    CASES,
    KINDS,
    MAX_LENGTH,
    WINDOW,
    WINDOWED,
    LanguageSample,
    language_sample,
    tiny_language_model,
    tokens,
    write_language_sample,
)
from language_samples import byte_level_tokenizer
from packed_samples import random_packed, sample, write_sample

from exporters.audit import AuditError, audit
from exporters.causal_lm import export_causal_lm
from exporters.genai_builder import ARCHITECTURES
from exporters.genai_config import SAMPLE_TEXTS, TokenizerError, check_tokenizers
from exporters.modules import install_packed
from exporters.packed_model import PackedModel
from exporters.packed_rest import PackedRest
from exporters.parity import ParityError, check_parity
from exporters.passes import tensor_of
from exporters.rest import install_rest
from fips_ort import causal_lm
from fips_ort.causal_lm import prefill_inputs
from fips_ort.load import load
from fips_ort.packed import stack_rows
from fips_ort.validate import validate
from pipeline.generate import generate, greedy_tokens
from pipeline.models.adapters import supported_model_types
from pipeline.plumbing.errors import InputError
from pipeline.quantization.rest_weights import quantize_rows

PROMPT = tokens(3 * WINDOW, seed=7)[0].tolist()
GENERATED = 24


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) / "artifact" for kind in KINDS}
    for kind, folder in folders.items():
        write_language_sample(folder, language_sample(kind))
    return folders


def test_every_language_model_is_a_sample() -> None:
    models = [tiny_language_model(kind) for kind in KINDS]
    assert sorted(model.config.model_type for model in models) == list(supported_model_types("text-generation"))
    assert sorted(type(model).__name__ for model in models) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_native_kernels_and_functions_compute_the_same(kind: str, artefacts: dict[str, Path]) -> None:
    exported = language_sample(kind)
    # One token; a batch; and texts past the sliding window.
    parity = check_parity(artefacts[kind], exported.module, [tokens(1), tokens(7, 3), tokens(3 * WINDOW, 2)])
    assert parity.samples == 6
    assert parity.rounding is None
    for difference in (parity.native_vs_torch, parity.portable_vs_torch, parity.native_vs_portable):
        assert difference.relative < 1e-5
        assert difference.same_predictions == 1.0
    assert exported.logits(tokens(4)).abs().max() > 0.5


@pytest.mark.parametrize("kind", WINDOWED)
def test_sliding_windows_matter_in_the_samples(kind: str) -> None:
    changed = tokens(3 * WINDOW)
    changed[0, 0] = 5 + (changed[0, 0] - 4) % 260
    exported = language_sample(kind)
    wide = tiny_language_model(kind, sliding_window=4 * WINDOW)
    narrow = tiny_language_model(kind)
    with torch.inference_mode():
        assert not torch.allclose(wide(tokens(3 * WINDOW)).logits[0, -1], narrow(tokens(3 * WINDOW)).logits[0, -1])
    assert not torch.equal(exported.logits(changed)[0, 1], exported.logits(tokens(3 * WINDOW))[0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_torch(kind: str, artefacts: dict[str, Path]) -> None:
    """Both onnxruntime-genai and plain onnxruntime give them, from a prompt shorter and one longer than the window."""
    exported = language_sample(kind)
    session = load(artefacts[kind], verify=False)
    for prompt in (PROMPT[:5], PROMPT):
        expected = exported.greedy(prompt, GENERATED)
        stop = (exported.module.config.eos_token_id,)
        for computed in (
            greedy_tokens(artefacts[kind], prompt, GENERATED),
            causal_lm.greedy_tokens(session, prompt, GENERATED, stop),
        ):
            assert len(computed) == GENERATED or computed[-1] in stop
            assert_same_until_tie(exported, prompt, computed, expected[: len(computed)])
        assert len(set(expected)) > 3


def assert_same_until_tie(exported: LanguageSample, prompt: list[int], actual: list[int], expected: list[int]) -> None:
    for place, (token, wanted) in enumerate(zip(actual, expected, strict=True)):
        if token != wanted:
            best = exported.logits(torch.tensor([prompt + expected[:place]]))[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-5 * best[0].abs()
            return


def test_prompts_are_read_in_chunks_with_the_same_result(
    artefacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = load(artefacts["gemma3"], verify=False)
    whole = causal_lm.greedy_tokens(session, PROMPT, 8)
    monkeypatch.setattr(causal_lm, "PREFILL_TOKENS", 10)
    assert causal_lm.greedy_tokens(session, PROMPT, 8) == whole
    with pytest.raises(ValueError, match="no tokens"):
        causal_lm.greedy_tokens(session, [], 8)


@pytest.mark.parametrize("kind", KINDS)
def test_initializers_are_the_models_own(kind: str) -> None:
    exported = language_sample(kind)
    stored = {name for name, _ in [*exported.module.named_parameters(), *exported.module.named_buffers()]}
    if exported.module.config.tie_word_embeddings and CASES[kind][3] is not None:
        stored.add("lm_head.codes")  # PyTorch names it only once
    initializers = exported.graph.graph.initializers
    # Queries, keys and values are stacked for the graph.
    stacked = {name for name in initializers if ".qkv_proj." in name}
    assert set(initializers) - stacked - {"logits_to_keep"} <= stored
    nodes = {node.name for node in exported.graph.graph}
    path = "model.layers.0.mlp"
    has_basis = CASES[kind][1]
    assert {f"{path}/basis_in" in nodes, f"{path}/basis_out" in nodes} == {has_basis}
    assert f"{path}/gate_proj" in nodes
    assert not [name for name in initializers if "rotary" not in name and initializers[name].dtype == ir.DataType.FLOAT
                and initializers[name].shape.numpy() != () and not name.endswith("bias")]


def test_gate_and_up_share_one_product() -> None:
    graph = language_sample("gemma2").graph.graph
    nodes = {node.name: node for node in graph}
    gate, up = (nodes[f"model.layers.1.mlp/{name}"] for name in ("gate_proj", "up_proj"))
    assert gate.inputs[0] is up.inputs[0]
    assert gate.inputs[0] is nodes["model.layers.1.mlp/basis_in"].outputs[0]
    names = [f"model.layers.{layer}.mlp/{name}" for layer in (0, 1) for name in ("basis_in", "basis_out")]
    assert len({nodes[name].inputs[1] for name in names}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_artefacts_store_what_was_promised(kind: str, artefacts: dict[str, Path]) -> None:
    exported = language_sample(kind)
    in_memory = audit(exported.graph, exported.packed, "float16")
    assert audit(artefacts[kind], exported.packed, "float16") == in_memory
    external = (artefacts[kind] / "model.onnx.data").stat().st_size
    inline = sum(row.bytes for row in in_memory if row.bytes < 256)
    assert 0 <= external - (sum(row.bytes for row in in_memory) - inline) < 64 * len(in_memory)


@pytest.mark.parametrize(
    ("kind", "tiers"), [("gemma2", {3: 265}), ("gemma3", {8: 30, 4: 100, 2: 135}), ("qwen3", {8: 265})]
)
def test_tied_tables_are_stored_once(kind: str, tiers: dict[int, int], artefacts: dict[str, Path]) -> None:
    exported = language_sample(kind)
    vocabulary, width = 265, 32
    rows = {row.name: row for row in audit(artefacts[kind], exported.packed, "float16")}
    table = rows["model.embed_tokens.codes"]
    assert table.kind == "token_table"
    assert table.bytes == sum(count * width * bits // 8 for bits, count in tiers.items())
    assert rows["model.embed_tokens.scales"].bytes == 2 * vocabulary * width // 32
    assert ("model.embed_tokens.row_bits" in rows) == (len(tiers) > 1)
    assert not [name for name in rows if name.startswith("lm_head")]
    # One initializer each, which look-up and output layer read.
    nodes = {node.name: node for node in exported.graph.graph}
    lookup, head = nodes["model.embed_tokens"], nodes["lm_head"]
    assert (lookup.op_type, head.op_type) == ("QGather", "QMatMul")
    assert [value.name for value in lookup.inputs[1:3]] == [value.name for value in head.inputs[1:3]]
    assert [value.name for value in lookup.inputs[3:]] == [value.name for value in head.inputs[4:]]
    buffers = exported.module.model.embed_tokens, exported.module.lm_head
    assert len({module.values.data_ptr() for module in buffers}) == 1


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "mistral", "qwen2"])
def test_queries_keys_and_values_are_one_product(kind: str) -> None:
    exported = language_sample(kind)
    nodes = [node for node in exported.graph.graph if "self_attn" in (node.name or "") and node.domain == "ai.fips"]
    layers = exported.module.config.num_hidden_layers
    names = sorted(f"model.layers.{i}.self_attn.{name}_proj" for i in range(layers) for name in ("qkv", "o"))
    assert sorted(node.name or "" for node in nodes) == names
    first = exported.module.model.layers[0].self_attn
    product = next(node for node in nodes if node.name == "model.layers.0.self_attn.qkv_proj")
    stacked = stack_rows([getattr(first, name).stored for name in ("q_proj", "k_proj", "v_proj")])
    assert product.attributes["N"].as_int() == stacked.layout.rows
    for value, expected in zip(product.inputs[1:3], (stacked.codes, stacked.scales), strict=True):
        assert value is not None
        np.testing.assert_array_equal(tensor_of(value).numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_tables_have_rows_for_new_tokens_only(kind: str) -> None:
    """Tables of all positions would be folded into constants of megabytes."""
    exported = language_sample(kind)
    stock = [node for node in exported.graph.graph if node.op_type == "GroupQueryAttention"]
    own = [node for node in exported.graph.graph if "CachedAttention" in node.op_type]
    assert len(stock) + len(own) == exported.module.config.num_hidden_layers
    for node in stock:
        assert node.attributes["do_rotary"].as_int() == 0
        assert not any(node.inputs[7:9])
    proto = ir.to_proto(exported.graph)
    tables = [node.output[0] for node in proto.graph.node if node.op_type in ("Cos", "Sin")]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tables)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    values = session.run(tables, prefill_inputs(session, tokens(5).numpy()))
    assert {value.shape for value in values} == {(5, exported.module.config.head_dim // 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_as_many_tokens_as_are_asked_for(kind: str, artefacts: dict[str, Path]) -> None:
    """Of the last one if nobody says so, which onnxruntime-genai knows by the shape that the graph declares."""
    session = load(artefacts[kind], verify=False)
    assert session.get_outputs()[0].shape == ["batch_size", 1, language_sample(kind).module.config.vocab_size]
    feeds = prefill_inputs(session, tokens(9, 2).numpy())
    (every,) = session.run(["logits"], feeds)
    assert every.shape[:2] == (2, 9)
    for kept in (1, 4, 9, 1000):
        (logits,) = session.run(["logits"], {**feeds, "logits_to_keep": np.array([kept])})
        np.testing.assert_allclose(logits, every[:, -kept:], atol=2e-5 * np.abs(every).max())
    del feeds["logits_to_keep"]
    (last,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(last, every[:, -1:], atol=2e-5 * np.abs(every).max())


def test_what_is_stored_otherwise_is_no_part_of_one_product() -> None:
    dense = tiny_language_model("llama")
    packed = {
        f"model.layers.{i}.self_attn.{name}": quantize_rows(
            dense.get_submodule(f"model.layers.{i}.self_attn.{name}").weight, bits, 32
        )
        for i in range(2)
        for name, bits in {"q_proj": 3, "k_proj": 4, "v_proj": 4, "o_proj": 8}.items()
    }
    model: Any = install_rest(dense, PackedRest(linears=packed)).eval()
    graph = export_causal_lm(model, MAX_LENGTH)
    products = {node.name for node in graph.graph if node.domain == "ai.fips"}
    assert products == set(packed)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    (logits,) = session.run(["logits"], prefill_inputs(session, tokens(20).numpy()))
    with torch.inference_mode():
        expected = model(input_ids=tokens(20), use_cache=False).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


def test_a_tied_float_table_is_stored_once_and_looked_up_as_stored() -> None:
    graph = language_sample("qwen2").graph.graph
    initializers = graph.initializers
    assert "lm_head.weight" not in initializers
    assert initializers["model.embed_tokens.weight"].dtype == ir.DataType.FLOAT16
    lookup = next(node for node in graph if node.op_type == "Gather" and node.name == "model.embed_tokens")
    assert lookup.inputs[0] is initializers["model.embed_tokens.weight"]


def test_audit_finds_a_table_stored_twice() -> None:
    exported = language_sample("gemma2")
    model = ir.serde.deserialize_model(ir.to_proto(exported.graph))
    head = next(node for node in model.graph if node.name == "lm_head")
    assert head.inputs[1] is not None
    again = ir.Value(name="lm_head.codes", const_value=head.inputs[1].const_value, type=head.inputs[1].type)
    model.graph.register_initializer(again)
    head.replace_input_with(1, again)
    with pytest.raises(AuditError, match=r"lm_head\.codes and model\.embed_tokens\.codes have equal bytes|"
                                         r"model\.embed_tokens\.codes and lm_head\.codes have equal bytes"):
        audit(model, exported.packed, "float16")


def test_audit_finds_a_table_of_other_bits() -> None:
    exported = language_sample("gemma2")
    model = ir.serde.deserialize_model(ir.to_proto(exported.graph))
    node = next(node for node in model.graph if node.op_type == "QGather")
    node.attributes["size_3bit"], node.attributes["size_2bit"] = ir.AttrInt64("a", 0), ir.AttrInt64("b", 265)
    with pytest.raises(AuditError, match=r"embed_tokens\.codes \(token_table\) takes 3180 bytes, .* were 2120"):
        audit(model, exported.packed, "float16")


def test_int8_activations_are_told_apart_from_errors(tmp_path: Path) -> None:
    exported = language_sample("gemma3", 4)
    write_language_sample(tmp_path / "artifact", exported)
    levels = {node.op_type: node.attributes["accuracy_level"].as_int() for node in exported.graph.graph
              if "accuracy_level" in node.attributes}
    assert levels == {"QMatMul": 4, "BitmapQMatMul": 4}
    parity = check_parity(tmp_path / "artifact", exported.module, [tokens(20)])
    assert parity.native_vs_torch.relative < 1e-5
    assert parity.rounding is not None
    assert parity.rounding.relative > 1e-4


@pytest.mark.parametrize(("kind", "initializer", "path"), [
    ("gemma3", "model.layers.1.mlp.up_proj.codes", "model.layers.1.mlp"),
    ("mistral", "model.layers.1.mlp.down_proj.codes", "model.layers.1.mlp"),
    ("gemma3", "model.layers.0.self_attn.o_proj.codes", "model.layers.0.mlp"),
    ("gemma3", "model.norm.weight", None),
])
def test_wrong_weights_are_traced_to_the_first_block(
    kind: str, initializer: str, path: str | None, tmp_path: Path
) -> None:
    exported = language_sample(kind)
    write_language_sample(tmp_path / "artifact", exported)
    flip_bytes(tmp_path / "artifact", initializer)
    with pytest.raises(ParityError) as caught:
        check_parity(tmp_path / "artifact", exported.module, [tokens(20)])
    assert caught.value.path == path


def flip_bytes(folder: Path, initializer: str) -> None:
    tensor = ir.load(folder / "model.onnx").graph.initializers[initializer].const_value
    if isinstance(tensor, ir.ExternalTensor):
        path, span = folder / str(tensor.location), slice(tensor.offset, tensor.offset + tensor.nbytes)
    else:
        path = folder / "model.onnx"
        start = path.read_bytes().index(tensor.tobytes())
        span = slice(start, start + tensor.nbytes)
    data = bytearray(path.read_bytes())
    data[span] = bytes(byte ^ 0x33 for byte in data[span])
    path.write_bytes(data)


def test_validation_needs_no_torch_model(artefacts: dict[str, Path]) -> None:
    checks = list(validate(artefacts["gemma3"]))
    assert [check.name for check in checks] == ["manifest", "files", "native", "portable"]
    assert all(check.passed for check in checks)
    inputs = sorted(path.name for path in (artefacts["gemma3"] / "golden").iterdir())
    assert inputs == ["input_ids.npy", "logits.npy"]
    assert np.load(artefacts["gemma3"] / "golden" / "logits.npy").shape == (1, 1, 265)


@pytest.mark.parametrize("kind", KINDS)
def test_runtime_configuration(kind: str, artefacts: dict[str, Path]) -> None:
    content = json.loads((artefacts[kind] / "genai_config.json").read_text())
    decoder = content["model"]["decoder"]
    library = decoder["session_options"]["custom_ops_library"]
    assert (artefacts[kind] / library).is_file()
    assert content["model"]["context_length"] == content["search"]["max_length"] == MAX_LENGTH
    assert content["model"]["type"] == {"gemma3": "gemma3_text"}.get(kind, kind)
    assert (content["model"]["bos_token_id"], content["model"]["eos_token_id"]) == (2, 1)
    assert content["search"]["chunk_size"] == 128
    assert "sliding_window" not in decoder  # caches grow with the text, as in plain onnxruntime
    config = json.loads((artefacts[kind] / "config.json").read_text())
    assert config["max_position_embeddings"] == 256


def test_tokenizers_agree_and_differences_are_shown(artefacts: dict[str, Path], tmp_path: Path) -> None:
    folder = artefacts["gemma3"]
    check_tokenizers(folder, byte_level_tokenizer())
    with pytest.raises(TokenizerError, match=r"the saved tokenizer makes .*from token 0 on \[2, .*expected \[56, "):
        check_tokenizers(folder, byte_level_tokenizer(bos=False), ["The"])
    indented = tmp_path / "indented"
    byte_level_tokenizer().save_pretrained(indented)
    assert (folder / "tokenizer.json").stat().st_size < 0.6 * (indented / "tokenizer.json").stat().st_size
    assert len("".join(SAMPLE_TEXTS).encode()) > 400


def test_generated_text_comes_in_pieces(artefacts: dict[str, Path]) -> None:
    tokenizer = byte_level_tokenizer()
    prompt = "the thing"
    pieces = list(generate(artefacts["gemma3"], prompt, 12))
    expected = greedy_tokens(artefacts["gemma3"], tokenizer(prompt)["input_ids"], 12)
    runtime = onnxruntime_genai.Tokenizer(str(artefacts["gemma3"])).create_stream()
    assert pieces == [runtime.decode(token) for token in expected if token != 1]
    assert len(pieces) > 3


def test_generation_errors_say_what_to_do(artefacts: dict[str, Path], tmp_path: Path) -> None:
    folder = artefacts["qwen3"]
    with pytest.raises(InputError, match=r"longer than the 128 tokens that the model was exported for; ask for less"):
        generate(folder, "the thing", MAX_LENGTH)
    with pytest.raises(InputError, match="max_new_tokens: 0"):
        generate(folder, "the", 0)
    with pytest.raises(InputError, match="prompt: it has no tokens"):
        greedy_tokens(folder, [], 4)
    with pytest.raises(InputError, match="no artefact, it has no genai_config"):
        generate(tmp_path, "the", 4)
    write_sample(tmp_path / "vision", sample("vit", "1:4"))
    with pytest.raises(InputError, match="an image classifier's artefact"):
        generate(tmp_path / "vision", "the", 4)
    (tmp_path / "genai_config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot load it: .*; try `fips validate"):
        generate(tmp_path, "the", 4)


def test_export_is_deterministic_and_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    exported = language_sample("gemma3")
    again = export_causal_lm(exported.module, MAX_LENGTH)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    proto = ir.to_proto(again)
    assert proto.SerializeToString() == ir.to_proto(exported.graph).SerializeToString()
    assert (proto.ir_version, {entry.domain: entry.version for entry in proto.opset_import}) == (
        9, {"": 20, "com.microsoft": 1, "ai.fips": 1}
    )
    imports = {entry.domain: entry.version for function in proto.functions for entry in function.opset_import}
    assert imports == {"": 20, "com.microsoft": 1}
    assert b"site-packages" not in proto.SerializeToString()


def test_a_model_may_be_packed_in_part_and_in_float32() -> None:
    dense = tiny_language_model("llama")
    packed = random_packed(dense, "1:4", per_group=1)
    partial = PackedModel({"group_1": packed.bases["group_1"]}, packed.mlps[1:])
    module = install_packed(dense, partial)
    # Tables of rotary embeddings are never longer than the model's own limit.
    graph = export_causal_lm(module, 10_000)
    nodes = {node.name: node for node in graph.graph}
    assert nodes["model.layers.0.mlp.gate_proj"].op_type == "MatMul"
    assert nodes["model.layers.1.mlp/gate_proj"].op_type == "SparseQMatMul"
    assert nodes["rotary/positions"].inputs[1].name == "/model/constants/FLOAT/256.0"
    audit(graph, partial, "float32")
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    input_ids = tokens(30)
    (logits,) = session.run(["logits"], causal_lm.prefill_inputs(session, input_ids.numpy()))
    expected = LanguageSample(partial, module, graph).logits(input_ids).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("change", "message"), [
    (lambda model: model.train(), "training mode"),
    (lambda model: setattr(model.model.rotary_emb, "rope_type", "dynamic"), "rotary embeddings of type 'dynamic'"),
])
def test_export_refuses(change: Any, message: str) -> None:
    model = tiny_language_model("qwen3")
    change(model)
    with pytest.raises(ValueError, match=message):
        export_causal_lm(model)


def test_export_refuses_other_architectures() -> None:
    class StableLmForCausalLM(type(tiny_language_model("qwen3"))):  # type: ignore[misc]
        pass

    model = tiny_language_model("qwen3")
    model.__class__ = StableLmForCausalLM
    with pytest.raises(ValueError, match="cannot export a StableLmForCausalLM; supported: Gemma2ForCausalLM, "):
        export_causal_lm(model)


def test_frequencies_of_rotary_embeddings_are_not_rounded() -> None:
    exported = language_sample("gemma3")
    dense = tiny_language_model("gemma3")
    for name in ("full_attention_inv_freq", "sliding_attention_inv_freq"):
        expected = getattr(dense.model.rotary_emb, name)
        assert not torch.equal(expected, expected.half().float())
        assert torch.equal(getattr(exported.module.model.rotary_emb, name), expected)
        stored = exported.graph.graph.initializers[f"model.rotary_emb.{name}"].const_value
        np.testing.assert_array_equal(stored.numpy(), expected.numpy())


def test_incomplete_inputs_are_completed_only_where_the_graph_wants_them(artefacts: dict[str, Path]) -> None:
    session = load(artefacts["gemma3"], verify=False)
    feeds = causal_lm.prefill_inputs(session, tokens(5, 2).numpy())
    assert set(feeds) == {value.name for value in session.get_inputs()} | {"logits_to_keep"}
    assert feeds["logits_to_keep"] == [5]
    assert feeds["attention_mask"].tolist() == [[1] * 5] * 2
    assert feeds["past_key_values.2.value"].shape == (2, 1, 0, 16)
    assert feeds["past_key_values.0.key"].dtype == np.float32


PADDED = {
    "left": [[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]],
    "right": [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]],
    "anywhere": [[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]],
}
"""Attention masks of three texts in a batch."""


@pytest.mark.parametrize("side", PADDED)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_wherever_it_stands(kind: str, side: str, artefacts: dict[str, Path]) -> None:
    """In a prompt, past the sliding window, and in single tokens behind it."""
    prompt, token = np.tile(np.array(PADDED[side]), (1, 6)), np.array([[1], [1], [1]])
    lengths = check_padded(kind, artefacts[kind], [prompt, token, token * [[1], [0], [1]], token])
    assert min(lengths) > 4
    assert max(lengths) > WINDOW


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_behind_a_prompt(kind: str, artefacts: dict[str, Path]) -> None:
    """ONNX Runtime reads more than one token behind others only for one text at a time."""
    for first, second in zip(PADDED["left"], PADDED["anywhere"], strict=True):
        check_padded(kind, artefacts[kind], [np.array([first]), np.array([second]), np.array([[1]])])


def check_padded(kind: str, folder: Path, masks: list[Any]) -> list[int]:
    """Feed one part of texts after another, and compare the logits of every token with those of its text alone.

    ``masks``: int64 [batch, tokens], of every part. Returns the lengths of the texts."""
    exported = language_sample(kind)
    session = load(folder, verify=False)
    rng = np.random.default_rng(5)
    batch = len(masks[0])
    texts: list[list[int]] = [[] for _ in range(batch)]
    feeds = causal_lm.prefill_inputs(session, np.zeros((batch, 0), np.int64))
    seen = np.zeros((batch, 0), np.int64)
    for mask in masks:
        input_ids = np.where(mask == 1, rng.integers(5, 265, mask.shape), 0)
        seen = np.concatenate([seen, mask], axis=1)
        outputs = session.run(None, {**feeds, "input_ids": input_ids, "attention_mask": seen})
        results = dict(zip([value.name for value in session.get_outputs()], outputs, strict=True))
        feeds |= {f"past_key_values.{name.removeprefix('present.')}": cache for name, cache in results.items()
                  if name.startswith("present.")}
        for text, ids, own, logits in zip(texts, input_ids, mask, results["logits"], strict=True):
            text += ids[own == 1].tolist()
            expected = exported.logits(torch.tensor([text]))[0].numpy()
            expected = expected[len(expected) - own.sum() :]
            np.testing.assert_allclose(logits[own == 1], expected, atol=1e-5 * np.abs(expected).max(initial=1.0))
    return [len(text) for text in texts]


def test_the_last_logits_of_a_text_padded_on_the_right_are_its_last_tokens(artefacts: dict[str, Path]) -> None:
    session = load(artefacts["gemma3"], verify=False)
    input_ids = tokens(5, 2).numpy()
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    feeds = causal_lm.complete_inputs(session, {"input_ids": input_ids, "attention_mask": mask})
    (logits,) = session.run(["logits"], feeds)
    np.testing.assert_array_equal(logits[0, 3:], logits[0, [2, 2]])
