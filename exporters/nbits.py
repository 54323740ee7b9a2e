"""A model at 4 bits in onnxruntime's own ops, ``com.microsoft`` MatMulNBits and GatherBlockQuantized, rounded to
nearest as onnxruntime-genai's builder does it: what our own formats are measured beside.

K, the length of a row, need not be a multiple of the block size: the last block is filled up with zeros. MatMulNBits is
made for that; of GatherBlockQuantized's rows the filling is cut off behind it.
"""

import copy
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.modules import NODE_NAME, token_layers
from fips_ort.layout import fitting_block_size, padded_to_blocks

BITS = 4
_SMALLEST_BLOCK = 16
"""The smallest blocks that the ops know; larger ones are powers of two."""
_ROWS_AT_ONCE = 8192
"""Rows that are quantized together: a vocabulary's table is too large for numpy's temporary copies."""


class NBitsWeight:
    """A matrix [N, K] at 4 bits, with a scale for every ``block_size`` entries along K.

    ``codes``: uint8 [N, blocks, block_size / 2] (see :func:`pack_nbits`), blocks = K / block_size rounded up.
    ``scales``: float32 [N, blocks], all of them float16 numbers. ``shape``: (N, K). ``block_size``: at most
    (:func:`fips_ort.layout.fitting_block_size`). Raises the errors of :func:`quantize_blocks`.
    """

    def __init__(self, weight: Tensor, block_size: int) -> None:
        self.shape = rows, columns = weight.shape
        self.block_size = fitting_block_size(columns, block_size, _SMALLEST_BLOCK)
        blocks = padded_to_blocks(columns, self.block_size) // self.block_size
        self.codes = torch.empty(rows, blocks, self.block_size * BITS // 8, dtype=torch.uint8)
        self.scales = torch.empty(rows, blocks)
        for start in range(0, rows, _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            levels, scales = quantize_blocks(weight.detach()[part].float().cpu().numpy(), self.block_size)
            self.codes[part] = torch.from_numpy(pack_nbits(levels, self.block_size))
            self.scales[part] = torch.from_numpy(scales.astype(np.float32))


class NBitsLinear(nn.Module):
    """A linear layer for MatMulNBits: :class:`NBitsWeight`'s codes, its scales as a vector, and ``bias``, float32 [N],
    or None. ``name``: its path in the model, which becomes the name of the node. It can be exported, not run."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: NBitsWeight, bias: Tensor | None, name: str, accuracy_level: int) -> None:
        super().__init__()
        self.name, self.accuracy_level, self.block_size = name, accuracy_level, weight.block_size
        self.out_features, self.in_features = weight.shape
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales.view(-1))
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    @property
    def attributes(self) -> dict[str, int]:
        """Attributes of the MatMulNBits node."""
        return {
            "K": self.in_features,
            "N": self.out_features,
            "bits": BITS,
            "block_size": self.block_size,
            "accuracy_level": self.accuracy_level,
        }

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., K] → float32 [..., N], in an export."""
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


class NBitsEmbedding(nn.Module):
    """A token table for GatherBlockQuantized: :class:`NBitsWeight`'s codes as rows, and its scales. ``embed_scale``:
    float32 scalar that rows are multiplied with (Gemma), or None. ``width``: features of a row. It can be exported, not
    run in PyTorch."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: NBitsWeight, embed_scale: Tensor | None) -> None:
        super().__init__()
        self.width, self.block_size, self.embed_scale = weight.shape[1], weight.block_size, embed_scale
        self.register_buffer("codes", weight.codes.view(len(weight.codes), -1))
        self.register_buffer("scales", weight.scales)


def with_nbits(model: Any, block_size: int, accuracy_level: int, skip: Collection[str] = ()) -> nn.Module:
    """A copy of ``model`` with every linear layer at 4 bits but those at the paths ``skip``; of a language model also
    the token table, which is there once if it is tied to the output layer. ``block_size``: at most."""
    embedding, head = token_layers(model)
    replaced: dict[int, object] = {}
    tied = None
    if head is not None:
        table = NBitsWeight(embedding.weight, block_size)
        replaced[id(embedding)] = NBitsEmbedding(table, getattr(embedding, "embed_scale", None))
        tied = table if head.weight is embedding.weight else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in skip:
            weight = (tied if module is head else None) or NBitsWeight(module.weight, block_size)
            replaced[id(module)] = NBitsLinear(weight, module.bias, name, accuracy_level)
    return copy.deepcopy(model, replaced).eval()


def quantize_blocks(weight: NDArray[np.float32], block_size: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Round ``weight`` [N, K] to signed levels -8 … 7 (int8 [N, K]) times float16 scales [N, blocks].

    The entry of largest magnitude of each block becomes the lowest level, by a negative scale if it is positive, so
    that all levels are used. Levels are rounded half to even with the stored scale. Raises ValueError for scales beyond
    float16.

    onnxruntime's own quantizer goes the same way with float32 scales. Ours are stored as float16, and the stored scale
    must be the one that levels are rounded with.
    """
    lowest = -(1 << (BITS - 1))
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


def pack_nbits(levels: NDArray[np.int8], block_size: int) -> NDArray[np.uint8]:
    """Signed levels [N, K] → MatMulNBits bytes [N, blocks, block_size / 2].

    Codes are ``level + 8`` (the op's default zero point); the first of two is the low half. The last block is filled up
    with levels of zero.
    """
    codes = (_filled(levels, block_size).astype(np.int16) + (1 << (BITS - 1))).astype(np.uint8)
    codes = codes.reshape(levels.shape[0], -1, block_size)
    return np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], np.uint8(4)))
