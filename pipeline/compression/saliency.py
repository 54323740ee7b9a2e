"""How much entries of the projections contribute to the outputs of their MLPs, from second moments of activations."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.moments import MLPMoments


@torch.no_grad()
def projection_importances(mlps: Sequence[FactorizedMLP], moments: Mapping[int, MLPMoments]) -> list[Tensor]:
    """For every projection, in the order of the MLPs and their linears: a factor for each entry's magnitude, broadcast
    to its shape, so that the square of the product is the entry's share of the projection's output energy.

    An entry of a first projection is multiplied with one component of ``t = x U``; an entry of the last with one
    hidden activation, then with one basis vector. Activations count as uncorrelated, as in Wanda (arXiv 2306.11695).
    ``moments``: of the blocks.
    """
    importances = []
    for mlp in mlps:
        assert mlp.basis is not None
        basis = mlp.basis()
        moment = moments[mlp.site.block]
        components = ((basis @ moment.input) * basis).sum(dim=1).clamp(min=0.0).sqrt()
        lengths, hidden = basis.square().sum(dim=1).sqrt(), moment.hidden_energy.sqrt()
        for name, projection in mlp.named_projections():
            last = name == mlp.site.last
            importance = lengths[:, None] * hidden[None, :] if last else components[None, :]
            norm = float((projection() * importance).square().sum().sqrt())
            importances.append(importance / (norm or 1.0))
    return importances
