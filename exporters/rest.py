"""Storage of everything outside the MLPs: float16 weights, n-bit linear layers (``com.microsoft::MatMulNBits``) and
n-bit token tables (``com.microsoft::GatherBlockQuantized``).

All functions put the *stored* numbers into the PyTorch model, so that PyTorch and the artefact compute with the
same weights. Order of use: :func:`fix_position_embeddings`, :func:`quantize_linears`, :func:`quantize_embedding`,
:func:`round_to_float16`.
"""

import copy
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.modules import NODE_NAME, PackedMatrix, PackedMLPModule


def fix_position_embeddings(model: nn.Module, height: int, width: int) -> None:
    """Replace position embeddings that the model interpolates at every call by those for one square image size.

    Changes ``model`` in place; the model computes the same for images of this size. Models that interpolate on
    request only (ViT, DeiT, Swin) are left as they are. Raises ValueError for images that are not square.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        interpolate = getattr(module, "interpolate_pos_encoding", None)
        positions = getattr(module, "position_embeddings", None)
        on_request = "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
        if interpolate is None or on_request or not isinstance(positions, nn.Parameter):
            continue
        patch_height, patch_width = module.patch_embeddings.patch_size
        patches = (height // patch_height) * (width // patch_width)
        if patches == positions.shape[1] - 1:
            continue
        if height != width:
            raise ValueError(f"position embeddings can be fixed for square images only, got {height} x {width}")
        with torch.no_grad():
            fixed = interpolate(positions.new_empty(1, patches + 1, positions.shape[2]), height, width)
        module.position_embeddings = nn.Parameter(fixed.detach().clone(), requires_grad=positions.requires_grad)


def round_to_float16(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose floating parameters and buffers hold float16 numbers (in their own dtype).

    What is stored packed (MLPs, n-bit layers) is left alone, and so are buffers that are no part of the model's
    state but computed from its configuration (frequencies of rotary embeddings, say). Raises ValueError naming
    every tensor with a number beyond float16's range or not finite.
    """
    result = copy.deepcopy(model)
    beyond = []
    with torch.no_grad():
        for module_name, module in _modules_outside(result):
            computed = module._non_persistent_buffers_set
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if name in computed or not tensor.is_floating_point():
                    continue
                rounded = tensor.half().to(tensor.dtype)
                if not torch.isfinite(rounded).all():
                    beyond.append(f"{module_name}.{name}")
                tensor.copy_(rounded)
    if beyond:
        raise ValueError(f"float16 cannot hold {', '.join(beyond)}")
    return result


def quantize_linears(
    model: nn.Module,
    bits: int,
    block_size: int,
    skip: Collection[str] = (),
    accuracy_level: int = 0,
    tables: "Mapping[str, NBitsTable] | None" = None,
    codes_only: bool = False,
) -> nn.Module:
    """A copy of ``model`` whose linear layers outside the packed MLPs are :class:`NBitsLinear`.

    ``skip``: module paths left alone (the classifier). A language model's output layer is always left alone: it
    goes with the token table (:func:`quantize_embedding`). ``tables``: what to store for the layers named there, the
    others are rounded to nearest. ``codes_only``: the result can be exported but not run, and takes an eighth of the
    memory at 4 bits. Raises ValueError naming all layers whose input features ``block_size`` does not
    divide, and any path in ``skip`` that is no linear layer.
    """
    linears = {name: module for name, module in _modules_outside(model) if isinstance(module, nn.Linear)}
    unknown = sorted(set(skip) - linears.keys())
    if unknown:
        raise ValueError(f"not linear layers of the model: {', '.join(unknown)}")
    head = _output_layer(model)
    chosen = {name: linear for name, linear in linears.items() if name not in skip and linear is not head}
    _check_divisible({name: linear.in_features for name, linear in chosen.items()}, block_size)
    replaced: dict[int, object] = {
        id(linear): NBitsLinear(
            (tables or {}).get(name) or quantize_table(linear.weight, bits, block_size, codes_only=codes_only),
            linear.bias,
            name,
            accuracy_level,
        ).train(linear.training)
        for name, linear in chosen.items()
    }
    return copy.deepcopy(model, replaced)


