"""GroupQueryAttention and what comes before it (queries, keys and values taken apart, norms of heads, rotary
embeddings) become one node: up to nine nodes less in every layer, and a kernel that reads keys and values once for all
heads that share them."""

from dataclasses import dataclass

import onnx_ir as ir

from fips_ort.ops import CACHED_ATTENTION, DOMAIN, HEAD_STEP, QK_NORM_CACHED_ATTENTION

_Q, _K, _V = range(3)
_PAST_KEY, _PAST_VALUE, _SEQLENS, _TOTAL = range(3, 7)


@dataclass(frozen=True)
class _Rotated:
    """Queries or keys of a GroupQueryAttention: ``heads``, before norm and rotation; ``norm`` and ``epsilon``, the
    weight of what normalizes them, if anything does; ``tables``: positions, cosines and sines."""

    heads: ir.Value
    norm: ir.Value | None
    epsilon: float | None
    tables: tuple[ir.Value | None, ...]


def fuse_attention(model: ir.Model) -> None:
    """Replace every GroupQueryAttention of ``model``, in place, by a CachedAttention or a QKNormCachedAttention that
    reads the product of queries, keys and values. Nodes that compute what these do not (capped scores, biases,
    quantized caches, rotations of a part of a head, heads of other sizes than multiples of 16) stay."""
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention":
            _fuse(model.graph, node)


def _fuse(graph: ir.Graph, attention: ir.Node) -> None:
    queries, keys = _rotated(attention.inputs[_Q]), _rotated(attention.inputs[_K])
    values, past_key = attention.inputs[_V], attention.inputs[_PAST_KEY]
    split = None if values is None else values.producer()
    if queries is None or keys is None or split is None or past_key is None or not _is_plain(attention):
        return
    if split.op_type != "Split" or list(split.outputs) != [queries.heads, keys.heads, values]:
        return
    head_size = None if past_key.shape is None else past_key.shape[-1]
    if not isinstance(head_size, int) or head_size % HEAD_STEP or not _rotates_whole_heads(queries, head_size):
        return
    if queries.tables != keys.tables or queries.epsilon != keys.epsilon:
        return
    scale = attention.attributes["scale"].as_float() or head_size**-0.5
    attributes = [attention.attributes[name] for name in ("num_heads", "kv_num_heads", "local_window_size")]
    attributes.append(ir.AttrFloat32("scale", scale))
    inputs = [split.inputs[0], *attention.inputs[_PAST_KEY : _TOTAL + 1], *queries.tables]
    kind = CACHED_ATTENTION
    if queries.epsilon is not None:
        kind = QK_NORM_CACHED_ATTENTION
        inputs += [queries.norm, keys.norm]
        attributes.append(ir.AttrFloat32("epsilon", queries.epsilon))
    fused = ir.Node(DOMAIN, kind, inputs, attributes, num_outputs=len(attention.outputs), name=attention.name)
    graph.insert_before(attention, fused)
    for old, new in zip(attention.outputs, fused.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    _remove_unused(graph, attention)


def _is_plain(attention: ir.Node) -> bool:
    """Whether nothing is asked of a GroupQueryAttention that our ops do not do."""
    off = ("do_rotary", "rotary_interleaved", "smooth_softmax", "qk_output", "kv_cache_bit_width", "softcap")
    asked = [name for name in off if name in attention.attributes and attention.attributes[name].value]
    needed = attention.inputs[: _TOTAL + 1]
    return not asked and None not in needed and not any(value is not None for value in attention.inputs[_TOTAL + 1 :])


def _rotated(value: ir.Value | None) -> _Rotated | None:
    rotary = None if value is None else value.producer()
    if rotary is None or rotary.op_type != "RotaryEmbedding" or any(
        attribute.value for name, attribute in rotary.attributes.items() if name in ("interleaved", "scale")
    ):
        return None
    heads, *tables = rotary.inputs
    if heads is None:
        return None
    together = heads.producer()
    if together is None or together.op_type != "Reshape":
        return _Rotated(heads, None, None, tuple(tables))
    unit = _producer(together, 0, "SimplifiedLayerNormalization")
    apart = None if unit is None else _producer(unit, 0, "Reshape")
    if unit is None or apart is None or apart.inputs[0] is None:
        return None
    return _Rotated(apart.inputs[0], unit.inputs[1], unit.attributes["epsilon"].as_float(), tuple(tables))


def _producer(node: ir.Node, place: int, kind: str) -> ir.Node | None:
    value = node.inputs[place]
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == kind else None


def _rotates_whole_heads(part: _Rotated, head_size: int) -> bool:
    cosines = part.tables[1]
    return cosines is not None and cosines.shape is not None and cosines.shape[-1] == head_size // 2


def _remove_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Remove ``node`` and the nodes before it that nothing reads any more. (onnx-ir's RemoveUnusedNodesPass logs a
    stack for every operator that ONNX itself does not know.)"""
    before = {value.producer() for value in node.inputs if value is not None}
    graph.remove(node, safe=True)
    for producer in before:
        if producer is None or producer.graph is not graph:  # removed on another way
            continue
        if not any(value.uses() or value.is_graph_output() for value in producer.outputs):
            _remove_unused(graph, producer)
