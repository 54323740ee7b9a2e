"""The tensors of an ONNX file, read from its protobuf bytes: which are stored, and in which files.

ONNX Runtime maps whatever external files a graph names. So that an artefact can be held to its manifest without the
package onnx, this reads the few fields that name files, strictly: what protobuf would merge or skip is refused.
Numbers of fields are those of onnx.proto3.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

_BITS = {
    1: ("FLOAT", 32), 2: ("UINT8", 8), 3: ("INT8", 8), 4: ("UINT16", 16), 5: ("INT16", 16), 6: ("INT32", 32),
    7: ("INT64", 64), 9: ("BOOL", 8), 10: ("FLOAT16", 16), 11: ("DOUBLE", 64), 12: ("UINT32", 32),
    13: ("UINT64", 64), 14: ("COMPLEX64", 64), 15: ("COMPLEX128", 128), 16: ("BFLOAT16", 16),
    17: ("FLOAT8E4M3FN", 8), 18: ("FLOAT8E4M3FNUZ", 8), 19: ("FLOAT8E5M2", 8), 20: ("FLOAT8E5M2FNUZ", 8),
    21: ("UINT4", 4), 22: ("INT4", 4), 23: ("FLOAT4E2M1", 4), 24: ("FLOAT8E8M0", 8), 25: ("UINT2", 2), 26: ("INT2", 2),
}  # fmt: skip
"""Name and bits of an element by TensorProto.DataType; strings have no size of their own."""
_MOST_FIELDS = 5_000_000
_DEEPEST_GRAPH = 32
_HIGHEST_RANK = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class InvalidModelError(ValueError):
    """The bytes are no ONNX model, or one that fips_ort does not read."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in an ONNX file: ONNX type name, shape, bytes. ``location``: its external file, in which it is at
    ``offset``; None for a tensor inside the model."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    location: str | None
    offset: int


@dataclass(slots=True)
class ModelTensors:
    """``initializers`` of the main graph, and the external tensors ``elsewhere``: in attributes of nodes, subgraphs,
    functions, sparse tensors. ``accuracy_levels``: all values of attributes with the name ``accuracy_level``."""

    initializers: list[StoredTensor] = field(default_factory=list)
    elsewhere: list[StoredTensor] = field(default_factory=list)
    accuracy_levels: set[int] = field(default_factory=set)


def read_tensors(model: bytes) -> ModelTensors:
    """Find the tensors of an ONNX file. Raises InvalidModelError."""
    reader = _Reader(model)
    graphs = 0
    for number, span in reader.messages((0, len(model)), {7, 20, 25}):
        if number == 7:  # ModelProto.graph
            graphs += 1
            reader.graph(span, main=True)
        elif number == 25:  # functions
            reader.function(span)
        else:  # training_info: two graphs
            for _, part in reader.messages(span, {1, 2}):
                reader.graph(part)
    if graphs != 1:
        raise InvalidModelError(f"it has {graphs} graphs")
    return reader.found


_Span = tuple[int, int]


