"""Facts about the weights of any model."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from exporters.modules import token_layers
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import RestOfModel

_FLOAT16_END = 65_520.0
"""The least number that float16 rounds to infinity."""


def check_finite(model: nn.Module) -> None:
    """Raise InputError naming every parameter and buffer that contains NaN or infinity."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise InputError(f"the model's weights contain NaN or infinity: {', '.join(bad)}")


def check_float16(
    model: nn.Module, rest: RestOfModel, compressed: Collection[str] = (), plain: Collection[str] = ()
) -> None:
    """Raise InputError naming every weight that cannot be stored as ``rest`` says, because float16 holds no numbers
    beyond 65,504: weights themselves, and scales of those that are stored as codes.

    ``compressed``: paths of linear layers that are stored otherwise; ``plain``: of those that ``rest.linear_bits`` does
    not apply to.
    """
    tables = token_layers(model)
    beyond: dict[str, float] = {}
    for path, module in model.named_modules():
        if path in compressed:
            continue
        bits: int | None = None
        if any(module is table for table in tables):
            bits = rest.fewest_embedding_bits
        elif isinstance(module, nn.Linear) and path not in plain:
            bits = rest.linear_bits
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in module._non_persistent_buffers_set or not tensor.is_floating_point() or not tensor.numel():
                continue
            if bits is None and rest.weights == "float32":
                continue
            largest = float(tensor.detach().abs().max())
            # The entry of largest magnitude of a block of codes is the outermost level times the scale.
            if largest >= _FLOAT16_END * (1 if bits is None or name != "weight" else 2 ** (bits - 1) - 0.5):
                beyond[f"{path}.{name}"] = largest
    if beyond:
        named = ", ".join(f"{name} (up to {largest:.6g})" for name, largest in beyond.items())
        keys = [key for key in ("linear_bits", "embedding_bits") if getattr(rest, key)]
        without = f", without {' and '.join(keys)} if it is theirs" if keys else ""
        raise InputError(
            f"quantization.rest.weights: {rest.weights}: float16 ends at 65,504 and cannot hold {named}; set "
            f"quantization.rest.weights: float32{without}"
        )


def hash_model(model: nn.Module) -> str:
    """SHA-256 of a transformers model's configuration and of every tensor of its state."""
    config: Any = model.config
    digest = hashlib.sha256(json.dumps(config.to_diff_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
