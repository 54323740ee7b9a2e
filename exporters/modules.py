"""Torch modules of packed weights: of the MLPs, and of linear layers, token table and output layer around them.

In PyTorch they compute with the dequantized float32 weights: this is the reference for everything that runs the stored
numbers. :func:`torch.onnx.export` makes of them nodes of domain ``ai.fips`` whose inputs are the packed bytes.
"""

import copy
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.packed_model import BASES, PackedLinear, PackedMLP, PackedModel
from exporters.packed_rest import PackedTable
from fips_ort.ops import DOMAIN, VERSION, node_attributes, op_type
from fips_ort.packed import PackedWeight, dequantize
from fips_ort.row_order import stored_rows

NODE_NAME = "fips.name"
"""Key of the node metadata that holds the name a node is to get (see :func:`exporters.passes.name_nodes`)."""


def token_layers(model: Any) -> tuple[Any, Any]:
    """The token table and the output layer of a language model; (None, None) for other models."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return (None, None) if head is None else (model.get_input_embeddings(), head)


class PackedMatrix(nn.Module):
    """A packed matrix S [rows, columns]: ``codes``, ``pattern`` (unless dense) and ``scales`` as buffers.

    ``row_bits`` (uint8 [rows], or None): bits of each output of ``x @ S.T`` where rows are stored in another order than
    outputs have (:mod:`fips_ort.row_order`). ``values`` float32 [rows, columns] are in the order of the outputs.
    """

    codes: Tensor
    pattern: Tensor | None
    scales: Tensor
    row_bits: Tensor | None
    values: Tensor

    def __init__(
        self, weight: PackedWeight, accuracy_level: int = 0, row_bits: NDArray[np.uint8] | None = None
    ) -> None:
        super().__init__()
        self.layout = weight.layout
        self.accuracy_level = accuracy_level
        values = dequantize(weight)
        self.register_buffer("codes", torch.from_numpy(weight.codes.copy()))
        self.register_buffer("pattern", torch.from_numpy(weight.pattern.copy()) if weight.pattern.size else None)
        self.register_buffer("scales", torch.from_numpy(weight.scales.copy()))
        self.register_buffer("row_bits", None if row_bits is None else torch.from_numpy(row_bits.copy()))
        values = values if row_bits is None else values[stored_rows(row_bits, weight.layout)]
        self.register_buffer("values", torch.from_numpy(values), persistent=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the module but not its tensors, which take gigabytes in a large model and never change."""
        memo |= {id(tensor): tensor for tensor in self.buffers(recurse=False)}
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result

    @property
    def stored(self) -> PackedWeight:
        """What is stored, in the order in which it is."""
        pattern = np.zeros(0, np.uint8) if self.pattern is None else self.pattern.numpy()
        return PackedWeight(self.layout, self.codes.numpy(), pattern, self.scales.numpy())

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


class PackedLayer(PackedProjection):
    """A linear layer outside the MLPs. ``name``: its path in the model, which becomes the name of the node;
    ``in_features``: without what fills up the last block of a row."""

    def __init__(self, linear: PackedLinear, in_features: int, name: str, accuracy_level: int = 0) -> None:
        super().__init__(linear, accuracy_level)
        self.in_features, self.out_features, self.name = in_features, linear.weight.layout.rows, name

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in_features] → float32 [..., out_features]."""
        return self.matmul(x, trans_b=True, bias=self.bias, name=self.name)


class PackedEmbedding(PackedMatrix):
    """A token table, one row a token. ``width``: features of a row, without what fills up its last block.
    ``embed_scale``: float32 scalar that rows are multiplied with (Gemma), or None."""

    embed_scale: Tensor | None

    def __init__(self, table: PackedTable, width: int, embed_scale: Tensor | None, accuracy_level: int = 0) -> None:
        super().__init__(table.weight, accuracy_level, table.row_bits)
        self.width = width
        scale = None if embed_scale is None else embed_scale.detach().float().clone()
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [...] → float32 [..., width]."""
        rows = nn.functional.embedding(input_ids, self.values)[..., : self.width]
        return rows if self.embed_scale is None else rows * self.embed_scale


class PackedOutput(nn.Module):
    """The output layer of a language model: it multiplies with a table whose rows are tokens, its own or, tied, the one
    that tokens are looked up in. ``bias`` float32 [tokens], or None. ``name``: its path in the model.

    A tied ``table`` is only referred to here, so that it has one name in the state dict and in the exported graph.
    """

    bias: Tensor | None

    def __init__(self, table: PackedMatrix, in_features: int, bias: Tensor | None, name: str, *, tied: bool) -> None:
        super().__init__()
        self._table = (table,)
        if not tied:
            self.add_module("table", table)
        self.in_features, self.out_features, self.name = in_features, table.layout.rows, name
        self.register_buffer("bias", bias)

    @property
    def matrix(self) -> PackedMatrix:
        """The table that is multiplied with."""
        return self._table[0]

    @property
    def values(self) -> Tensor:
        """Rows of the table as the layer computes with them: float32 [tokens, in_features]."""
        return self.matrix.values[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in_features] → logits float32 [..., tokens]."""
        return nn.functional.linear(x, self.values, self.bias)


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
