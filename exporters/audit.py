"""Audit of an artefact's graph: every initializer takes the bytes it was promised to take, and is stored once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.artifact import INLINE_BYTES, MODEL
from exporters.modules import input_node, linear_node, output_node
from exporters.packed_model import PackedModel
from exporters.passes import group_by_bytes, tensor_of
from fips_ort.layout import BIT_WIDTHS, Layout
from fips_ort.ops import CACHED_ATTENTION, DOMAIN, Q_GATHER, Q_MATMUL, QK_NORM_CACHED_ATTENTION
from fips_ort.packed import PackedWeight, unpack

SMALLEST = 64
"""Initializers below this size are shapes and scalars: they may repeat, and stay float32."""

_ROW_BITS = {Q_GATHER: 3, Q_MATMUL: 4}
"""Place of the input ``row_bits`` of the ops that have one."""

Kind = Literal["basis", "projection", "bias", "linear", "token_table", "rest"]


class AuditError(ValueError):
    """The graph does not store what was promised; the message lists every violation."""


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One initializer of the graph: the ``bytes`` that it takes, and those ``promised`` by its layout or by the storage
    of the rest. Both are 0 if it shares its place in the file with an earlier one."""

    name: str
    kind: Kind
    bytes: int
    promised: int


def audit(artifact: Path | ir.Model, packed: PackedModel, rest: Literal["float16", "float32"]) -> list[AuditRow]:
    """Check the graph of an artefact's folder (or in memory) against the packed model it was made of.

    ``rest``: how floating weights outside packed matrices are stored (biases of packed layers may be either). Returns
    one row per initializer, in the graph's order. Raises AuditError if bytes differ from the promised ones, packed
    streams from those of ``packed``, a shared basis is stored twice, or two initializers have equal type, shape and
    bytes, or equal bytes in two places.
    """
    model = artifact if isinstance(artifact, ir.Model) else ir.load(artifact / MODEL)
    nodes = {node.name or "": node for node in model.graph}
    promises: dict[str, tuple[Kind, int]] = {}
    violations = list(_match_weights(nodes, packed, promises))
    violations += _match_rest(model, promises)
    sharing, repetitions = _repetitions(model)
    rows = []
    for name, value in model.graph.initializers.items():
        size = tensor_of(value).nbytes
        kind, promised = promises.get(name, ("rest", _promised_rest(value, rest)))
        if size != promised:
            violations.append(f"{name} ({kind}) takes {size} bytes, promised were {promised}")
        rows.append(AuditRow(name, kind, 0, 0) if name in sharing else AuditRow(name, kind, size, promised))
    violations += repetitions
    if violations:
        raise AuditError("; ".join(violations))
    return rows


def promised_bytes(weight: PackedWeight) -> dict[str, int]:
    """The bytes that ``codes``, ``pattern`` and ``scales`` must take by the weight's layout (for a bitmap, also by the
    number of entries it keeps)."""
    layout = weight.layout
    mask = unpack(weight)[2]
    kept = None if mask is None else [int(mask[rows, columns].sum()) for _, rows, columns in layout.submatrices()]
    scales = 2 * int(np.prod(layout.stored_scales_shape))
    return {"codes": layout.code_bytes(kept), "pattern": layout.pattern_bytes, "scales": scales}


def _match_weights(
    nodes: dict[str, ir.Node], packed: PackedModel, promises: dict[str, tuple[Kind, int]]
) -> Iterator[str]:
    """Compare the inputs of every ``ai.fips`` node with its packed weight; fill in ``promises``."""
    expected: dict[str, tuple[Kind, PackedWeight]] = {}
    for mlp in packed.mlps:
        if mlp.basis is not None:
            for name in (input_node(mlp.path), output_node(mlp.path)):
                expected[name] = ("basis", packed.bases[mlp.basis])
        for child, linear in mlp.linears.items():
            expected[linear_node(mlp.path, child)] = ("projection", linear.weight)
    present = {name for name, node in nodes.items() if node.domain == DOMAIN}
    if missing := expected.keys() - present:
        yield f"nodes of {DOMAIN} are missing: {', '.join(sorted(missing))}"
    # Outside the MLPs, weights are dense, and attention has none.
    known = {*_ROW_BITS, CACHED_ATTENTION, QK_NORM_CACHED_ATTENTION}
    if unknown := {name for name in present - expected.keys() if nodes[name].op_type not in known}:
        yield f"nodes of {DOMAIN} are not the packed model's: {', '.join(sorted(unknown))}"
    promised = {id(weight): promised_bytes(weight) for _, weight in expected.values()}
    stored_as: dict[int, tuple[str, ...]] = {}
    for name in sorted(present & expected.keys()):
        kind, weight = expected[name]
        parts = ["codes", "pattern", "scales"] if weight.layout.pattern.keep else ["codes", "scales"]
        inputs = nodes[name].inputs
        values = [value for value in inputs[1 : 1 + len(parts)] if value is not None]
        for part, value in zip(parts, values, strict=True):
            promises[value.name or ""] = (kind, promised[id(weight)][part])
            if value.const_value is None or not np.array_equal(_bytes(value), _view(getattr(weight, part))):
                yield f"{name}: {part} differ from the packed weight's"
        if len(inputs) > 1 + len(parts) and (bias := _behind_cast(inputs[-1])) is not None:
            promises[bias.name or ""] = ("bias", tensor_of(bias).nbytes)
        names = tuple(value.name or "" for value in values)
        if stored_as.setdefault(id(weight), names) != names:
            yield f"{name}: its {kind} is stored twice, as {names[0]} and {stored_as[id(weight)][0]}"


