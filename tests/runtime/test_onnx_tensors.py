"""What fips_ort reads from the bytes of an ONNX file, against the package onnx."""

import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fips_ort.onnx_tensors import InvalidModelError, StoredTensor, external_files, read_tensors


def external(name: str, location: str, *, dims: tuple[int, ...] = (2, 3), **entries: str) -> TensorProto:
    tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(nodes: list[onnx.NodeProto] | None = None, **graph: object) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(nodes or [], "g", [], [], **graph))


def constant(name: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], **attributes)


def nested(levels: int) -> onnx.GraphProto:
    graph = helper.make_graph([constant("deep", value=external("deep", "deep.data"))], "g", [], [])
    for _ in range(levels):
        graph = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=graph)], "g", [], [])
    return graph


@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3, 6, 7, 9, 10, 11, 16, 21, 22]),
            st.lists(st.integers(0, 1 << 40), max_size=4),
            st.none() | st.integers(0, 1 << 60),
            st.text(max_size=5),
        ),
        max_size=5,
    )
)
def test_initializers_are_those_that_onnx_wrote(drawn: list[tuple[int, list[int], int | None, str]]) -> None:
    bits = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}
    tensors, expected = [], []
    for index, (kind, dims, offset, text) in enumerate(drawn):
        name, size = f"{text}{index}", (int(np.prod([*map(int, dims)], dtype=object)) * bits[kind] + 7) // 8
        tensor = TensorProto(name=name, dims=dims, data_type=kind)
        if offset is not None:
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": "w", "offset": offset, "length": size}.items():
                tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        dtype = TensorProto.DataType.Name(kind)
        place = (None, 0) if offset is None else ("w", offset)
        expected.append(StoredTensor(name, dtype, dims, size, *place))
    wide = [tensor for tensor in tensors if any(len(entry.value) > 19 for entry in tensor.external_data)]
    if wide:
        with pytest.raises(InvalidModelError, match="where a number of bytes belongs"):
            read_tensors(model(initializer=tensors).SerializeToString())
    else:
        assert read_tensors(model(initializer=tensors).SerializeToString()).initializers == expected


def sparse() -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.zeros(6, np.int64))
    return helper.make_sparse_tensor(external("v", "sparse.data", dims=(6,)), indices, [9])


def in_a_function() -> onnx.ModelProto:
    node = constant("v", value=external("t", "function.data"))
    function = helper.make_function("d", "F", [], ["v"], [node], [helper.make_opsetid("", 20)])
    return helper.make_model(helper.make_graph([], "g", [], []), functions=[function])


def in_training() -> onnx.ModelProto:
    result = model()
    result.training_info.add().algorithm.initializer.append(external("t", "training.data"))
    return result


@pytest.mark.parametrize(
    ("proto", "files"),
    [
        (model(initializer=[external("a", "x", offset="8", length="24"), external("b", "x")]), {"x": 32}),
        (model([constant("v", value=external("t", "attribute.data"))]), {"attribute.data": 24}),
        (model([helper.make_node("N", [], [], domain="d", many=[external("t", "list.data")])]), {"list.data": 24}),
        (model([constant("v", sparse_value=sparse())]), {"sparse.data": 24}),
        (model(sparse_initializer=[sparse()]), {"sparse.data": 24}),
        (model(list(nested(3).node)), {"deep.data": 24}),
        (in_a_function(), {"function.data": 24}),
        (in_training(), {"training.data": 24}),
        (model(initializer=[external("a", "../outside")]), {"../outside": 24}),
        (model(initializer=[numpy_helper.from_array(np.zeros(3), "a")]), {}),
    ],
)
def test_external_files_are_found_wherever_a_model_can_name_them(proto: onnx.ModelProto, files: dict[str, int]) -> None:
    assert external_files(read_tensors(proto.SerializeToString())) == files


def test_accuracy_levels() -> None:
    nodes = [helper.make_node("N", [], [], domain="d", accuracy_level=level, other=7) for level in (0, 4)]
    assert read_tensors(model(nodes).SerializeToString()).accuracy_levels == {0, 4}
    assert read_tensors(model().SerializeToString()).accuracy_levels == set()


def twice(tensor: TensorProto) -> TensorProto:
    tensor.external_data.add(key="location", value="other")
    return tensor


def without_location(**entries: str) -> TensorProto:
    tensor = external("a", "x", **entries)
    del tensor.external_data[0]
    return tensor


def inside_and_outside() -> TensorProto:
    tensor = external("a", "x")
    tensor.data_location = TensorProto.DEFAULT
    return tensor


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (model(initializer=[twice(external("a", "x"))]), "'location' twice"),
        (model(initializer=[without_location()]), "where its data is"),
        (model(initializer=[without_location(offset="0")]), "where its data is"),
        (model(initializer=[inside_and_outside()]), "where its data is"),
        (model(initializer=[external("a", "x", prepacked_0="1|2")]), "where its data is"),
        (model(initializer=[external("a", "x", length="23")]), "another length than its shape"),
        (model(initializer=[external("a", "x", offset="-8")]), "where a number of bytes belongs"),
        (model(initializer=[external("a", "x", offset="9" * 6000)]), "where a number of bytes belongs"),
        (model(initializer=[external("a", "x", dims=(-1,))]), "a negative size"),
        (model(initializer=[TensorProto(name="a", dims=[1] * 65, data_type=1)]), "more than 64 dimensions"),
        (model(initializer=[TensorProto(name="a", data_type=8)]), "type 8"),
    ],
)
def test_what_readers_could_understand_differently_is_refused(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(InvalidModelError, match=message):
        read_tensors(proto.SerializeToString())


def wrap(number: int, content: bytes) -> bytes:
    """A field of a message that holds ``content``."""
    size, length = len(content), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def test_messages_that_protobuf_would_merge_are_refused() -> None:
    """Two halves of a tensor in one attribute: each names nothing alone."""
    one = model([constant("v", value=external("t", "x"))]).SerializeToString()
    with pytest.raises(InvalidModelError, match="2 graphs"):
        read_tensors(one + one)
    attribute = helper.make_attribute("value", external("t", "x")).SerializeToString()
    merged = wrap(7, wrap(1, wrap(5, attribute * 2)))
    assert len(onnx.load_from_string(merged).graph.node[0].attribute[0].t.external_data) == 2
    with pytest.raises(InvalidModelError, match="one value twice"):
        read_tensors(merged)


def test_graphs_in_graphs_end_somewhere() -> None:
    graph = b""
    for _ in range(1000):
        graph = wrap(1, wrap(5, wrap(6, graph)))
    with pytest.raises(InvalidModelError, match="more than 32 deep"):
        read_tensors(wrap(7, graph))


SOUND = model(
    [constant("v", value=external("t", "x"))], initializer=[external("a", "y", offset="4")]
).SerializeToString()


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(InvalidModelError):
        read_tensors(data)


@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255))
def test_a_changed_byte_never_hides_a_file_that_onnx_sees(place: int, value: int) -> None:
    changed = SOUND[:place] + bytes([value]) + SOUND[place + 1 :]
    try:
        files = set(external_files(read_tensors(changed)))
    except InvalidModelError:
        return
    try:
        proto = onnx.load_from_string(changed)
    except Exception:
        return
    tensors = [*proto.graph.initializer, *(attribute.t for node in proto.graph.node for attribute in node.attribute)]
    named = {
        entry.value
        for tensor in tensors
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert named <= files