def quantize_embedding(
    model: Any,
    bits: int,
    block_size: int,
    accuracy_level: int = 0,
    tables: "Mapping[str, NBitsTable] | None" = None,
    codes_only: bool = False,
) -> nn.Module:
    """A copy of the language ``model`` whose token table is an :class:`NBitsEmbedding` and whose output layer is an
    :class:`NBitsLinear`. Where the model ties them, both hold the same tensors. ``tables``: may name what to store
    for the output layer, which is rounded to nearest otherwise. ``codes_only``: as in :func:`quantize_linears`.

    Raises ValueError if ``block_size`` does not divide the hidden size, or if the token table is of a kind that
    does more than look up rows and scale them by a number.
    """
    embedding, head = model.get_input_embeddings(), _output_layer(model)
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no token table and output layer that could be quantized")
    scale = getattr(embedding, "embed_scale", None)
    if type(embedding) is not nn.Embedding and scale is None:
        raise ValueError(f"the token table is a {type(embedding).__name__}, whose computation is not known here")
    names = {id(module): name for name, module in model.named_modules()}
    embedding_name, head_name = names[id(embedding)], names[id(head)]
    _check_divisible({embedding_name: embedding.embedding_dim, head_name: head.in_features}, block_size)
    head_table = (tables or {}).get(head_name) or quantize_table(head.weight, bits, block_size, codes_only=codes_only)
    tied = head.weight is embedding.weight
    table = head_table if tied else quantize_table(embedding.weight, bits, block_size, codes_only=codes_only)
    replaced: dict[int, object] = {
        id(embedding): NBitsEmbedding(table, scale).train(embedding.training),
        id(head): NBitsLinear(head_table, head.bias, head_name, accuracy_level).train(head.training),
    }
    return copy.deepcopy(model, replaced)


@dataclass(frozen=True, slots=True, eq=False)
class NBitsTable:
    """A matrix [N, K] in symmetric blocks of ``block_size`` along K.

    ``codes``: uint8 [N, K / block_size, block_size * bits / 8] (see :func:`pack_nbits`). ``scales``: float32
    [N, K / block_size], all of them float16 numbers. ``values``: float32 [N, K], what the codes stand for.
    """

    bits: int
    block_size: int
    codes: Tensor
    scales: Tensor
    values: Tensor


_ROWS_AT_ONCE = 8192
"""Rows of a table that are quantized together: a vocabulary's table is too large for numpy's temporary copies."""


