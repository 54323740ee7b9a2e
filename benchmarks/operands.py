"""The right-hand side of one product, as each op stores it: random values, real bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fips_ort.layout import Layout
from fips_ort.ops import DOMAIN, node_attributes, op_type
from fips_ort.packed import PackedWeight, pack

INT8_ACTIVATIONS = 4
"""The accuracy_level that permits int8 activations; 0 keeps them in float32."""
_GAIN = 0.1
"""About how large a product's results are beside its activations: so small that MLPs in a row, which all have the same
random weights, change what their residual connections carry only a little, however many they are."""
_PERIOD = 64
"""Rows of random levels and masks; the rows after them repeat these."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A node that multiplies activations [M, K] with a matrix, to [M, N]: its op, and its inputs after the first."""

    op_type: str
    domain: str
    attributes: Mapping[str, int]
    tensors: Mapping[str, NDArray]
    shape: tuple[int, int]
    """(K, N) of the matrix."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def float32_operand(k: int, n: int) -> Operand:
    """ONNX's MatMul with a float32 matrix [K, N]."""
    values = (np.random.default_rng(0).random((k, n), np.float32) - 0.5) * np.float32(2 * _GAIN / k**0.5)
    return Operand("MatMul", "", {}, {"B": values}, (k, n))


def nbits_operand(k: int, n: int, bits: int, block_size: int, accuracy_level: int) -> Operand:
    """``com.microsoft.MatMulNBits``, symmetric, with float32 scales, as a model with float32 activations needs it."""
    rng = np.random.default_rng(0)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block_size, "accuracy_level": accuracy_level}
    blocks = k // block_size
    codes = rng.integers(0, 256, (n, blocks, block_size * bits // 8), np.uint8)
    scales = _random_scales(rng, (n, blocks), k, bits).astype(np.float32)
    return Operand("MatMulNBits", "com.microsoft", attributes, {"codes": codes, "scales": scales}, (k, n))


def packed_operand(layout: Layout, accuracy_level: int, trans_b: bool = True) -> Operand:
    """An ``ai.fips`` op with a packed weight of this layout, as B = S.T (``trans_b``) or B = S."""
    weight = _random_weight(layout)
    tensors: dict[str, NDArray] = {"codes": weight.codes}
    if layout.pattern.keep:
        tensors["pattern"] = weight.pattern
    tensors["scales"] = weight.scales
    attributes = node_attributes(layout, trans_b, accuracy_level)
    return Operand(op_type(layout), DOMAIN, attributes, tensors, (attributes["K"], attributes["N"]))


@lru_cache(maxsize=4)
def _random_weight(layout: Layout) -> PackedWeight:
    """A weight of random levels. It is cached: several layers, and both products with a basis, store the same bytes,
    each in a place of its own."""
    rng = np.random.default_rng(0)
    levels = np.zeros((layout.rows, layout.columns), np.int8)
    for bits, rows, columns in layout.submatrices():
        shape = levels[rows, columns].shape
        half = 1 << (bits - 1)
        levels[rows, columns] = np.resize(rng.integers(-half, half, (_PERIOD, shape[1]), np.int8), shape)
    least_bits = min(bits for bits, _, _ in layout.submatrices())
    scales = _random_scales(rng, layout.scales_shape, layout.columns, least_bits).astype(np.float16)
    return pack(levels, scales, _random_mask(rng, layout), layout)


def _random_mask(rng: np.random.Generator, layout: Layout) -> NDArray[np.bool_] | None:
    """A random mask with n of m columns kept as the layout's pattern asks, for a bitmap about a quarter of all entries;
    None for dense layouts."""
    pattern = layout.pattern
    if not pattern.keep:
        return None
    if pattern.is_n_of_m:
        order = rng.random((_PERIOD, layout.columns // pattern.of, pattern.of)).argsort(axis=-1)
        mask = order < pattern.keep
    else:
        mask = rng.random((_PERIOD, layout.columns)) < 0.25
    return np.resize(mask, (layout.rows, layout.columns))


def _random_scales(rng: np.random.Generator, shape: tuple[int, int], inputs: int, bits: int) -> NDArray[np.float64]:
    """Random scales of either sign, for levels of ``bits`` bits in products of ``inputs`` terms."""
    return rng.choice((-1.0, 1.0), shape) * rng.uniform(0.5, 1.0, shape) * _GAIN / (inputs**0.5 * 2 ** (bits - 1))
