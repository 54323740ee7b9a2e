"""Products of one input are one node, if they are stored alike."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from packed_samples import PIXEL_SHAPE, images, tiny_model
from rest_samples import linears_outside
from torch import nn

from exporters.audit import audit
from exporters.image_classifier import export_image_classifier
from exporters.packed_model import PackedModel
from exporters.packed_rest import PackedRest
from exporters.rest import install_rest, packed_rest
from pipeline.quantization.rest_weights import quantize_rows

ATTENTION = "vit.layers.0.attention"


def packed(bits: Mapping[str, int], *, bias: bool = True) -> nn.Module:
    """A vit whose linear layers have ``bits`` by the last part of their paths, else 4."""
    dense = tiny_model("vit")
    linears = linears_outside(dense, ["classifier"])
    if not bias:
        for linear in linears.values():
            linear.bias = None
    weights = {
        path: quantize_rows(linear.weight, bits.get(path.rpartition(".")[2], 4), 32) for path, linear in linears.items()
    }
    return install_rest(dense, PackedRest(linears=weights)).eval()


def products(graph: ir.Model) -> set[str]:
    """The last parts of the names of the products of the first layer's attention."""
    names = [node.name or "" for node in graph.graph if node.op_type == "QMatMul"]
    return {name.rpartition(".")[2] for name in names if name.startswith(f"{ATTENTION}.")}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ({}, {"q_proj+k_proj+v_proj", "o_proj"}),
        ({"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 8}, {"q_proj+k_proj+v_proj", "o_proj"}),
        ({"q_proj": 2}, {"q_proj", "k_proj+v_proj", "o_proj"}),
        ({"q_proj": 2, "k_proj": 3, "v_proj": 8}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_graph_computes_what_torch_computes(bits: dict[str, int], expected: set[str], bias: bool) -> None:
    model = packed(bits, bias=bias)
    graph = export_image_classifier(model, PIXEL_SHAPE)
    assert products(graph) == expected
    x = images(3)
    (logits,) = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString()).run(None, {"pixel_values": x})
    with torch.inference_mode():
        wanted = model(pixel_values=torch.from_numpy(x)).logits.numpy()
    np.testing.assert_allclose(logits, wanted, atol=2e-5 * np.abs(wanted).max())
    # Nothing is stored twice, or left over.
    rows = {row.name: row for row in audit(graph, PackedModel({}, []), "float32")}
    stored = sum(row.bytes for name, row in rows.items() if name.endswith((".codes", ".scales")))
    assert stored == sum(weight.nbytes for weight in packed_rest(model).weights().values())


def test_joined_rows_are_those_of_the_parts() -> None:
    model = packed({})
    graph = export_image_classifier(model, PIXEL_SHAPE)
    layers = [model.get_submodule(f"{ATTENTION}.{name}") for name in ("q_proj", "k_proj", "v_proj")]
    for part in ("codes", "scales"):
        value = graph.graph.initializers[f"{ATTENTION}.q_proj+k_proj+v_proj.{part}"].const_value
        assert value is not None
        expected = np.concatenate([getattr(layer.stored, part) for layer in layers])
        np.testing.assert_array_equal(value.numpy(), expected)
