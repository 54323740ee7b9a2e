"""How many bytes of weights a token needs: what a decode step reads from memory at least, whatever runs it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from exporters.genai_config import GENAI_CONFIG

_ROTARY = ("GroupQueryAttention", "RotaryEmbedding")
"""Ops whose initializers, if they have any, are tables of cosines and sines with a row for every position."""


def weight_bytes_per_token(folder: Path) -> int:
    """Count the stored bytes of weights that one decode step needs of the model in ``folder``, which onnxruntime-genai
    loads.

    Bytes in one place of a file count once, however many nodes read them: a basis of many layers, the codes of a tied
    table. Of what is only looked up in (a token table, rotary tables) one row counts. What ONNX Runtime makes of the
    weights when it loads them, and the key-value cache, do not count.
    """
    config = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
    model = ir.load(folder / config["model"]["decoder"]["filename"])
    needed: dict[object, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        stored = [value.const_value for value in node.inputs if value is not None and value.is_initializer()]
        tensors = [tensor for tensor in stored if tensor is not None]
        looks_up = "Gather" in node.op_type or node.op_type in _ROTARY
        for tensor in tensors:
            size = tensor.nbytes
            if looks_up:
                size = math.ceil(size / _rows(tensor, tensors))
            needed[_place(tensor)] = max(needed.get(_place(tensor), 0), size)
    return sum(needed.values())


def _rows(tensor: ir.TensorProtocol, tensors: Sequence[ir.TensorProtocol]) -> int:
    """How many rows the table has that ``tensor`` is part of, which ``tensors`` store: a stream of packed codes does
    not say, its scales do."""
    tables = [tensor] if len(tensor.shape) > 1 else tensors
    return max((table.shape.numpy()[0] for table in tables if len(table.shape) > 1), default=1)


def _place(tensor: ir.TensorProtocol) -> object:
    """Where a tensor is stored: equal for tensors that share their bytes."""
    return (tensor.location, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else tensor.name
