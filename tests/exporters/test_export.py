import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from packed_samples import PIXEL_SHAPE, images, random_packed, sample, tiny_model

from exporters.audit import AuditError, audit, promised_bytes
from exporters.image_classifier import export_image_classifier
from exporters.modules import PackedMatrix, PackedMLPModule, install_packed
from exporters.packed_model import PackedModel, load_packed_model, save_packed_model
from exporters.rest import packed_rest

CASES = [
    ("vit", "1:4", False),
    ("deit", "dense", True),
    ("dinov2", "bitmap", True),
    ("dinov2_swiglu", "bitmap", False),
    ("swin", "2:4", False),
]


@pytest.mark.parametrize(
    ("pattern", "has_basis"), [("dense", True), ("bitmap", True), ("1:4", True), ("dense", False)]
)
@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
def test_packed_model_survives_a_round_trip(kind: str, pattern: str, has_basis: bool, tmp_path: Path) -> None:
    packed = random_packed(tiny_model(kind), pattern, graded=has_basis, has_basis=has_basis)
    assert all((mlp.basis is not None) == has_basis for mlp in packed.mlps)
    save_packed_model(packed, tmp_path / "packed.safetensors")
    loaded = load_packed_model(tmp_path / "packed.safetensors")
    assert [(mlp.block, mlp.path, mlp.basis, list(mlp.first), mlp.last[0], mlp.activation) for mlp in loaded.mlps] == [
        (mlp.block, mlp.path, mlp.basis, list(mlp.first), mlp.last[0], mlp.activation) for mlp in packed.mlps
    ]
    weights, expected = loaded.weights(), packed.weights()
    assert list(weights) == list(expected)
    for name, weight in weights.items():
        assert weight.layout == expected[name].layout
        for part in ("codes", "pattern", "scales"):
            np.testing.assert_array_equal(getattr(weight, part), getattr(expected[name], part))
    for mlp, original in zip(loaded.mlps, packed.mlps, strict=True):
        for child, linear in mlp.linears.items():
            np.testing.assert_array_equal(linear.bias, original.linears[child].bias)
    assert [path.name for path in tmp_path.iterdir()] == ["packed.safetensors"]


def test_packed_model_refuses_what_does_not_fit() -> None:
    packed = random_packed(tiny_model("vit"), "1:4")
    first = packed.mlps[0]
    with pytest.raises(ValueError, match=r"vit\.layers\.0\.mlp: unknown basis 'nowhere'"):
        PackedModel(packed.bases, [dataclasses.replace(first, basis="nowhere")])
    with pytest.raises(ValueError, match=r"bases without an MLP: \['group_1'\]"):
        PackedModel(packed.bases, [first])
    swapped = dataclasses.replace(first, last=("fc2", first.first["fc1"]), first={"fc1": first.last[1]})
    bases = {"group_0": packed.bases["group_0"]}
    with pytest.raises(ValueError, match=r"fc2: bias is float32 \(64,\)|fc1: bias is float32"):
        PackedModel(bases, [swapped])
    with pytest.raises(ValueError, match="occurs twice"):
        PackedModel(bases, [first, first])


def test_whole_matrices_must_fit_each_other() -> None:
    packed = random_packed(tiny_model("vit"), "dense", has_basis=False)
    first = packed.mlps[0]
    swapped = dataclasses.replace(first, first={"fc1": first.last[1]})
    with pytest.raises(ValueError, match=r"mlp\.fc1: 64 columns, expected 32, as many as fc2 writes"):
        PackedModel({}, [swapped])
    with pytest.raises(ValueError, match=r"bases without an MLP: \['group_0', 'group_1'\]"):
        PackedModel(random_packed(tiny_model("vit"), "dense").bases, packed.mlps)
    rank = random_packed(tiny_model("vit"), "dense").bases["group_0"].layout.rows
    with pytest.raises(ValueError, match=rf"mlp\.fc1: 32 columns, expected {rank}, the rank of its basis"):
        PackedModel(
            random_packed(tiny_model("vit"), "dense", per_group=3).bases,
            [dataclasses.replace(first, basis="group_0")],
        )


