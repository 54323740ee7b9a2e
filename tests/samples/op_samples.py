"""Random packed weights of every kind and models of one op: material of the tests of formats, functions, kernels."""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from exporters.functions import op_functions
from fips_ort.layout import BIT_WIDTHS, Layout, Pattern
from fips_ort.ops import DOMAIN, Q_GATHER, VERSION, gather_attributes, node_attributes, op_type
from fips_ort.packed import PackedWeight, pack

SEGMENTS = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 2, 1, 1), (0, 2, 0, 1))
"""Segment sizes in units: each width alone, all together, and with empty segments between."""


def layouts(pattern: str, block_size: int = 64, rows_unit: int = 3, blocks: int = 2) -> Iterator[Layout]:
    """Every combination of segments, axis and levels. Cut rows come ``rows_unit`` at a time, columns in blocks."""
    for axis in (0, 1):
        for sizes in SEGMENTS:
            unit = block_size if axis else rows_unit
            segments = tuple(size * unit for size in sizes)
            rows, columns = (5, sum(segments)) if axis else (sum(segments), blocks * block_size)
            for midrise in (False, True):
                yield Layout(rows, columns, block_size, segments, axis, midrise, Pattern.parse(pattern))


def random_levels(rng: np.random.Generator, layout: Layout) -> np.ndarray:
    levels = np.zeros((layout.rows, layout.columns), np.int8)
    for bits, rows, columns in layout.submatrices():
        half = 1 << (bits - 1)
        levels[rows, columns] = rng.integers(-half, half, levels[rows, columns].shape)
    return levels


def random_mask(rng: np.random.Generator, layout: Layout) -> np.ndarray | None:
    pattern = layout.pattern
    if not pattern.keep:
        return None
    if not pattern.is_n_of_m:
        return rng.random((layout.rows, layout.columns)) < 0.25
    order = rng.random((layout.rows, layout.columns // pattern.of, pattern.of)).argsort(axis=-1)
    return (order < pattern.keep).reshape(layout.rows, layout.columns)


def random_weight(rng: np.random.Generator, layout: Layout) -> PackedWeight:
    scales = rng.uniform(0.01, 1.0, layout.scales_shape) * rng.choice((-1.0, 1.0), layout.scales_shape)
    return pack(random_levels(rng, layout), scales.astype(np.float16), random_mask(rng, layout), layout)


def random_row_bits(rng: np.random.Generator, layout: Layout) -> np.ndarray:
    """An order of the rows of a weight of several widths: uint8 [N]."""
    return rng.permutation(np.repeat(np.array(BIT_WIDTHS, np.uint8), layout.segments))


def op_model(weight: PackedWeight, trans_b: bool, accuracy_level: int = 0, bias: np.ndarray | None = None, *,
             row_bits: np.ndarray | None = None, nodes: int = 1, opset: int = 18,
             functions: Sequence[onnx.FunctionProto] | None = None,
             batch: Sequence[str | int] = ("batch",), constant: bool = True) -> onnx.ModelProto:
    """Inputs A [*batch, K] → Y0, Y1, … [*batch, N]: ``nodes`` nodes that read one weight.

    With ``constant`` False the weight's streams are inputs of the model, under the names of its initializers.
    """
    tensors = {"codes": weight.codes}
    if weight.layout.pattern.keep:
        tensors["pattern"] = weight.pattern
    tensors["scales"] = weight.scales
    if bias is not None:
        tensors["bias"] = bias
    if row_bits is not None:
        tensors["row_bits"] = row_bits
    attributes = node_attributes(weight.layout, trans_b, accuracy_level)
    protos = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    inputs = [helper.make_tensor_value_info("A", onnx.TensorProto.FLOAT, [*batch, attributes["K"]])]
    if not constant:
        inputs += [helper.make_tensor_value_info(proto.name, proto.data_type, list(proto.dims)) for proto in protos]
    names = ["A", *tensors]
    if row_bits is not None and bias is None:
        names.insert(-1, "")
    graph = helper.make_graph(
        [
            helper.make_node(op_type(weight.layout), names, [f"Y{index}"], domain=DOMAIN, **attributes)
            for index in range(nodes)
        ],
        "one_op",
        inputs,
        [
            helper.make_tensor_value_info(f"Y{index}", onnx.TensorProto.FLOAT, [*batch, attributes["N"]])
            for index in range(nodes)
        ],
        protos if constant else [],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    functions = op_functions((op_type(weight.layout),), opset) if functions is None else functions
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=9)


def gather_model(weight: PackedWeight, row_bits: np.ndarray | None = None, *, opset: int = 18,
                 functions: Sequence[onnx.FunctionProto] | None = None, shape: Sequence[str | int] = ("count",),
                 constant: bool = True) -> onnx.ModelProto:
    """Input indices [*shape] → Y [*shape, K]: one node that looks rows up. ``constant``: as in :func:`op_model`."""
    tensors = {"codes": weight.codes, "scales": weight.scales}
    if row_bits is not None:
        tensors["row_bits"] = row_bits
    protos = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    inputs = [helper.make_tensor_value_info("indices", onnx.TensorProto.INT64, shape)]
    if not constant:
        inputs += [helper.make_tensor_value_info(proto.name, proto.data_type, list(proto.dims)) for proto in protos]
    attributes = gather_attributes(weight.layout)
    node = helper.make_node(Q_GATHER, ["indices", *tensors], ["Y"], domain=DOMAIN, **attributes)
    output = helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, [*shape, attributes["K"]])
    graph = helper.make_graph([node], "one_gather", inputs, [output], protos if constant else [])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    functions = op_functions((Q_GATHER,), opset) if functions is None else functions
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=9)


def session_options(optimize: bool = True) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, of the largest expected value."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
