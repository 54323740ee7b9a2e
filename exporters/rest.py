"""Storage of everything outside the MLPs: float16 weights and n-bit linear layers (``com.microsoft::MatMulNBits``).

All functions put the *stored* numbers into the PyTorch model, so that PyTorch and the artefact compute with the
same weights. Order of use: :func:`fix_position_embeddings`, :func:`quantize_linears`, :func:`round_to_float16`.
"""

import copy
import inspect
from collections.abc import Collection
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

    What is stored packed (MLPs, n-bit linear layers) is left alone. Raises ValueError naming every tensor with a
    number beyond float16's range or not finite.
    """
    result = copy.deepcopy(model)
    beyond = []
    with torch.no_grad():
        for module_name, module in _modules_outside(result):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not tensor.is_floating_point():
                    continue
                rounded = tensor.half().to(tensor.dtype)
                if not torch.isfinite(rounded).all():
                    beyond.append(f"{module_name}.{name}")
                tensor.copy_(rounded)
    if beyond:
        raise ValueError(f"float16 cannot hold {', '.join(beyond)}")
    return result


def quantize_linears(
    model: nn.Module, bits: int, block_size: int, skip: Collection[str] = (), accuracy_level: int = 0
) -> nn.Module:
    """A copy of ``model`` whose linear layers outside the packed MLPs are :class:`NBitsLinear`.

    ``skip``: module paths left alone (the classifier). Raises ValueError naming all layers whose input
    features ``block_size`` does not divide, and any path in ``skip`` that is no linear layer.
    """
    linears = {name: module for name, module in _modules_outside(model) if isinstance(module, nn.Linear)}
    unknown = sorted(set(skip) - linears.keys())
    if unknown:
        raise ValueError(f"not linear layers of the model: {', '.join(unknown)}")
    chosen = {name: linear for name, linear in linears.items() if name not in skip}
    uneven = [f"{name} ({linear.in_features})" for name, linear in chosen.items() if linear.in_features % block_size]
    if uneven:
        raise ValueError(f"block_size {block_size} does not divide the input features of {', '.join(uneven)}")
    replaced: dict[int, object] = {
        id(linear): NBitsLinear(linear, bits, block_size, name, accuracy_level).train(linear.training)
        for name, linear in chosen.items()
    }
    return copy.deepcopy(model, replaced)


class NBitsLinear(nn.Module):
    """A linear layer stored for MatMulNBits: ``codes`` uint8 [N, K / block_size, block_size * bits / 8], ``scales``
    float32 [N * K / block_size] (all of them float16 numbers), ``bias`` float32 [N] or None."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    values: Tensor

    def __init__(self, linear: nn.Linear, bits: int, block_size: int, name: str, accuracy_level: int = 0) -> None:
        super().__init__()
        weight = linear.weight.detach().float().cpu().numpy()
        levels, scales = quantize_blocks(weight, bits, block_size)
        self.bits, self.block_size, self.name, self.accuracy_level = bits, block_size, name, accuracy_level
        self.out_features, self.in_features = weight.shape
        self.register_buffer("codes", torch.from_numpy(pack_nbits(levels, bits, block_size)))
        self.register_buffer("scales", torch.from_numpy(scales.astype(np.float32).reshape(-1)))
        values = levels * np.repeat(scales.astype(np.float32), block_size, axis=1)
        self.register_buffer("values", torch.from_numpy(values), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().float().half().float()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., K] → float32 [..., N]."""
        if not torch.onnx.is_in_onnx_export():
            return nn.functional.linear(x, self.values, self.bias)
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scales),
            {
                "K": self.in_features,
                "N": self.out_features,
                "bits": self.bits,
                "block_size": self.block_size,
                "accuracy_level": self.accuracy_level,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
            metadata_props={NODE_NAME: self.name},
        )
        # Not the op's own bias input: onnxruntime has that only since 1.18.
        return y if self.bias is None else y + self.bias


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
        if isinstance(module, PackedMLPModule | PackedMatrix | NBitsLinear)
        for part in module.modules()
    }
    return [(name, module) for name, module in model.named_modules() if id(module) not in stored]
