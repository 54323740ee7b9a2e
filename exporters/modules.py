"""Torch modules of packed weights.

In PyTorch they compute with the dequantized float32 weights: this is the reference for everything that runs the stored
numbers. :func:`torch.onnx.export` makes of them nodes of domain ``ai.fips`` whose inputs are the packed bytes.
"""

import copy

import torch
from torch import Tensor, nn

from exporters.packed_model import BASES, PackedLinear, PackedMLP, PackedModel
from fips_ort.ops import DOMAIN, VERSION, node_attributes, op_type
from fips_ort.packed import PackedWeight, dequantize

NODE_NAME = "fips.name"
"""Key of the node metadata that holds the name a node is to get (see :func:`exporters.passes.name_nodes`)."""


class PackedMatrix(nn.Module):
    """A packed matrix S [rows, columns]: ``codes``, ``pattern`` (unless dense) and ``scales`` as buffers."""

    codes: Tensor
    pattern: Tensor | None
    scales: Tensor
    values: Tensor

    def __init__(self, weight: PackedWeight, accuracy_level: int = 0) -> None:
        super().__init__()
        self.layout = weight.layout
        self.accuracy_level = accuracy_level
        self.register_buffer("codes", torch.from_numpy(weight.codes.copy()))
        self.register_buffer("pattern", torch.from_numpy(weight.pattern.copy()) if weight.pattern.size else None)
        self.register_buffer("scales", torch.from_numpy(weight.scales.copy()))
        self.register_buffer("values", torch.from_numpy(dequantize(weight)), persistent=False)

    def filling(self, features: int) -> int:
        """How many columns fill up the last block of rows of ``features`` values."""
        return self.layout.columns - features

    def matmul(self, x: Tensor, *, trans_b: bool, bias: Tensor | None, name: str) -> Tensor:
        """``x @ S.T`` (``trans_b``) or ``x @ S``, plus ``bias``; ``name`` is given to the exported node. ``x`` may have
        less features than S.T reads, where the last block is filled up."""
        if trans_b and self.filling(x.shape[-1]):
            x = nn.functional.pad(x, (0, self.filling(x.shape[-1])))
        if not torch.onnx.is_in_onnx_export():
            return nn.functional.linear(x, self.values if trans_b else self.values.T, bias)
        stored = (self.codes, self.scales) if self.pattern is None else (self.codes, self.pattern, self.scales)
        attributes = node_attributes(self.layout, trans_b, self.accuracy_level)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{op_type(self.layout)}",
            (x, *stored, bias),
            {**attributes},
            dtype=x.dtype,
            shape=(*x.shape[:-1], attributes["N"]),
            version=VERSION,
            metadata_props={NODE_NAME: name},
        )


class PackedProjection(PackedMatrix):
    """A projection, or a whole matrix, with the bias of its linear layer."""

    bias: Tensor | None

    def __init__(self, linear: PackedLinear, accuracy_level: int = 0) -> None:
        super().__init__(linear.weight, accuracy_level)
        self.register_buffer("bias", None if linear.bias is None else torch.from_numpy(linear.bias.copy()))


class PackedMLPModule(nn.Module):
    """An MLP of packed weights: ``t = x U``; ``a = act(first(t))`` or ``act(gate(t)) * up(t)``; ``last(a) U + b``.

    ``basis`` is shared with the other MLPs of the group. It is registered once, in the model, and only
    referred to here, so that it has one name in the state dict and in the exported graph. Without one, ``t = x``
    and the output is ``last(a) + b``.
    """

    def __init__(
        self, mlp: PackedMLP, basis: PackedMatrix | None, activation: nn.Module, accuracy_level: int = 0
    ) -> None:
        super().__init__()
        self.path = mlp.path
        self._basis = (basis,)
        self._first = tuple(mlp.first)
        self._last = mlp.last[0]
        self._activation = mlp.activation
        self.add_module(mlp.activation, activation)
        for child, linear in mlp.linears.items():
            self.add_module(child, PackedProjection(linear, accuracy_level))

    @property
    def basis(self) -> PackedMatrix | None:
        """The shared basis U, stored as U.T [rank, d]."""
        return self._basis[0]

    @property
    def output_node(self) -> str:
        """Name of the graph node that computes the MLP's output."""
        return linear_node(self.path, self._last) if self.basis is None else output_node(self.path)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """float32 [..., d] → float32 [..., d]."""
        basis, t = self.basis, hidden_states
        if basis is not None:
            t = basis.matmul(hidden_states, trans_b=True, bias=None, name=input_node(self.path))
        activated = self.get_submodule(self._activation)(self._project(self._first[0], t))
        if len(self._first) == 2:
            activated = activated * self._project(self._first[1], t)
        if basis is None:
            return self._project(self._last, activated)
        last = self._projection(self._last)
        reduced = last.matmul(activated, trans_b=True, bias=None, name=linear_node(self.path, self._last))
        output = basis.matmul(reduced, trans_b=False, bias=last.bias, name=output_node(self.path))
        features = hidden_states.shape[-1]
        return output[..., :features] if basis.filling(features) else output

    def _project(self, child: str, t: Tensor) -> Tensor:
        projection = self._projection(child)
        return projection.matmul(t, trans_b=True, bias=projection.bias, name=linear_node(self.path, child))

    def _projection(self, child: str) -> PackedProjection:
        projection = self.get_submodule(child)
        assert isinstance(projection, PackedProjection)
        return projection


def input_node(path: str) -> str:
    """Name of the graph node of the MLP at ``path`` that multiplies its input with the shared basis."""
    return f"{path}/basis_in"


def linear_node(path: str, child: str) -> str:
    """Name of the graph node of a projection, or of a whole matrix."""
    return f"{path}/{child}"


def output_node(path: str) -> str:
    """Name of the graph node of the MLP at ``path`` that multiplies its last projection's output with the basis."""
    return f"{path}/basis_out"


def install_packed(model: nn.Module, packed: PackedModel, accuracy_level: int = 0) -> nn.Module:
    """A copy of ``model`` whose MLPs are those of ``packed``, with one module per shared basis.

    Raises ValueError if a path leads to no module, or its children are not the packed ones.
    """
    paths = {mlp.path for mlp in packed.mlps}
    modules = dict(model.named_modules())
    missing = sorted(paths - modules.keys())
    if missing:
        raise ValueError(f"the model has no module {', '.join(missing)}")
    for mlp in packed.mlps:
        children = {name for name, _ in modules[mlp.path].named_children()}
        expected = {*mlp.linears, mlp.activation}
        if children != expected:
            raise ValueError(f"{mlp.path}: the model's MLP has {sorted(children)}, the packed one {sorted(expected)}")
    # The dense MLPs are replaced while copying, not after it, so that they are never held twice.
    bases = nn.ModuleDict({name: PackedMatrix(weight, accuracy_level) for name, weight in packed.bases.items()})
    replaced: dict[int, object] = {}
    for mlp in packed.mlps:
        original = modules[mlp.path]
        basis = None if mlp.basis is None else bases[mlp.basis]
        assert basis is None or isinstance(basis, PackedMatrix)
        activation = copy.deepcopy(original.get_submodule(mlp.activation))
        replaced[id(original)] = PackedMLPModule(mlp, basis, activation, accuracy_level).train(model.training)
    result = copy.deepcopy(model, replaced)
    if bases:
        result.add_module(BASES, bases.train(model.training))
    return result
