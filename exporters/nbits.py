"""Matrices at 4 or 8 bits for ONNX Runtime's own ops, ``com.microsoft`` MatMulNBits and GatherBlockQuantized.

K, the length of a row, need not be a multiple of the block size: the last block is filled up with zeros. MatMulNBits is
made for that; of GatherBlockQuantized's rows the filling is cut off behind it.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.modules import NODE_NAME
from fips_ort.layout import fitting_block_size, padded_to_blocks

_SMALLEST_BLOCK = 16
"""The smallest blocks that the ops know; larger ones are powers of two."""


def block_size_for(features: int, block_size: int) -> int:
    """The block size with which rows of ``features`` values take the fewest bits, ``block_size`` at most
    (:func:`fips_ort.layout.fitting_block_size`)."""
    return fitting_block_size(features, block_size, _SMALLEST_BLOCK)


@dataclass(frozen=True, slots=True, eq=False)
class NBitsTable:
    """A matrix [N, K] as codes of ``bits`` bits (4 or 8), with a scale for every ``block_size`` entries along K.

    ``codes``: uint8 [N, blocks, block_size * bits / 8] (see :func:`pack_nbits`), blocks = K / block_size rounded up.
    ``scales``: float32 [N, blocks], all of them float16 numbers. ``values``: float32 [N, K], what the codes stand for.
    """

    bits: int
    block_size: int
    codes: Tensor
    scales: Tensor
    values: Tensor


_ROWS_AT_ONCE = 8192
"""Rows of a table that are quantized together: a vocabulary's table is too large for numpy's temporary copies."""


def quantize_table(weight: Tensor, bits: int, block_size: int, *, codes_only: bool = False) -> NBitsTable:
    """Round ``weight``, of any floating dtype [N, K], with :func:`quantize_blocks`, a part of its rows at a time.

    ``codes_only``: leave out ``values``; in their place stands a tensor of NaN of their shape that takes no memory.
    Raises the errors of :func:`quantize_blocks`.
    """
    source = weight.detach()
    count, features = source.shape
    blocks = padded_to_blocks(features, block_size) // block_size
    codes = torch.empty(count, blocks, block_size * bits // 8, dtype=torch.uint8)
    scales = torch.empty(count, blocks)
    values = torch.full((1, 1), torch.nan).expand(count, features) if codes_only else torch.empty(count, features)
    for start in range(0, count, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        levels, stored = quantize_blocks(source[rows].float().cpu().numpy(), bits, block_size)
        widened = stored.astype(np.float32)
        codes[rows] = torch.from_numpy(pack_nbits(levels, bits, block_size))
        scales[rows] = torch.from_numpy(widened)
        if not codes_only:
            values[rows] = torch.from_numpy(levels * np.repeat(widened, block_size, axis=1)[:, :features])
    return NBitsTable(bits, block_size, codes, scales, values)


def table_of_values(values: Tensor, scales: Tensor, bits: int, block_size: int) -> NBitsTable:
    """Store ``values`` float32 [N, K] that are levels ``-2**(bits-1) … 2**(bits-1)-1`` times ``scales`` float32
    [N, blocks], which are float16 numbers. Raises ValueError for values that are no such levels."""
    codes = torch.empty(len(values), scales.shape[1], block_size * bits // 8, dtype=torch.uint8)
    lowest = -(1 << (bits - 1))
    for start in range(0, len(values), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        widened = scales[rows].repeat_interleave(block_size, dim=1)[:, : values.shape[1]]
        levels = torch.round(values[rows] / torch.where(widened == 0, 1.0, widened)).clamp(lowest, -lowest - 1)
        if not torch.equal(levels * widened, values[rows]):
            raise ValueError("values are not levels of their scales")
        codes[rows] = torch.from_numpy(pack_nbits(levels.numpy().astype(np.int8), bits, block_size))
    return NBitsTable(bits, block_size, codes, scales, values)


def table_of_codes(codes: Tensor, scales: Tensor, bits: int, block_size: int, features: int) -> NBitsTable:
    """Compute the values that stored ``codes`` and ``scales`` stand for (shapes: :class:`NBitsTable`; K is
    ``features``)."""
    values = torch.empty(len(codes), features)
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        levels = torch.from_numpy(unpack_nbits(codes[rows].numpy(), bits))
        values[rows] = (levels * scales[rows].repeat_interleave(block_size, dim=1))[:, :features]
    return NBitsTable(bits, block_size, codes, scales, values)


def quantize_blocks(
    weight: NDArray[np.float32], bits: int, block_size: int
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Round ``weight`` [N, K] to signed levels (int8 [N, K]) times float16 scales [N, blocks].

    The entry of largest magnitude of each block becomes the lowest level ``-2**(bits-1)``, by a negative scale
    if it is positive, so that all levels are used. Levels are rounded half to even with the stored scale.
    Raises ValueError for bits other than 4 and 8 and for scales beyond float16.

    onnxruntime's own quantizer goes the same way with float32 scales. Ours are stored as float16, and the stored scale
    must be the one that levels are rounded with.
    """
    if bits not in (4, 8):
        raise ValueError(f"MatMulNBits weights have 4 or 8 bits, got {bits}")
    lowest = -(1 << (bits - 1))
    blocks = _filled(weight, block_size).reshape(weight.shape[0], -1, block_size)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    with np.errstate(over="ignore"):
        scales = (largest / lowest).astype(np.float16)
    if not np.isfinite(scales).all():
        raise ValueError("weights are not finite or need scales beyond float16")
    divisors = np.where(scales == 0, np.float16(1), scales).astype(np.float32)
    levels = np.clip(np.rint(blocks / divisors[..., None]), lowest, -lowest - 1)
    levels[scales == 0] = 0
    return levels.astype(np.int8).reshape(weight.shape[0], -1)[:, : weight.shape[1]], scales