def quantize_table(weight: Tensor, bits: int, block_size: int, *, codes_only: bool = False) -> NBitsTable:
    """Round ``weight`` [N, K] to n bits; see :func:`quantize_blocks`, whose errors are raised.

    ``codes_only``: the table's values are a placeholder of their shape, without memory of its own.
    """
    source = weight.detach()
    count, features = source.shape
    codes = torch.empty(count, features // block_size, block_size * bits // 8, dtype=torch.uint8)
    scales = torch.empty(count, features // block_size)
    values = torch.full((1, 1), torch.nan).expand(count, features) if codes_only else torch.empty(count, features)
    for start in range(0, count, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        levels, stored = quantize_blocks(source[rows].float().cpu().numpy(), bits, block_size)
        widened = stored.astype(np.float32)
        codes[rows] = torch.from_numpy(pack_nbits(levels, bits, block_size))
        scales[rows] = torch.from_numpy(widened)
        if not codes_only:
            values[rows] = torch.from_numpy(levels * np.repeat(widened, block_size, axis=1))
    return NBitsTable(bits, block_size, codes, scales, values)


def table_of_values(values: Tensor, scales: Tensor, bits: int, block_size: int) -> NBitsTable:
    """The table of ``values`` [N, K] that are levels ``-2**(bits-1) … 2**(bits-1)-1`` times ``scales``
    [N, K / block_size], float16 numbers. Raises ValueError if they are not."""
    codes = torch.empty(len(values), scales.shape[1], block_size * bits // 8, dtype=torch.uint8)
    lowest = -(1 << (bits - 1))
    for start in range(0, len(values), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        widened = scales[rows].repeat_interleave(block_size, dim=1)
        levels = torch.round(values[rows] / torch.where(widened == 0, 1.0, widened)).clamp(lowest, -lowest - 1)
        if not torch.equal(levels * widened, values[rows]):
            raise ValueError("values are not levels of their scales")
        codes[rows] = torch.from_numpy(pack_nbits(levels.numpy().astype(np.int8), bits, block_size))
    return NBitsTable(bits, block_size, codes, scales, values)


def table_of_codes(codes: Tensor, scales: Tensor, bits: int, block_size: int) -> NBitsTable:
    """The table of stored ``codes`` and ``scales``."""
    values = torch.empty(len(codes), scales.shape[1] * block_size)
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        levels = torch.from_numpy(unpack_nbits(codes[rows].numpy(), bits))
        values[rows] = levels * scales[rows].repeat_interleave(block_size, dim=1)
    return NBitsTable(bits, block_size, codes, scales, values)


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
        """What is stored does not change any more: a copy shares the tensors, gigabytes in a large model."""
        memo |= {id(tensor): tensor for tensor in self.buffers(recurse=False)}
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result


class NBitsLinear(NBitsModule):
    """A linear layer stored for MatMulNBits: the codes of a table, its scales as a vector, and ``bias``, float32 [N]
    of float16 numbers, or None."""

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
    """A token table stored for GatherBlockQuantized: ``codes`` uint8 [N, K * bits / 8], ``scales`` float32
    [N, K / block_size]. ``embed_scale``: float32 scalar that rows are multiplied with (Gemma), or None."""

    embed_scale: Tensor | None

    def __init__(self, table: NBitsTable, embed_scale: Tensor | None) -> None:
        super().__init__(table, table.codes.view(len(table.codes), -1), table.scales)
        scale = None if embed_scale is None else embed_scale.detach().float().clone()
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [...] → float32 [..., K]."""
        rows = nn.functional.embedding(input_ids, self.values)
        return rows if self.embed_scale is None else rows * self.embed_scale


def quantize_blocks(
    weight: NDArray[np.float32], bits: int, block_size: int
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Round ``weight`` [N, K] to signed levels (int8 [N, K]) times float16 scales [N, K / block_size].

    The entry of largest magnitude of each block becomes the lowest level ``-2**(bits-1)``, by a negative scale
    if it is positive, so that all levels are used. Levels are rounded half to even with the stored scale.
    Raises ValueError for bits other than 4 and 8, for uneven blocks and for scales beyond float16.
    """
    if bits not in (4, 8):
        raise ValueError(f"MatMulNBits weights have 4 or 8 bits, got {bits}")
    if weight.shape[1] % block_size:
        raise ValueError(f"block_size {block_size} does not divide the {weight.shape[1]} columns")
    lowest = -(1 << (bits - 1))
    blocks = weight.reshape(weight.shape[0], -1, block_size)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    with np.errstate(over="ignore"):
        scales = (largest / lowest).astype(np.float16)
    if not np.isfinite(scales).all():
        raise ValueError("weights are not finite or need scales beyond float16")
    divisors = np.where(scales == 0, np.float16(1), scales).astype(np.float32)
    levels = np.clip(np.rint(blocks / divisors[..., None]), lowest, -lowest - 1)
    levels[scales == 0] = 0
    return levels.astype(np.int8).reshape(weight.shape), scales


def pack_nbits(levels: NDArray[np.int8], bits: int, block_size: int) -> NDArray[np.uint8]:
    """Signed levels [N, K] → MatMulNBits bytes [N, K / block_size, block_size * bits / 8].

    Codes are ``level + 2**(bits-1)`` (the op's default zero point); at 4 bits the first of two is the low half.
    """
    codes = (levels.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    codes = codes.reshape(levels.shape[0], -1, block_size)
    if bits == 8:
        return codes
    return np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], np.uint8(4)))


def unpack_nbits(stored: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Inverse of :func:`pack_nbits`: signed levels [N, K]."""
    codes = stored if bits == 8 else np.stack([stored & 15, stored >> 4], axis=-1)
    return (codes.reshape(stored.shape[0], -1).astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def _modules_outside(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every module that is not part of packed storage."""
    stored = {
        id(part)
        for module in model.modules()
        if isinstance(module, PackedMLPModule | PackedMatrix | NBitsModule)
        for part in module.modules()
    }
    return [(name, module) for name, module in model.named_modules() if id(module) not in stored]


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that computes a language model's logits; None for other models."""
    find = getattr(model, "get_output_embeddings", None)
    layer = None if find is None else find()
    return layer if isinstance(layer, nn.Module) else None


def _check_divisible(features: dict[str, int], block_size: int) -> None:
    uneven = [f"{name} ({size})" for name, size in features.items() if size % block_size]
    if uneven:
        raise ValueError(f"block_size {block_size} does not divide the input features of {', '.join(uneven)}")
