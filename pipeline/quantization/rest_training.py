"""Training of what surrounds the factors: vectors (norms, layer scales) and the scales of packed linear layers.

Only these numbers move: codes and biases of packed layers stay as they are stored, and so do the token table and the
output layer. Scales alone are what EfficientQAT (arXiv 2407.11062, its second phase) trains end to end, too.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from exporters.modules import PackedLayer, token_layers
from exporters.packed_model import PackedLinear
from fips_ort.packed import unpack
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import install
from pipeline.plumbing.files import write_aside

_SCALES = "/scales"


class TrainedScales(nn.Module):
    """A packed linear layer as it is trained: ``scale = float16(stored scale * exp(log_gain))``, as of the factors.

    ``log_gain`` float32 [N, blocks] is the parameter; the levels int8 [N, blocks * block_size], those that fill up the
    last block included, and the bias are fixed.
    """

    levels: Tensor
    stored_scales: Tensor
    bias: Tensor | None

    def __init__(self, layer: PackedLayer) -> None:
        super().__init__()
        self.layout, self.in_features = layer.layout, layer.in_features
        levels, scales, _ = unpack(layer.stored)
        self.register_buffer("levels", torch.from_numpy(levels), persistent=False)
        self.register_buffer("stored_scales", torch.from_numpy(scales.astype(np.float32)), persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)
        self.log_gain = nn.Parameter(torch.zeros_like(self.stored_scales))

    def scale(self) -> Tensor:
        """Current scales: float32 [N, blocks], each exactly a float16 number; straight-through gradient."""
        scale = self.stored_scales * self.log_gain.exp()
        return scale + (scale.half().float() - scale).detach()

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., K] → float32 [..., N]."""
        blocks = self.levels.view(len(self.levels), -1, self.layout.block_size) + 0.5 * self.layout.midrise
        weight = (blocks * self.scale()[..., None]).view(self.levels.shape)
        return F.linear(x, weight[:, : self.in_features], self.bias)


class _InUnits(nn.Module):
    """A vector in units of its root mean square at the start, so that one learning rate suits all."""

    unit: Tensor

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        size = vector.detach().square().mean().sqrt()
        self.register_buffer("unit", torch.where(size > 0, size, torch.ones_like(size)), persistent=False)

    def forward(self, original: Tensor) -> Tensor:
        return original * self.unit

    def right_inverse(self, vector: Tensor) -> Tensor:
        return vector / self.unit


def _original(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter from which a parametrized one is computed."""
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    original = parametrizations[name].original
    assert isinstance(original, nn.Parameter)
    return original


class TrainableRest(nn.Module):
    """The parameters outside the MLPs that are trained; made by :func:`make_rest_trainable`."""

    def __init__(self, layers: dict[str, TrainedScales], vectors: dict[str, tuple[nn.Module, str]]) -> None:
        super().__init__()
        self._layers, self._vectors = layers, vectors
        self.layers = nn.ModuleList(layers.values())
        self.vectors = nn.ParameterList(_original(module, name) for module, name in vectors.values())

    def state(self) -> dict[str, Tensor]:
        """Tensors to store, float32: ``NAME/scales`` of layers, and vectors under their parameters' names."""
        scales = {f"{name}{_SCALES}": layer.scale() for name, layer in self._layers.items()}
        vectors = {name: getattr(module, attribute) for name, (module, attribute) in self._vectors.items()}
        return {name: tensor.detach().clone().contiguous() for name, tensor in (scales | vectors).items()}


def make_rest_trainable(model: nn.Module, mlps: Collection[FactorizedMLP]) -> TrainableRest:
    """Make vectors and the scales of packed linear layers of ``model`` trainable, in place.

    ``model``: of :func:`pipeline.compression.factors.install`, with ``mlps`` in it, whose own vectors are left
    alone, and so is the output layer. Tensors that ``model`` shares with other models are copied, never changed.
    """
    inside = {id(module) for mlp in mlps for module in mlp.modules()}
    inside.add(id(token_layers(model)[1]))
    layers, vectors = {}, {}
    for path, module in list(model.named_modules()):
        if id(module) in inside:
            continue
        if isinstance(module, PackedLayer):
            layers[path] = TrainedScales(module)
            model.set_submodule(path, layers[path])
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 1:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
                parametrize.register_parametrization(module, name, _InUnits(parameter))
                vectors[f"{path}.{name}"] = (module, name)
    return TrainableRest(layers, vectors)


def save_rest(rest: TrainableRest, path: Path) -> None:
    """Write what :func:`open_trained_rest` reads (safetensors)."""
    write_aside(path, lambda temporary: save_file(rest.state(), temporary))


@torch.no_grad()
def open_trained_rest(base: nn.Module, path: Path, *, float16: bool) -> nn.Module:
    """A copy of ``base`` with the scales and vectors saved at ``path``; it shares everything else.

    ``float16``: vectors are stored in that type, and rounded to it here.
    """
    model = install(base, [])
    for name, tensor in load_file(path).items():
        if name.endswith(_SCALES):
            layer_path = name.removesuffix(_SCALES)
            layer = model.get_submodule(layer_path)
            assert isinstance(layer, PackedLayer)
            weight = replace(layer.stored, scales=tensor.numpy().astype(np.float16))
            linear = PackedLinear(weight, None if layer.bias is None else layer.bias.numpy())
            stored = PackedLayer(linear, layer.in_features, layer.name, layer.accuracy_level)
            model.set_submodule(layer_path, stored.train(layer.training))
        else:
            owner, _, attribute = name.rpartition(".")
            value = tensor.half().float() if float16 else tensor
            setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    return model