def _match_rest(model: ir.Model, promises: dict[str, tuple[Kind, int]]) -> list[str]:
    """Fill in ``promises`` for packed linear layers and token tables, whose bytes follow from the attributes of the
    nodes that read them. Returns the violations."""
    violations = []
    for node in sorted(model.graph, key=lambda node: node.op_type != Q_GATHER):  # a tied table is the token table
        if node.op_type not in (Q_GATHER, Q_MATMUL):
            continue
        codes, scales, row_bits = node.inputs[1], node.inputs[2], node.inputs[_ROW_BITS[node.op_type]:]
        if codes is None or scales is None or codes.const_value is None or scales.const_value is None:
            violations.append(f"{node.name}: codes or scales are missing")
            continue
        layout = _layout_of(node)
        kind: Kind = "token_table" if node.op_type == Q_GATHER else "linear"
        promised = {codes: layout.code_bytes(), scales: 2 * math.prod(layout.scales_shape)}
        promised |= {value: layout.rows for value in row_bits if value is not None}
        for value, size in promised.items():
            promises.setdefault(value.name or "", (kind, size))
    return violations


def _layout_of(node: ir.Node) -> Layout:
    """The layout of the dense weight that a QMatMul (with transB 1, unless it reads a basis) or a QGather reads."""
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    segments = tuple(attributes[f"size_{bits}bit"] for bits in BIT_WIDTHS)
    rows, columns = attributes["N"], attributes["K"]
    if not attributes.get("transB", 1):
        rows, columns = columns, rows
    axis = attributes.get("segment_axis", 0)
    return Layout(rows, columns, attributes["block_size"], segments, axis, bool(attributes["midrise"]))


def _behind_cast(value: ir.Value | None) -> ir.Value | None:
    producer = None if value is None else value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value


def _promised_rest(value: ir.Value, rest: str) -> int:
    tensor = tensor_of(value)
    if rest == "float16" and tensor.dtype == ir.DataType.FLOAT and tensor.nbytes >= SMALLEST:
        return tensor.nbytes if _is_frequency(value) else 2 * tensor.size
    return tensor.nbytes


def _is_frequency(value: ir.Value) -> bool:
    """Whether ``value`` holds the frequencies of rotary embeddings: what positions are multiplied with to get angles.

    Frequencies follow from the model's configuration. Float16 would not do for them, as positions go to thousands.
    """
    return any(
        use.node.op_type == "Mul" and any(after.node.op_type == "Cos" for after in use.node.outputs[0].uses())
        for use in value.uses()
    )


def _repetitions(model: ir.Model) -> tuple[set[str], list[str]]:
    """(names of initializers that share the place of an earlier one, violations)."""
    sharing, violations = set(), []
    large = [value for value in model.graph.initializers.values() if tensor_of(value).nbytes >= SMALLEST]
    for first, *later in group_by_bytes(large):
        for value in later:
            tensor, other = tensor_of(value), tensor_of(first)
            same_form = (tensor.dtype, tuple(tensor.shape)) == (other.dtype, tuple(other.shape))
            if same_form or _place(tensor) != _place(other):
                violations.append(f"{value.name} and {first.name} have equal bytes")
            elif tensor.nbytes >= INLINE_BYTES:
                sharing.add(value.name or "")
    return sharing, violations


def _place(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    """Where a file holds the tensor; the same for all that are not in files yet (they will share one place)."""
    return (str(tensor.location), tensor.offset) if isinstance(tensor, ir.ExternalTensor) else ()


def _bytes(value: ir.Value) -> NDArray[np.uint8]:
    return _view(tensor_of(value).numpy())


def _view(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
