"""What is compared: one MLP or one product, stored in several ways."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.graph import Graph
from benchmarks.operands import Operand, float32_operand, nbits_operand, packed_operand
from benchmarks.shapes import Shape
from fips_ort.layout import BITMAP, DENSE, Layout, Pattern

FLOAT32 = "float32"
INT4_BLOCK_128 = "int4 block 128"
BASELINES = (FLOAT32, "int4 block 32", INT4_BLOCK_128, "int2 block 32", "int2 block 128")
FIPS_SPARSE, FIPS_GRADED, FIPS_DENSE = "fips 1:4", "fips graded", "fips dense 3-bit"
GROUP = 4
"""Consecutive layers that share a basis."""
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Mlp:
    """The matrices of an MLP: ``first`` is gate (or fc1) and up, ``last`` is down (or fc2).

    With a ``basis`` U (the same bytes read as B = S.T and as B = S) they are projections: x U goes through ``first``,
    and what comes out of ``last`` through U.
    """

    first: Operand
    last: Operand
    basis: tuple[Operand, Operand] | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to store a *layer*, which is one MLP or one product.

    ``weights``: number of weights of the dense layer. ``stored_bytes``: bytes that a layer takes, with its equal part
    of a basis that its group shares. ``bytes_read``: bytes that the ops of a layer read, with the basis once for every
    product with it. ``graph``: makes a model of that many layers, each with weights of its own.
    """

    name: str
    weights: int
    stored_bytes: float
    bytes_read: int
    graph: Callable[[int], Graph]


def mlp_variants(shape: Shape, accuracy_level: int) -> list[Variant]:
    """The whole MLP, stored in all ways. ``accuracy_level`` is that of all quantized ops."""
    d, width = shape.model_size, shape.hidden_size
    mlps = {name: Mlp(make(d, width), make(width, d)) for name, make in _baselines(accuracy_level).items()}
    mlps[FIPS_SPARSE] = sparse_mlp(shape, accuracy_level)
    four, three, two = shape.graded
    segments = (0, four, three, two)
    rank = shape.graded_rank
    mlps[FIPS_GRADED] = Mlp(
        packed_operand(Layout(width, rank, _BLOCK, segments, segment_axis=1, midrise=True), accuracy_level),
        packed_operand(Layout(rank, width, _BLOCK, segments, segment_axis=0, midrise=True), accuracy_level),
        _both_ways(Layout(rank, d, _BLOCK, segments, segment_axis=0), accuracy_level),
    )
    mlps[FIPS_DENSE] = Mlp(_uniform(width, d, 3, accuracy_level), _uniform(d, width, 3, accuracy_level))
    return [_mlp_variant(name, shape, mlp) for name, mlp in mlps.items()]


def sparse_mlp(shape: Shape, accuracy_level: int) -> Mlp:
    """3-bit 1:4 projections over a 4-bit basis, as the recipes have it."""
    width, rank, pattern = shape.hidden_size, shape.sparse_rank, Pattern.parse("1:4")
    first = _uniform(width, rank, 3, accuracy_level, pattern)
    last = _uniform(rank, width, 3, accuracy_level, pattern)
    basis = Layout.uniform(rank, shape.model_size, 4, _BLOCK)
    return Mlp(first, last, _both_ways(basis, accuracy_level))


def product_variants(shape: Shape, accuracy_level: int) -> list[Variant]:
    """Activations [M, d] times one matrix [d, hidden size]; the sparse ones have the same K and N."""
    k, n = shape.model_size, shape.hidden_size
    operands = {name: make(k, n) for name, make in _baselines(accuracy_level).items()}
    for bits in (4, 3, 2):
        operands[f"fips {bits}-bit"] = _uniform(n, k, bits, accuracy_level)
    for name in ("1:4", "2:4"):
        operands[f"fips 3-bit {name}"] = _uniform(n, k, 3, accuracy_level, Pattern.parse(name))
    operands["fips 3-bit bitmap 75 %"] = _uniform(n, k, 3, accuracy_level, BITMAP)
    return [_product_variant(name, operand) for name, operand in operands.items()]


def basis_variants(shape: Shape, accuracy_level: int) -> list[Variant]:
    """Activations [M, rank] times the basis [rank, d], stored as [rank, d]: the last product of a factorized MLP."""
    rank, d = shape.sparse_rank, shape.model_size
    operands = {name: make(rank, d) for name, make in _baselines(accuracy_level).items()}
    operands["fips 4-bit, transB 0"] = _both_ways(Layout.uniform(rank, d, 4, _BLOCK), accuracy_level)[1]
    return [_product_variant(name, operand) for name, operand in operands.items()]


def mlp_graph(shape: Shape, mlp: Mlp, layers: int, group: int = GROUP) -> Graph:
    """``layers`` MLPs in a row, each with a residual connection: X [M, d] → [M, d].

    ``group`` of them share a basis. The activation is Gelu, its approximation by tanh with a gate.
    """
    graph = Graph(shape.model_size)
    approximation = "tanh" if shape.gated else "none"
    value = graph.input
    stored: list[str] = []
    for layer in range(layers):
        inner = value
        if mlp.basis:
            if layer % group == 0:
                stored = graph.store(mlp.basis[0])
            inner = graph.product(inner, mlp.basis[0], stored)
        hidden = graph.node("Gelu", [graph.product(inner, mlp.first)], approximate=approximation)
        if shape.gated:
            hidden = graph.node("Mul", [hidden, graph.product(inner, mlp.first)])
        output = graph.product(hidden, mlp.last)
        if mlp.basis:
            output = graph.product(output, mlp.basis[1], stored)
        value = graph.node("Add", [value, output])
    graph.output(value, shape.model_size)
    return graph


def _products_graph(operand: Operand, layers: int) -> Graph:
    """``layers`` products of the same X [M, K] with a matrix each, every one an output [M, N]."""
    k, n = operand.shape
    graph = Graph(k)
    for _ in range(layers):
        graph.output(graph.product(graph.input, operand), n)
    return graph


def _mlp_variant(name: str, shape: Shape, mlp: Mlp) -> Variant:
    own = (2 if shape.gated else 1) * mlp.first.nbytes + mlp.last.nbytes
    basis = mlp.basis[0].nbytes if mlp.basis else 0
    return Variant(name, shape.weights, own + basis / GROUP, own + 2 * basis, partial(mlp_graph, shape, mlp))


def _product_variant(name: str, operand: Operand) -> Variant:
    k, n = operand.shape
    return Variant(name, k * n, operand.nbytes, operand.nbytes, partial(_products_graph, operand))


def _baselines(accuracy_level: int) -> dict[str, Callable[[int, int], Operand]]:
    """How ONNX Runtime stores a matrix [K, N], by name."""
    nbits = {
        f"int{bits} block {block}": partial(
            nbits_operand, bits=bits, block_size=block, accuracy_level=accuracy_level
        )
        for bits in (4, 2)
        for block in (32, 128)
    }
    return {FLOAT32: float32_operand, **nbits}


def _both_ways(layout: Layout, accuracy_level: int) -> tuple[Operand, Operand]:
    return packed_operand(layout, accuracy_level, trans_b=True), packed_operand(layout, accuracy_level, trans_b=False)


def _uniform(rows: int, columns: int, bits: int, accuracy_level: int, pattern: Pattern = DENSE) -> Operand:
    layout = Layout.uniform(rows, columns, bits, _BLOCK, midrise=True, pattern=pattern)
    return packed_operand(layout, accuracy_level)
