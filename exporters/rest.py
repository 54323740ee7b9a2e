"""Storage of everything outside the MLPs: float16 weights, and linear layers and token tables at 4 or 8 bits
(:mod:`exporters.nbits`).

All functions put the *stored* numbers into the PyTorch model, so that PyTorch and the artefact compute with the
same weights. They are used in this order: :func:`fix_position_embeddings`, :func:`quantize_linears`,
:func:`quantize_embedding`, :func:`round_to_float16`.
"""

import copy
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exporters.modules import PackedMatrix, PackedMLPModule
from exporters.nbits import NBitsEmbedding, NBitsLinear, NBitsModule, NBitsTable, block_size_for, quantize_table


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
    tables: Mapping[str, NBitsTable] | None = None,
    codes_only: bool = False,
) -> nn.Module:
    """A copy of ``model`` whose linear layers outside the packed MLPs are :class:`NBitsLinear`.

    ``skip``: paths of layers left alone (the classifier). A language model's output layer is always left alone: it
    goes with the token table (:func:`quantize_embedding`). ``tables``: path → what to store for a layer; layers not
    named there are rounded to nearest, in blocks of ``block_size`` or, where it does not divide the input features,
    of what :func:`exporters.nbits.block_size_for` gives. ``codes_only``: make a model that can be exported but not run,
    in an eighth of the memory at 4 bits. Raises ValueError naming any path in ``skip`` that is no linear layer.
    """
    linears = {name: module for name, module in _modules_outside(model) if isinstance(module, nn.Linear)}
    unknown = sorted(set(skip) - linears.keys())
    if unknown:
        raise ValueError(f"not linear layers of the model: {', '.join(unknown)}")
    head = _output_layer(model)
    chosen = {name: linear for name, linear in linears.items() if name not in skip and linear is not head}
    replaced: dict[int, object] = {
        id(linear): NBitsLinear(
            (tables or {}).get(name) or _nearest(linear.weight, bits, block_size, codes_only),
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
    tables: Mapping[str, NBitsTable] | None = None,
    codes_only: bool = False,
) -> nn.Module:
    """A copy of the language ``model`` whose token table is an :class:`NBitsEmbedding` and whose output layer is an
    :class:`NBitsLinear`. Where the model ties them, both hold the same tensors.

    ``tables``: path → table; if the output layer's path is there, its table is stored, else it is rounded to nearest.
    ``block_size``, ``codes_only``: as in :func:`quantize_linears`. Raises ValueError if the token table is of a kind
    that does more than look up rows and scale them by a number.
    """
    embedding, head = model.get_input_embeddings(), _output_layer(model)
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no token table and output layer that could be quantized")
    scale = getattr(embedding, "embed_scale", None)
    if type(embedding) is not nn.Embedding and scale is None:
        raise ValueError(f"the token table is a {type(embedding).__name__}, whose computation is not known here")
    names = {id(module): name for name, module in model.named_modules()}
    head_name = names[id(head)]
    head_table = (tables or {}).get(head_name) or _nearest(head.weight, bits, block_size, codes_only)
    tied = head.weight is embedding.weight
    table = head_table if tied else _nearest(embedding.weight, bits, block_size, codes_only)
    replaced: dict[int, object] = {
        id(embedding): NBitsEmbedding(table, scale).train(embedding.training),
        id(head): NBitsLinear(head_table, head.bias, head_name, accuracy_level).train(head.training),
    }
    return copy.deepcopy(model, replaced)


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


def _nearest(weight: Tensor, bits: int, block_size: int, codes_only: bool) -> NBitsTable:
    """``weight`` [N, K] rounded to nearest, in the blocks that suit K."""
    return quantize_table(weight, bits, block_size_for(weight.shape[1], block_size), codes_only=codes_only)