def _filled(rows: NDArray[Any], block_size: int) -> NDArray[Any]:
    """Fill the last block of each row [N, K] with zeros."""
    missing = padded_to_blocks(rows.shape[1], block_size) - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing))) if missing else rows


def pack_nbits(levels: NDArray[np.int8], bits: int, block_size: int) -> NDArray[np.uint8]:
    """Signed levels [N, K] → MatMulNBits bytes [N, blocks, block_size * bits / 8].

    Codes are ``level + 2**(bits-1)`` (the op's default zero point); at 4 bits the first of two is the low half. The
    last block is filled up with levels of zero.
    """
    codes = (_filled(levels, block_size).astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    codes = codes.reshape(levels.shape[0], -1, block_size)
    if bits == 8:
        return codes
    return np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], np.uint8(4)))


def unpack_nbits(stored: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Inverse of :func:`pack_nbits`: signed levels [N, blocks * block_size]."""
    codes = stored if bits == 8 else np.stack([stored & 15, stored >> 4], axis=-1)
    return (codes.reshape(stored.shape[0], -1).astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


class NBitsModule(nn.Module):
    """A module that computes with a stored :class:`NBitsTable`, whose tensors are its buffers."""

    codes: Tensor
    scales: Tensor
    values: Tensor

    def __init__(self, table: NBitsTable, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.bits, self.block_size = table.bits, table.block_size
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("values", table.values, persistent=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NBitsModule":
        """Copy the module but not its tensors, which take gigabytes in a large model and never change."""
        memo |= {id(tensor): tensor for tensor in self.buffers(recurse=False)}
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result


class NBitsLinear(NBitsModule):
    """A linear layer stored for MatMulNBits: the codes of a table, its scales as a vector, and ``bias``, float32 [N]
    of float16 numbers, or None. ``name``: its path in the model, which becomes the name of the node."""

    bias: Tensor | None

    def __init__(self, table: NBitsTable, bias: Tensor | None, name: str, accuracy_level: int = 0) -> None:
        super().__init__(table, table.codes, table.scales.view(-1))
        self.name, self.accuracy_level = name, accuracy_level
        self.out_features, self.in_features = table.values.shape
        self.register_buffer("bias", None if bias is None else bias.detach().float().half().float())

    @property
    def attributes(self) -> dict[str, int]:
        """Attributes of the MatMulNBits node."""
        return {
            "K": self.in_features,
            "N": self.out_features,
            "bits": self.bits,
            "block_size": self.block_size,
            "accuracy_level": self.accuracy_level,
        }

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., K] → float32 [..., N]."""
        if not torch.onnx.is_in_onnx_export():
            return nn.functional.linear(x, self.values, self.bias)
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scales),
            {**self.attributes},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
            metadata_props={NODE_NAME: self.name},
        )
        # Not the op's own bias input: onnxruntime has that only since 1.18.
        return y if self.bias is None else y + self.bias


class NBitsEmbedding(NBitsModule):
    """A token table stored for GatherBlockQuantized: ``codes`` uint8 [N, blocks * block_size * bits / 8], ``scales``
    float32 [N, blocks]. ``embed_scale``: float32 scalar that rows are multiplied with (Gemma), or None."""

    embed_scale: Tensor | None

    def __init__(self, table: NBitsTable, embed_scale: Tensor | None) -> None:
        super().__init__(table, table.codes.view(len(table.codes), -1), table.scales)
        scale = None if embed_scale is None else embed_scale.detach().float().clone()
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [...] → float32 [..., K]."""
        rows = nn.functional.embedding(input_ids, self.values)
        return rows if self.embed_scale is None else rows * self.embed_scale
