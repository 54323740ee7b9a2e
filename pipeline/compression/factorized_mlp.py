"""The MLP of a transformer block with its matrices factorized over the basis shared by its group.

``first: y = (x U) V + b`` (fc1, or gate and up, which read the same ``x U``), ``last: y = U (V a) + b``. The dense
baseline is the same without U: its factors are the MLP's own matrices.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.recipe.plan import MLPSite
from qat.factor import Factor


class FactorizedMLP(nn.Module):
    """An MLP whose ``basis`` [rank, d] is one module shared by all MLPs of the ``group``, and whose projections are its
    own.

    ``projections`` maps the names of the replaced linears to factors: of a first linear [n, rank], of the last
    [rank, n]. Without a basis (None) they are [n, d] and [d, n]. Input and output: float32 [..., d].
    """

    basis: Factor | None
    activation: nn.Module

    def __init__(
        self, site: MLPSite, group: str, dense: nn.Module, basis: Factor | None, projections: Mapping[str, Factor]
    ) -> None:
        super().__init__()
        self.site = site
        self.group = group
        self.basis = basis
        self.projections = nn.ModuleDict(dict(projections))
        linears = {name: dense.get_submodule(name) for name in site.linears}
        self.biases = nn.ParameterDict(
            {name: copy.deepcopy(linear.bias) for name, linear in linears.items() if linear.bias is not None}
        )
        for bias in self.biases.values():
            bias.requires_grad_(False)
        self.activation = copy.deepcopy(dense.get_submodule(site.activation))

    def forward(self, x: Tensor) -> Tensor:
        basis = None if self.basis is None else self.basis()
        hidden = self.activate(self._first(x if basis is None else F.linear(x, basis)))
        y = F.linear(hidden, self.projection(self.site.last)())
        if basis is not None:
            y = y @ basis
        bias = self.bias(self.site.last)
        return y if bias is None else y + bias

    def pre_activations(self, x: Tensor) -> list[Tensor]:
        """Outputs of the first linears, [..., n] each."""
        return self._first(x if self.basis is None else F.linear(x, self.basis()))

    def activate(self, first: Sequence[Tensor]) -> Tensor:
        """Compute what the last linear reads, [..., n], from the outputs of the first ones."""
        hidden: Tensor = self.activation(first[0])
        return hidden * first[1] if len(first) == 2 else hidden

    def projection(self, name: str) -> Factor:
        """The factor that replaced the linear ``name``."""
        factor = self.projections[name]
        assert isinstance(factor, Factor)
        return factor

    def named_projections(self) -> Iterator[tuple[str, Factor]]:
        """Every projection with the name of the linear that it replaced, in the order of computation."""
        for name in self.site.linears:
            yield name, self.projection(name)

    def factor_name(self, name: str) -> str:
        """The name of the projection that replaced the linear ``name`` among all factors of a model."""
        return f"block_{self.site.block}.{name}"

    @property
    def basis_name(self) -> str:
        """The name of the group's basis among all factors of a model."""
        return f"{self.group}.basis"

    def rank_axis(self, name: str) -> int:
        """The axis of the projection ``name`` along the rank: 0 (rows) of the last one, 1 (columns) of a first."""
        return 0 if name == self.site.last else 1

    def _first(self, t: Tensor) -> list[Tensor]:
        return [F.linear(t, self.projection(name)(), self.bias(name)) for name in self.site.first]

    def bias(self, name: str) -> Tensor | None:
        """The bias of the linear ``name``, if it has one."""
        return self.biases.get(name)


def original_mlp(dense: nn.Module, site: MLPSite, group: str) -> FactorizedMLP:
    """An MLP without a basis, whose factors are the ``dense`` one's own matrices."""
    factors = {name: Factor(dense.get_parameter(f"{name}.weight").detach()) for name in site.linears}
    return FactorizedMLP(site, group, dense, None, factors)


def dense_columns(dense: nn.Module, site: MLPSite) -> Tensor:
    """The MLP's matrices with the model dimension as rows, side by side: float32 [d, N of this block]."""
    parts = [dense.get_parameter(f"{name}.weight").detach().T for name in site.first]
    parts.append(dense.get_parameter(f"{site.last}.weight").detach())
    return torch.cat(parts, dim=1)
