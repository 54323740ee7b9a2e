"""Storage of everything outside the MLPs: packed linear layers and tables (:mod:`exporters.packed_rest`), and float16
weights.

All functions put the *stored* numbers into the PyTorch model, so that PyTorch and the artefact compute with the
same weights. They are used in this order: :func:`fix_position_embeddings`, :func:`install_rest`,
:func:`round_to_float16`.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from exporters.modules import PackedEmbedding, PackedLayer, PackedMatrix, PackedMLPModule, PackedOutput, token_layers
from exporters.packed_model import PackedLinear
from exporters.packed_rest import PackedRest, PackedTable


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

    What is stored packed is left alone, and so are buffers that are no part of the model's
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


def install_rest(model: Any, rest: PackedRest, accuracy_level: int = 0) -> nn.Module:
    """A copy of ``model`` with the packed weights of ``rest`` in the place of its own linear layers and tables; it
    shares all other weights.

    Biases stay, as float16 numbers. The output layer of a model that ties it reads the token table. Raises ValueError
    if a path leads to no such layer, or the token table is of a kind that does more than look up rows and scale them by
    a number.
    """
    modules = dict(model.named_modules())
    embedding, head = token_layers(model)
    names = {id(module): name for name, module in modules.items()}
    replaced: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for path, weight in rest.linears.items():
        linear = modules.get(path)
        if not isinstance(linear, nn.Linear) or linear is head:
            raise ValueError(f"{path} is no linear layer of the model")
        bias = None if linear.bias is None else linear.bias.detach().half().float().numpy()
        layer = PackedLayer(PackedLinear(weight, bias), linear.in_features, path, accuracy_level)
        replaced[id(linear)] = layer.train(linear.training)
    for path, table in rest.tables.items():
        if path == names.get(id(embedding)):
            scale = _scale_of(embedding)
            packed = PackedEmbedding(table, embedding.embedding_dim, scale, accuracy_level).train(embedding.training)
            replaced[id(embedding)] = packed
            if head.weight is embedding.weight:
                replaced[id(head)] = _output(head, packed, names[id(head)], tied=True)
        elif path == names.get(id(head)):
            own = PackedMatrix(table.weight, accuracy_level, table.row_bits)
            replaced[id(head)] = _output(head, own, path, tied=False)
        else:
            raise ValueError(f"{path} is no table of tokens of the model")
    return copy.deepcopy(model, replaced)


def packed_rest(model: nn.Module) -> PackedRest:
    """What :func:`install_rest` has put into ``model``."""
    linears, tables = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, PackedLayer):
            linears[path] = module.stored
        elif isinstance(module, PackedEmbedding):
            tables[path] = _table_of(module)
        elif isinstance(module, PackedOutput) and "table" in module._modules:
            tables[path] = _table_of(module.matrix)
    return PackedRest(linears, tables)


def _table_of(matrix: PackedMatrix) -> PackedTable:
    return PackedTable(matrix.stored, None if matrix.row_bits is None else matrix.row_bits.numpy())


def _output(head: nn.Linear, table: PackedMatrix, name: str, *, tied: bool) -> nn.Module:
    bias = None if head.bias is None else head.bias.detach().half().float()
    return PackedOutput(table, head.in_features, bias, name, tied=tied).train(head.training)


def _scale_of(embedding: nn.Module) -> Tensor | None:
    """What rows of a token table are multiplied with."""
    scale: Tensor | None = getattr(embedding, "embed_scale", None)
    if type(embedding) is not nn.Embedding and scale is None:
        raise ValueError(f"the token table is a {type(embedding).__name__}, whose computation is not known here")
    return scale


def _modules_outside(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every module that is not part of packed storage."""
    stored = {
        id(part)
        for module in model.modules()
        if isinstance(module, PackedMLPModule | PackedMatrix)
        for part in module.modules()
    }
    return [(name, module) for name, module in model.named_modules() if id(module) not in stored]