def test_installed_whole_matrices_compute_the_mlp() -> None:
    dense = tiny_model("dinov2_swiglu")
    packed = random_packed(dense, "dense", has_basis=False)
    model = install_packed(dense, packed)
    values = {name: module.values for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
    assert len(values) == 3 * 3
    path = packed.mlps[1].path
    module = model.get_submodule(path)
    x = torch.randn(2, 5, 32)
    gate = x @ values[f"{path}.gate_proj"].T + module.gate_proj.bias
    up = x @ values[f"{path}.up_proj"].T + module.up_proj.bias
    y = (gate * gate.sigmoid() * up) @ values[f"{path}.down_proj"].T + module.down_proj.bias
    torch.testing.assert_close(module(x), y, atol=1e-5, rtol=1e-5)


def test_install_refuses_another_model() -> None:
    packed = random_packed(tiny_model("vit"), "1:4")
    with pytest.raises(ValueError, match=r"no module vit\.layers\.0\.mlp"):
        install_packed(tiny_model("deit"), packed)
    renamed = [dataclasses.replace(mlp, activation="act_fn") for mlp in packed.mlps]
    with pytest.raises(ValueError, match=r"has \['activation_fn', .*the packed one \['act_fn'"):
        install_packed(tiny_model("vit"), PackedModel(packed.bases, renamed))


def test_installed_mlps_compute_the_factorization() -> None:
    dense = tiny_model("dinov2_swiglu")
    packed = random_packed(dense, "1:4")
    model = install_packed(dense, packed)
    values = {name: module.values for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
    path = packed.mlps[0].path
    module = model.get_submodule(path)
    x = torch.randn(2, 5, 32)
    t = x @ values["shared_bases.group_0"].T
    gate = t @ values[f"{path}.gate_proj"].T + module.gate_proj.bias
    up = t @ values[f"{path}.up_proj"].T + module.up_proj.bias
    reduced = (gate * gate.sigmoid() * up) @ values[f"{path}.down_proj"].T
    y = reduced @ values["shared_bases.group_0"] + module.down_proj.bias
    torch.testing.assert_close(module(x), y, atol=1e-5, rtol=1e-5)
    bases = {module.path: module.basis for module in model.modules() if isinstance(module, PackedMLPModule)}
    assert bases[packed.mlps[1].path] is bases[path]
    assert bases[packed.mlps[2].path] is not bases[path]
    assert sum(name.endswith("group_0.codes") for name in model.state_dict()) == 1


@pytest.mark.parametrize(("kind", "pattern", "graded"), CASES)
def test_graph_computes_what_torch_computes(kind: str, pattern: str, graded: bool) -> None:
    exported = sample(kind, pattern, graded=graded)
    session = onnxruntime.InferenceSession(ir.to_proto(exported.graph).SerializeToString())
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("pixel_values", ["batch", *PIXEL_SHAPE])]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("logits", ["batch", 10])]
    for count in (1, 3, 4):
        x = images(count, seed=count)
        (logits,) = session.run(None, {"pixel_values": x})
        expected = exported.logits(x)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
def test_graph_of_whole_matrices(kind: str) -> None:
    exported = sample(kind, "dense", has_basis=False)
    session = onnxruntime.InferenceSession(ir.to_proto(exported.graph).SerializeToString())
    x = images(3, seed=1)
    expected = exported.logits(x)
    (logits,) = session.run(None, {"pixel_values": x})
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    nodes = {node.name for node in exported.graph.graph if node.domain == "ai.fips"}
    mlps = {f"{mlp.path}/{child}" for mlp in exported.packed.mlps for child in mlp.linears}
    attention = {f"{path.rpartition('.')[0]}.q_proj+k_proj+v_proj" for path in packed_rest(exported.module).linears}
    output = {path for path in packed_rest(exported.module).linears if path.endswith("o_proj")}
    assert nodes == mlps | attention | output
    rows = {row.name: row for row in audit(exported.graph, exported.packed, "float16")}
    for name, weight in exported.packed.weights().items():
        assert rows[f"{name}.codes"].kind == "projection"
        assert rows[f"{name}.codes"].bytes + rows[f"{name}.scales"].bytes == weight.nbytes
    assert not [name for name in rows if "shared_bases" in name]


@pytest.mark.parametrize(("kind", "pattern", "graded"), CASES)
def test_graph_stores_what_was_promised(kind: str, pattern: str, graded: bool) -> None:
    exported = sample(kind, pattern, graded=graded)
    rows = {row.name: row for row in audit(exported.graph, exported.packed, "float16")}
    for name, weight in exported.packed.weights().items():
        stored = sum(rows[f"{name}.{part}"].bytes for part in promised_bytes(weight) if f"{name}.{part}" in rows)
        assert stored == weight.nbytes
        assert rows[f"{name}.codes"].kind == ("basis" if name.startswith("shared_bases") else "projection")
    initializers = exported.graph.graph.initializers
    known = {name for name, _ in [*exported.module.named_parameters(), *exported.module.named_buffers()]}
    # Parameters keep their names, transposed or not; constants are named after the node that reads them.
    own = ("/", ".input_", ".q_proj+k_proj+v_proj.")
    assert {name for name in initializers.keys() - known if not any(part in name for part in own)} == set()
    assert not [name for name in initializers if "val_" in name]


