"""ONNX models put together node by node, their weights in a file beside them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from benchmarks.operands import Operand
from fips_ort.ops import DOMAIN, VERSION

OPSET = 20
"""The first ONNX opset with Gelu."""
_ALIGNMENT = 64
_INPUT = "X"


class Graph:
    """A model with one input X [M, columns]; what a method returns is the name of a value."""

    def __init__(self, columns: int) -> None:
        self.input = _INPUT
        self._columns = columns
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, tuple[NDArray, int]] = {}
        self._outputs: dict[str, int] = {}

    def store(self, operand: Operand) -> list[str]:
        """The operand's tensors as new initializers, with their entries moved along by a number that no other has.

        ONNX Runtime keeps what it prepacks from equal weights only once, and it would then be warm. A pattern stays as
        it is, since not every sequence of bytes is one.
        """
        shift = len(self._tensors)
        names = {f"weight{shift}.{name}": name for name in operand.tensors}
        for unique, name in names.items():
            self._tensors[unique] = operand.tensors[name], 0 if name == "pattern" else shift
        return list(names)

    def product(self, value: str, operand: Operand, stored: Sequence[str] | None = None) -> str:
        """``value`` times the operand, read from initializers stored before, or from new ones."""
        inputs = [value, *(self.store(operand) if stored is None else stored)]
        return self.node(operand.op_type, inputs, domain=operand.domain, **operand.attributes)

    def node(self, op_type: str, inputs: Sequence[str], *, domain: str = "", **attributes: Any) -> str:
        name = f"value{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def output(self, value: str, columns: int) -> None:
        """Make ``value`` [M, columns] an output."""
        self._outputs[value] = columns

    def save(self, path: Path) -> None:
        """Write ``path`` and its weights, ``path`` + ``.data``; these are on the disk when it returns, so that no
        measurement meets their writing."""
        initializers = []
        with path.with_name(f"{path.name}.data").open("wb") as file:
            for name, (tensor, shift) in self._tensors.items():
                file.write(bytes(-file.tell() % _ALIGNMENT))
                initializers.append(_external(name, tensor, f"{path.name}.data", file.tell()))
                file.write(np.roll(tensor.reshape(-1), shift).data)
            file.flush()
            os.fsync(file.fileno())
        graph = helper.make_graph(
            self._nodes, "benchmark", _values({self.input: self._columns}), _values(self._outputs), initializers
        )
        domains = {"": OPSET, "com.microsoft": 1, DOMAIN: VERSION}
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def _values(columns: Mapping[str, int]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["M", size]) for name, size in columns.items()]


def _external(name: str, tensor: NDArray, location: str, offset: int) -> onnx.TensorProto:
    proto = onnx.TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(tensor.dtype),
        dims=tensor.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", offset), ("length", tensor.nbytes)):
        proto.external_data.add(key=key, value=str(value))
    return proto
