"""GroupQueryAttention and what comes before it (queries, keys and values taken apart, norms of heads, rotary
embeddings) become one node: up to nine nodes less in every layer, and a kernel that reads keys and values once for all
heads that share them."""

from dataclasses import dataclass

import onnx_ir as ir

from fips_ort.ops import CACHED_ATTENTION, DOMAIN, HEAD_STEP, QK_NORM_CACHED_ATTENTION

_Q, _K, _V = range(3)
_PAST_KEY, _PAST_VALUE, _SEQLENS, _TOTAL = range(3, 7)
_MICROSOFT = "com.microsoft"
_ATTENTION = {"num_heads", "kv_num_heads", "scale", "local_window_size", "do_rotary", "rotary_interleaved", "softcap"}
"""Attributes of GroupQueryAttention that are understood here; of these the last three must be off."""
_EPSILON = 1e-5
"""What SimplifiedLayerNormalization adds if it does not say."""


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
        if (node.domain, node.op_type) == (_MICROSOFT, "GroupQueryAttention"):
            _fuse(model.graph, node)


def _fuse(graph: ir.Graph, attention: ir.Node) -> None:
    past_key = attention.inputs[_PAST_KEY] if _is_plain(attention) else None
    head_size = None if past_key is None or past_key.shape is None else past_key.shape[-1]
    if not isinstance(head_size, int) or head_size % HEAD_STEP:
        return
    queries, keys = (_rotated(attention.inputs[place], head_size) for place in (_Q, _K))
    split = _producer(attention, _V, "", "Split")
    if queries is None or keys is None or split is None or _number(split, "axis", 0) not in (-1, 2):
        return
    if list(split.outputs) != [queries.heads, keys.heads, attention.inputs[_V]]:
        return
    if queries.tables != keys.tables or queries.epsilon != keys.epsilon:
        return
    window = _number(attention, "local_window_size", -1)
    attributes: list[ir.Attr] = [attention.attributes[name] for name in ("num_heads", "kv_num_heads")]
    attributes.append(ir.AttrInt64("local_window_size", int(window) if window > 0 else -1))
    attributes.append(ir.AttrFloat32("scale", _number(attention, "scale", 0) or head_size**-0.5))
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


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _is_plain(attention: ir.Node) -> bool:
    """Whether nothing is asked of a GroupQueryAttention that our ops do not do."""
    off = ("do_rotary", "rotary_interleaved", "softcap")
    return (
        not set(attention.attributes) - _ATTENTION
        and not any(_number(attention, name, 0) for name in off)
        and len(attention.outputs) == 3
        and None not in attention.inputs[: _TOTAL + 1]
        and not any(value is not None for value in attention.inputs[_TOTAL + 1 :])
    )


def _rotated(value: ir.Value | None, head_size: int) -> _Rotated | None:
    """What a GroupQueryAttention reads as ``value``, if it is whole heads rotated by half and half."""
    rotary = None if value is None else value.producer()
    if rotary is None or (rotary.domain, rotary.op_type) != (_MICROSOFT, "RotaryEmbedding"):
        return None
    if any(_number(rotary, name, 0) for name in ("interleaved", "is_packed_batching", "rotary_embedding_dim")):
        return None
    heads, positions, cosines, sines = rotary.inputs
    if heads is None or _number(rotary, "scale", 1) != 1 or _rank(positions) != 2:
        return None
    if cosines is None or cosines.shape is None or cosines.shape[-1] != head_size // 2:
        return None
    tables = (positions, cosines, sines)
    together = heads.producer()
    if together is None or together.op_type != "Reshape":
        return _Rotated(heads, None, None, tables)
    unit = _producer(together, 0, "", "SimplifiedLayerNormalization")
    apart = None if unit is None else _producer(unit, 0, "", "Reshape")
    if unit is None or apart is None or apart.inputs[0] is None or _number(unit, "axis", -1) != -1:
        return None
    norm = unit.inputs[1]
    if norm is None or norm.shape is None or list(norm.shape) != [head_size]:
        return None
    return _Rotated(apart.inputs[0], norm, _number(unit, "epsilon", _EPSILON), tables)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _producer(node: ir.Node, place: int, domain: str, kind: str) -> ir.Node | None:
    """The node that makes an input, if it is of this kind."""
    value = node.inputs[place]
    producer = None if value is None else value.producer()
    return producer if producer is not None and (producer.domain, producer.op_type) == (domain, kind) else None


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
