"""Facts about the weights of any model."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from pipeline.plumbing.errors import InputError


def check_finite(model: nn.Module) -> None:
    """Raise InputError naming every parameter and buffer that contains NaN or infinity."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise InputError(f"the model's weights contain NaN or infinity: {', '.join(bad)}")


def hash_model(model: nn.Module) -> str:
    """SHA-256 of a transformers model's configuration and of every tensor of its state."""
    config: Any = model.config
    digest = hashlib.sha256(json.dumps(config.to_diff_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