def test_nodes_are_named_by_module_and_carry_no_traces() -> None:
    exported = sample("vit", "1:4")
    nodes = {node.name: node for node in exported.graph.graph}
    path = "vit.layers.1.mlp"
    assert nodes[f"{path}/basis_in"].op_type == "QMatMul"
    assert nodes[f"{path}/fc1"].op_type == "SparseQMatMul"
    assert nodes[f"{path}/basis_out"].inputs[1] is nodes["vit.layers.0.mlp/basis_in"].inputs[1]
    assert nodes["vit.layers.1.attention.q_proj+k_proj+v_proj"].op_type == "QMatMul"
    assert len(nodes) == len(list(exported.graph.graph))
    text = ir.to_proto(exported.graph).SerializeToString()
    assert b".py" not in text
    assert b"site-packages" not in text
    assert b"pkg.torch" not in text


def test_audit_finds_sparse_products_of_no_mlp() -> None:
    """Dense ones may be of layers outside the MLPs."""
    graph = sample("vit", "1:4").graph
    with pytest.raises(AuditError, match=r"are not the packed model's: vit\.layers\.0\.mlp/fc1, .*\.2\.mlp/fc2;"):
        audit(graph, PackedModel({}, []), "float16")


def test_gate_and_up_share_one_product() -> None:
    graph = sample("dinov2_swiglu", "bitmap").graph.graph
    assert sum(node.op_type == "QMatMul" and ".mlp" in (node.name or "") for node in graph) == 2 * 3
    nodes = {node.name: node for node in graph}
    gate, up = (nodes[f"dinov2.encoder.layer.0.mlp/{name}"] for name in ("gate_proj", "up_proj"))
    assert gate.inputs[0] is up.inputs[0]


def test_export_is_deterministic() -> None:
    exported = sample("vit", "1:4")
    again = export_image_classifier(exported.module, PIXEL_SHAPE)
    assert ir.to_proto(again).SerializeToString() == ir.to_proto(exported.graph).SerializeToString()
    assert exported.module.config._attn_implementation == "sdpa"


def test_export_is_quiet(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    exported = sample("vit", "1:4")
    export_image_classifier(exported.module, PIXEL_SHAPE)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert not recwarn.list


def test_export_refuses_training_mode() -> None:
    with pytest.raises(ValueError, match="training mode"):
        export_image_classifier(tiny_model("vit").train(), PIXEL_SHAPE)


def test_float32_models_stay_float32() -> None:
    dense = tiny_model("vit")
    packed = random_packed(dense, "1:4")
    graph = export_image_classifier(install_packed(dense, packed), PIXEL_SHAPE)
    names = {name: value.dtype for name, value in graph.graph.initializers.items()}
    assert names["classifier.weight"] == ir.DataType.FLOAT
    assert names["vit.layers.0.attention.q_proj.weight"] == ir.DataType.FLOAT
    rows = audit(graph, packed, "float32")
    assert sum(row.bytes for row in rows) == sum(row.promised for row in rows)
    with pytest.raises(AuditError, match=r"classifier\.weight \(rest\) takes 1280 bytes, promised were 640"):
        audit(graph, packed, "float16")


def test_audit_finds_planted_faults() -> None:
    exported = sample("vit", "1:4")
    graph = exported.graph
    other = random_packed(tiny_model("vit"), "1:4", seed=9)
    with pytest.raises(AuditError, match=r"vit\.layers\.0\.mlp/basis_in: codes differ from the packed weight's"):
        audit(graph, other, "float16")
    node = next(node for node in graph.graph if node.name == "vit.layers.0.mlp/basis_out")
    original = node.inputs[1]
    assert original is not None
    copy = ir.Value(name="copy", type=original.type, shape=original.shape, const_value=original.const_value)
    graph.graph.register_initializer(copy)
    node.replace_input_with(1, copy)
    try:
        faults = r"basis is stored twice.*copy and shared_bases\.group_0\.codes have equal bytes"
        with pytest.raises(AuditError, match=faults):
            audit(graph, exported.packed, "float16")
    finally:
        node.replace_input_with(1, original)
        del graph.graph.initializers["copy"]
    audit(graph, exported.packed, "float16")
