"""Graph passes that turn what the exporter wrote into what an artefact stores. All change the model in place."""

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from exporters.functions import op_functions
from exporters.modules import NODE_NAME
from fips_ort.ops import DOMAIN, VERSION

OPSET = 20
"""The newest ONNX opset that onnxruntime 1.17 knows, the oldest onnxruntime we support."""
IR_VERSION = 9
"""The newest ONNX IR version that onnxruntime 1.17 reads."""
_SCOPES = "pkg.torch.onnx.name_scopes"
_NUMBERS_AT_ONCE = 1 << 22


def name_nodes(model: ir.Model, prefix: str) -> None:
    """Give every node the name its metadata asks for, or ``{module path}/{op type}``, numbered from 2 if repeated.

    ``prefix`` is dropped from module paths. (onnx-ir's NameFixPass mends only names that are missing or repeated.)
    """
    names: Counter[str] = Counter()
    for node in model.graph:
        name = node.metadata_props.get(NODE_NAME) or f"{_module_path(node, prefix)}/{node.op_type}".lstrip("/")
        names[name] += 1
        node.name = name if names[name] == 1 else f"{name}_{names[name]}"
        if NODE_NAME in node.metadata_props:
            node.outputs[0].name = f"{node.name}/output"


def name_initializers(model: ir.Model, prefix: str, tensors: dict[str, np.ndarray]) -> None:
    """Give every initializer the name of the tensor it holds.

    ``tensors``: the torch model's parameters and buffers. The exporter transposes weights into unnamed constants:
    they are found by their bytes. Other constants are named after the first node that reads them.
    """
    names = {_identity(array.T): name for name, array in tensors.items() if array.ndim == 2}
    taken = {value.name for value in model.graph.initializers.values()}
    for value in list(model.graph.initializers.values()):
        name = (value.name or "").removeprefix(prefix)
        if name not in tensors:
            name = names.get(_identity(tensor_of(value).numpy())) or _constant_name(value)
        taken.discard(value.name)
        value.name = _unique(name, taken)
        taken.add(value.name)


def deduplicate_initializers(model: ir.Model) -> None:
    """Store initializers of equal dtype, shape and bytes once, under the name of the first.

    onnx-ir's DeduplicateHashedInitializersPass refuses arrays that are not contiguous: transposed weights in the
    model's own memory.
    """
    first: dict[object, ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        kept = first.setdefault(_identity(tensor_of(value).numpy()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]


def group_by_bytes(values: Iterable[ir.Value]) -> list[list[ir.Value]]:
    """Initializers with equal bytes together, in order. They may differ in dtype and shape: a tied token table is read
    in two shapes."""
    groups: dict[bytes, list[ir.Value]] = {}
    for value in values:
        groups.setdefault(hashlib.sha256(tensor_of(value).tobytes()).digest(), []).append(value)
    return list(groups.values())


def store_float16(model: ir.Model) -> None:
    """Store every float32 initializer of two or more elements that float16 holds exactly as float16, with a Cast.

    Nothing is rounded here. ONNX Runtime folds the Cast when it loads the model.
    """
    first = model.graph[0]
    for value in list(model.graph.initializers.values()):
        if value.dtype != ir.DataType.FLOAT or tensor_of(value).size < 2:
            continue
        half = as_float16(tensor_of(value).numpy())
        if half is None:
            continue
        name = value.name
        assert name is not None
        del model.graph.initializers[name]
        half_type = ir.TensorType(ir.DataType.FLOAT16)
        stored = ir.Value(name=name, shape=value.shape, type=half_type, const_value=ir.Tensor(half, name=name))
        model.graph.register_initializer(stored)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value}, name=f"{name}/Cast")
        output = cast.outputs[0]
        output.name, output.shape, output.type = f"{name}.float32", value.shape, value.type
        value.replace_all_uses_with(output)
        model.graph.insert_before(first, cast)


def as_float16(array: NDArray[np.float32]) -> NDArray[np.float16] | None:
    """``array`` as float16 if float16 holds it exactly, else None; without temporary copies of the whole array."""
    half = np.empty(array.shape, np.float16)
    step = max(1, _NUMBERS_AT_ONCE // max(1, array[:1].size))
    for start in range(0, len(array), step):
        rows = slice(start, start + step)
        with np.errstate(over="ignore"):
            half[rows] = array[rows]
        if not np.array_equal(half[rows].astype(np.float32), array[rows]):
            return None
    return half


def finish(model: ir.Model, name: str) -> None:
    """Make a graph a whole model called ``name``: versions, the functions of those of our ops that it uses, and nothing
    that depends on where it was made. ``model`` must be in opset :data:`OPSET`."""
    strip(model)
    model.producer_name, model.producer_version = "fips-onnx", None
    model.graph.name = name
    model.ir_version = IR_VERSION
    if any(node.domain == DOMAIN for node in model.graph):
        model.opset_imports[DOMAIN] = VERSION
        used = {node.op_type for node in model.graph if node.domain == DOMAIN}
        for proto in op_functions(used, OPSET):
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function


def strip(model: ir.Model) -> None:
    """Remove metadata and documentation strings: they hold stack traces with paths of the exporting machine."""
    ClearMetadataAndDocStringPass()(model)
    # The pass leaves those of the model itself and of values.
    model.metadata_props.clear()
    model.doc_string = None
    for value in ir.convenience.create_value_mapping(model.graph).values():
        value.metadata_props.clear()
        value.doc_string = None


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """The data of an initializer."""
    assert value.const_value is not None
    return value.const_value


def _module_path(node: ir.Node, prefix: str) -> str:
    """Path of the module that made the node: the last but one of the exporter's scopes."""
    text = node.metadata_props.get(_SCOPES, "[]")
    scopes = [part.strip(" '\"") for part in text.strip("[]").split(",")]
    path = scopes[-2] if len(scopes) > 1 else ""
    return "" if path.startswith("_empty") else f"{path}.".removeprefix(prefix).rstrip(".")


def _constant_name(value: ir.Value) -> str:
    uses = [(use.node.name or "", use.idx) for use in value.uses()]
    node, index = min(uses)
    return f"{node}.input_{index}"


def _unique(name: str, taken: set[str | None]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _identity(array: np.ndarray) -> tuple[np.dtype, tuple[int, ...], bytes]:
    """What only arrays of equal dtype, shape and bytes have in common."""
    return array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest()
