"""The DINOv2 backbone inside an ONNX file, rebuilt as a transformers model with every weight accounted for.

PyTorch's exporter keeps the names of biases and norms, but stores the weight of each linear transposed under a
number (``onnx::MatMul_1966``) and splits the position embeddings into two constants. Which is which follows from
the graph: a weight's product is added to a bias that has kept its name; the patch positions feed the ``Resize`` of
the embeddings, whose result is concatenated with the class position.
"""

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2ForImageClassification

from pipeline.plumbing.errors import InputError

_PREFIX = "backbone."
_PATCHES = "embeddings.patch_embeddings.projection.weight"
_CLASS_TOKEN = "embeddings.cls_token"
_POSITIONS = "embeddings.position_embeddings"
_FIRST_HIDDEN = "encoder.layer.0.mlp.fc1.bias"
_LAST_BIAS = _PREFIX + "layernorm.bias"
_RENAMED = (
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
)
# Every size of DINOv2 has heads of 64 channels; no weight's shape tells.
_HEAD_CHANNELS = 64


def load_classifier(path: Path, image_size: int, labels: int) -> Dinov2ForImageClassification:
    """The backbone of an ONNX file as ``Dinov2ForImageClassification`` with an untrained head.

    The position embeddings are interpolated once, to the grid of ``image_size``, so that nothing is interpolated
    at run time. Raises InputError when the file does not hold a DINOv2 backbone, or a weight is left over.
    """
    weights = read_backbone(path)
    patch = _patch_size(weights, path)
    if image_size % patch:
        raise InputError(f"model.image_size: {image_size} is not a multiple of the patch size, {patch}")
    positions = weights[_POSITIONS]
    weights[_POSITIONS] = resize_positions(positions, image_size // patch)
    model = Dinov2ForImageClassification(_config(weights, image_size, patch, labels))
    _fill(model.dinov2, weights, path)
    return model


def read_backbone(path: Path) -> dict[str, Tensor]:
    """The backbone's weights under the names of transformers' ``Dinov2Model``, position embeddings at full size.

    Raises InputError unless every initializer that the backbone reads is placed exactly once.
    """
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf's DecodeError is not a public class
        raise InputError(f"{path}: not an ONNX file: {error}") from None
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = backbone_nodes(graph, path)
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    weights: dict[str, NDArray[np.float32]] = {}
    used: Counter[str] = Counter()

    def place(source: str, target: str, array: NDArray[np.float32]) -> None:
        if target in weights:
            raise InputError(f"{path}: two initializers for {target}; one of them is {source}")
        weights[target] = array
        used[source] += 1

    for node in nodes:
        for name in node.input:
            if name in arrays and name.startswith(_PREFIX):
                place(name, _renamed(name), arrays[name])
        if node.op_type == "MatMul" and node.input[1] in arrays:
            bias = _added_bias(consumers.get(node.output[0], []), arrays)
            if bias is not None:
                place(node.input[1], _renamed(bias.removesuffix("bias") + "weight"), arrays[node.input[1]].T)
    patches, class_position = _position_initializers(nodes, consumers, arrays, path)
    place(patches, _POSITIONS, np.concatenate([arrays[class_position], arrays[patches]], axis=1))
    used[class_position] += 1
    read = {name for node in nodes for name in node.input if name in arrays}
    wrong = sorted(name for name in read if used[name] != 1)
    if wrong:
        raise InputError(f"{path}: weights of the backbone without a single place in DINOv2: {', '.join(wrong)}")
    return {name: torch.from_numpy(array.astype(np.float32, order="C")) for name, array in weights.items()}


def backbone_output(graph: onnx.GraphProto, path: Path) -> str:
    """Name of the tensor after the backbone's last layer norm, float32 [B, 1 + patches, d]."""
    for node in graph.node:
        if node.op_type == "Add" and _LAST_BIAS in node.input:
            return node.output[0]
    raise InputError(f"{path}: no DINOv2 backbone in this ONNX file (nothing adds {_LAST_BIAS})")


def backbone_nodes(graph: onnx.GraphProto, path: Path) -> list[onnx.NodeProto]:
    """The nodes that the backbone's output depends on, in the order of the graph."""
    needed = {backbone_output(graph, path)}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    return nodes[::-1]


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, 1 + n², d] for a grid of ``grid`` x ``grid`` patches, [1, 1 + grid², d].

    Bicubic to the given size without antialiasing, as the ONNX file does (its ``Resize`` takes sizes, cubic with
    a = -0.75, half-pixel centres) and transformers too. Raises InputError where the grid is not square.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1:
        raise InputError(f"{positions.shape[1] - 1} position embeddings of patches are no square of them")
    patches = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def _patch_size(weights: dict[str, Tensor], path: Path) -> int:
    """Side of the square patches of RGB images that the backbone reads. Raises InputError where it reads others, or
    lacks a weight that tells a size."""
    absent = [name for name in (_PATCHES, _CLASS_TOKEN, _POSITIONS, _FIRST_HIDDEN) if name not in weights]
    if absent:
        raise InputError(f"{path}: weights missing: {', '.join(absent)}")
    shape = list(weights[_PATCHES].shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise InputError(
            f"{path}: the patch embedding has shape {shape}; images are read as RGB and cut into square "
            "patches, [width, 3, patch, patch]"
        )
    return int(shape[3])


def _renamed(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def _added_bias(consumers: list[onnx.NodeProto], arrays: dict[str, NDArray[np.float32]]) -> str | None:
    """The named bias that the only consumer of a product adds to it."""
    if len(consumers) != 1 or consumers[0].op_type != "Add":
        return None
    named = [name for name in consumers[0].input if name in arrays and name.endswith(".bias")]
    return named[0] if named else None


def _position_initializers(
    nodes: list[onnx.NodeProto],
    consumers: dict[str, list[onnx.NodeProto]],
    arrays: dict[str, NDArray[np.float32]],
    path: Path,
) -> tuple[str, str]:
    """Initializers with the patch positions [1, n², d] and the class position [1, 1, d]."""
    producers = {name: node for node in nodes for name in node.output}
    for resize in (node for node in nodes if node.op_type == "Resize"):
        source = resize.input[0]
        while source in producers and producers[source].op_type in ("Cast", "Transpose", "Reshape"):
            source = producers[source].input[0]
        result = resize
        while result.op_type != "Concat" and len(consumers.get(result.output[0], [])) == 1:
            result = consumers[result.output[0]][0]
        beside = [name for name in result.input if name in arrays]
        if source in arrays and len(beside) == 1:
            return source, beside[0]
    raise InputError(f"{path}: no position embeddings: no Resize of an initializer that is then joined to another")


def _config(weights: dict[str, Tensor], image_size: int, patch: int, labels: int) -> Dinov2Config:
    width = weights[_CLASS_TOKEN].shape[-1]
    layers = {int(found[1]) for name in weights if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // _HEAD_CHANNELS,
        mlp_ratio=weights[_FIRST_HIDDEN].shape[0] // width,
        image_size=image_size,
        patch_size=patch,
        use_mask_token=False,  # only pre-training reads it, so the ONNX file does not have it
        num_labels=labels,
    )


def _fill(model: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        differing = sorted(set(expected) ^ set(found) | {n for n in expected if n in found and expected[n] != found[n]})
        raise InputError(f"{path}: weights missing, left over or of another shape: {', '.join(differing)}")
    model.load_state_dict(weights)
