"""Products of one input with several packed weights, as those for queries, keys and values, become one product: the
input is rounded once, and threads are handed one piece of work in the place of three."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from exporters.passes import tensor_of
from fips_ort.layout import BIT_WIDTHS
from fips_ort.ops import DOMAIN, Q_MATMUL

_SIZES = tuple(f"size_{bits}bit" for bits in BIT_WIDTHS)
_CODES, _SCALES, _BIAS = 1, 2, 3


def join_products(model: ir.Model, names: Collection[str]) -> None:
    """Join QMatMul nodes of ``model``, in place, that read the same input and are called one of ``names``: if their
    weights are stored alike, all rows with the same bits, and all or none have a bias. Their outputs keep their names.

    The product of ``parent.q`` and ``parent.k`` is called ``parent.q+k``, and so are its initializers.
    """
    groups: dict[object, list[ir.Node]] = {}
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == Q_MATMUL and node.name in names:
            groups.setdefault(_what_is_joined(node), []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            _join(model.graph, nodes)


def _what_is_joined(node: ir.Node) -> object:
    """What only products that can be one have in common."""
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    widths = tuple(name for name in _SIZES if attributes[name])
    alike = tuple(sorted((name, value) for name, value in attributes.items() if name not in ("N", *_SIZES)))
    parent = (node.name or "").rpartition(".")[0]
    return node.inputs[0], parent, alike, widths if len(widths) == 1 else node, len(node.inputs)


def _join(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Put one product and a Split in the place of ``nodes``."""
    parent, _, first = (nodes[0].name or "").rpartition(".")
    others = [(node.name or "").rpartition(".")[2] for node in nodes[1:]]
    name = f"{parent}.{'+'.join([first, *others])}"
    sizes = [node.attributes["N"].as_int() for node in nodes]
    places = [_CODES, _SCALES, *([_BIAS] if len(nodes[0].inputs) > _BIAS else [])]
    parts = dict(zip(places, ("codes", "scales", "bias"), strict=False))
    inputs = [nodes[0].inputs[0], *(_stack(graph, nodes, place, f"{name}.{parts[place]}") for place in places)]
    attributes = {key: attribute.as_int() for key, attribute in nodes[0].attributes.items()}
    (width,) = (key for key in _SIZES if attributes[key])
    attributes |= {"N": sum(sizes), width: sum(sizes)}
    product = ir.node(Q_MATMUL, inputs, attributes, domain=DOMAIN, name=name)
    lengths = ir.Value(name=f"{name}.sizes", const_value=ir.tensor(np.array(sizes, np.int64), name=f"{name}.sizes"))
    lengths.type, lengths.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(sizes)])
    graph.register_initializer(lengths)
    outputs = [node.outputs[0] for node in nodes]
    product.outputs[0].name, product.outputs[0].type = f"{name}/output", outputs[0].type
    if outputs[0].shape is not None:
        product.outputs[0].shape = ir.Shape([*outputs[0].shape[:-1], sum(sizes)])
    split = ir.node("Split", [product.outputs[0], lengths], {"axis": -1}, num_outputs=len(nodes), name=f"{name}/Split")
    graph.insert_before(nodes[0], [product, split])
    for output, fresh in zip(outputs, split.outputs, strict=True):
        output_name, fresh.type, fresh.shape = output.name, output.type, output.shape
        output.replace_all_uses_with(fresh)
        output.name, fresh.name = None, output_name
    graph.remove(nodes, safe=True)


def _stack(graph: ir.Graph, nodes: list[ir.Node], place: int, name: str) -> ir.Value:
    """An initializer of the rows of those that ``nodes`` read at ``place``, which are removed."""
    values = [node.inputs[place] for node in nodes]
    stacked = np.concatenate([tensor_of(value).numpy() for value in values if value is not None])
    result = ir.Value(name=name, const_value=ir.tensor(stacked, name=name))
    assert values[0] is not None
    result.type, result.shape = values[0].type, ir.Shape(stacked.shape)
    for value in values:
        assert value is not None
        if len(value.uses()) == 1:
            del graph.initializers[value.name or ""]
    graph.register_initializer(result)
    return result