class _Reader:
    """Walks messages, which are spans (start, end) of the bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.found = ModelTensors()
        self.remaining = _MOST_FIELDS

    # --- messages of ONNX ---

    def graph(self, span: _Span, *, main: bool = False, depth: int = 0) -> None:
        if depth > _DEEPEST_GRAPH:
            raise InvalidModelError(f"graphs in graphs, more than {_DEEPEST_GRAPH} deep")
        for number, part in self.messages(span, {1, 5, 15}):
            if number == 1:
                self.node(part, depth)
            elif number == 15:
                self.sparse_tensor(part)
            elif main:
                self.found.initializers.append(self.tensor(part))
            else:
                self.elsewhere(part)

    def function(self, span: _Span) -> None:
        for number, part in self.messages(span, {7, 11}):  # nodes, attributes with a default
            if number == 7:
                self.node(part, 0)
            else:
                self.attribute(part, 0)

    def node(self, span: _Span, depth: int) -> None:
        for _, attribute in self.messages(span, {5}):
            self.attribute(attribute, depth)

    def attribute(self, span: _Span, depth: int) -> None:
        name, level = b"", 0
        seen = set()
        for number, wire, value in self.fields(span):
            if number == 1:
                name = self.data[slice(*self.span(wire, value))]
            elif number == 3:
                level = self.integer(wire, value)
            elif number in (5, 6, 22):  # one tensor, graph or sparse tensor, which protobuf would merge with another
                if number in seen:
                    raise InvalidModelError("an attribute has one value twice")
                seen.add(number)
            part = self.span(wire, value) if number in (5, 6, 10, 11, 22, 23) else (0, 0)
            if number in (5, 10):
                self.elsewhere(part)
            elif number in (6, 11):
                self.graph(part, depth=depth + 1)
            elif number in (22, 23):
                self.sparse_tensor(part)
        if name == b"accuracy_level":
            self.found.accuracy_levels.add(level)

    def sparse_tensor(self, span: _Span) -> None:
        parts = list(self.messages(span, {1, 2}))  # values, indices
        if len({number for number, _ in parts}) != len(parts):
            raise InvalidModelError("a sparse tensor has one part twice")
        for _, part in parts:
            self.elsewhere(part)

    def elsewhere(self, span: _Span) -> None:
        """Add a tensor outside the main graph's initializers, if it is external."""
        if any(number in (13, 14) for number, _, _ in self.fields(span)):
            tensor = self.tensor(span)
            if tensor.location is not None:
                self.found.elsewhere.append(tensor)

    def tensor(self, span: _Span) -> StoredTensor:
        name, kind, external = "", 0, False
        shape: list[int] = []
        entries: dict[str, str] = {}
        for number, wire, value in self.fields(span):
            if number == 1:
                for size in self.sizes(wire, value):
                    shape.append(size)
                    if len(shape) > _HIGHEST_RANK:
                        raise InvalidModelError(f"a tensor of more than {_HIGHEST_RANK} dimensions")
            elif number == 2:
                kind = self.integer(wire, value)
            elif number == 8:
                name = self.text(self.span(wire, value))
            elif number == 13:
                key, content = self.pair(self.span(wire, value))
                if key in entries:
                    raise InvalidModelError(f"tensor {name!r:.80} has {key!r:.80} twice")
                entries[key] = content
            elif number == 14:
                external = self.integer(wire, value) != 0
        if kind not in _BITS:
            raise InvalidModelError(f"tensor {name!r:.80} has type {kind}, which fips_ort does not know")
        dtype, bits = _BITS[kind]
        size = (math.prod(shape) * bits + 7) // 8
        if not external and not entries:
            return StoredTensor(name, dtype, shape, size, None, 0)
        if not external or "location" not in entries or not entries.keys() <= {"location", "offset", "length"}:
            raise InvalidModelError(f"tensor {name!r:.80} says in another way than fips_ort reads where its data is")
        if _number(entries.get("length", str(size))) != size:
            raise InvalidModelError(f"tensor {name!r:.80} has another length than its shape")
        return StoredTensor(name, dtype, shape, size, entries["location"], _number(entries.get("offset", "0")))

    def pair(self, span: _Span) -> tuple[str, str]:
        texts = {1: "", 2: ""}
        for number, part in self.messages(span, {1, 2}):
            texts[number] = self.text(part)
        return texts[1], texts[2]

    # --- protobuf ---

    def fields(self, span: _Span) -> Iterator[tuple[int, int, int | _Span]]:
        """Number, wire type, and value of every field: an integer, or the span of its bytes."""
        at, end = span
        while at < end:
            self.remaining -= 1
            if self.remaining < 0:
                raise InvalidModelError(f"more than {_MOST_FIELDS:,} fields")
            tag, at = self.varint(at, end)
            number, wire = tag >> 3, tag & 7
            if not 0 < number < 1 << 29:
                raise InvalidModelError(f"field number {number}")
            if wire == _VARINT:
                value, at = self.varint(at, end)
                yield number, wire, value
                continue
            if wire == _BYTES:
                size, at = self.varint(at, end)
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                raise InvalidModelError(f"wire type {wire}")
            if size > end - at:
                raise InvalidModelError("it ends in the middle of a field")
            yield number, wire, (at, at + size)
            at += size

    def messages(self, span: _Span, numbers: set[int]) -> Iterator[tuple[int, _Span]]:
        """Number and span of the fields with one of ``numbers``, all messages or texts."""
        for number, wire, value in self.fields(span):
            if number in numbers:
                yield number, self.span(wire, value)

    def span(self, wire: int, value: int | _Span) -> _Span:
        if wire != _BYTES or isinstance(value, int):
            raise InvalidModelError(f"wire type {wire} where bytes belong")
        return value

    def integer(self, wire: int, value: int | _Span) -> int:
        if wire != _VARINT or not isinstance(value, int):
            raise InvalidModelError(f"wire type {wire} where an integer belongs")
        return value

    def sizes(self, wire: int, value: int | _Span) -> Iterator[int]:
        """One of a repeated field's integers, or several that are packed; none is negative."""
        for size in (value,) if isinstance(value, int) else self.packed(self.span(wire, value)):
            if size >= 1 << 63:
                raise InvalidModelError("a negative size")
            yield size

    def packed(self, span: _Span) -> Iterator[int]:
        at, end = span
        while at < end:
            value, at = self.varint(at, end)
            yield value

    def varint(self, at: int, end: int) -> tuple[int, int]:
        data = self.data
        if at < end and data[at] < 128:
            return data[at], at + 1
        result = 0
        for place in range(at, min(at + 10, end)):
            byte = data[place]
            result |= (byte & 127) << 7 * (place - at)
            if byte < 128:
                return result & 0xFFFF_FFFF_FFFF_FFFF, place + 1
        raise InvalidModelError("it ends in the middle of a number")

    def text(self, span: _Span) -> str:
        try:
            return self.data[slice(*span)].decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidModelError("a text is not UTF-8") from None


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise InvalidModelError(f"{text!r:.80} where a number of bytes belongs")
    return int(text)


def external_files(tensors: ModelTensors) -> dict[str, int]:
    """By name of an external file, the bytes that it must have at least."""
    sizes: dict[str, int] = {}
    for tensor in chain(tensors.initializers, tensors.elsewhere):
        if tensor.location is not None:
            sizes[tensor.location] = max(sizes.get(tensor.location, 0), tensor.offset + tensor.bytes)
    return sizes
