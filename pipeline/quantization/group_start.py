"""Starting codes of a group from second moments: GPTQ on one factor after another, each making up for those before.

Order: the shared basis; then, MLP by MLP, the first projections for the inputs as the quantized basis passes them on;
then the last projection for the activations as the quantized first ones make them, towards the dense outputs (as in
GPTAQ, arXiv 2504.02692). Between these steps V is adapted by least squares. The dense baseline is the same without
a basis.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fips_ort.layout import Layout
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.moments import MLPMoments, hidden_moments, reduced_energy
from qat.damping import damped

ACTIVATION_DAMPING = 0.01
"""Damping of least squares on moments of the activations, as in GPTQ."""
INPUT_DAMPING = 1e-4
"""Damping of least squares on moments of what the quantized basis passes on."""
BASIS_DAMPING = 1e-6
"""Damping of products of the basis with itself, singular where it has more entries than the model dimension."""


@torch.no_grad()
def prepare_with_gptq(
    mlps: Sequence[FactorizedMLP],
    moments: Mapping[int, MLPMoments],
    layouts: Mapping[str, Layout],
    *,
    learned_scales: bool,
) -> None:
    """Prepare all factors of a group.

    ``moments``: by block. ``layouts``: by the names of :func:`pipeline.compression.factors.named_factors`. Memory
    beside the factors: the second moment of one MLP's hidden activations, n² numbers, in float64 a few times over.
    """
    before = None if mlps[0].basis is None else mlps[0].basis().double()
    if mlps[0].basis is not None:
        layout = layouts[mlps[0].basis_name]
        mlps[0].basis.prepare(layout, learned_scales=learned_scales, moment=_basis_moment(mlps, moments))
    for mlp in mlps:
        _prepare_first(mlp, moments[mlp.site.block], before, layouts, learned_scales)
        _prepare_last(mlp, moments[mlp.site.block], before, layouts, learned_scales)


def _basis_moment(mlps: Sequence[FactorizedMLP], moments: Mapping[int, MLPMoments]) -> Tensor:
    """Moment by which errors in the basis vectors count: float64 [d, d].

    It reads x for the first projections, where its errors count by the second moment of x; and it writes y, where
    they all count alike. Both are summed, weighted by how much of the outputs passes through on each way.
    """
    H = torch.stack([moments[mlp.site.block].input.double() for mlp in mlps]).mean(dim=0)
    reads = writes = 0.0
    for mlp in mlps:
        part = moments[mlp.site.block]
        for name in mlp.site.first:
            squares = mlp.projection(name)().double().square().sum(dim=1)
            reads += float(part.sensitivity[name].double() @ squares)
        writes += float(reduced_energy(mlp, part.activations).sum()) / part.output_energy
    return reads * H + writes * torch.eye(H.shape[0], dtype=H.dtype)


def _prepare_first(
    mlp: FactorizedMLP, moments: MLPMoments, before: Tensor | None, layouts: Mapping[str, Layout], learned_scales: bool
) -> None:
    """Prepare the first projections; ``before``: the basis before it was quantized."""
    H = moments.input.double()
    for name in mlp.site.first:
        projection = mlp.projection(name)
        target, moment = projection().double(), H
        if before is not None and mlp.basis is not None:
            after = mlp.basis().double()
            moment = after @ H @ after.T
            lost = target @ (before - after) @ H @ after.T
            target = target + torch.linalg.solve(damped(moment, INPUT_DAMPING), lost.T).T
        layout = layouts[mlp.factor_name(name)]
        projection.prepare(layout, learned_scales=learned_scales, moment=moment, target=target.float())


def _prepare_last(
    mlp: FactorizedMLP, moments: MLPMoments, before: Tensor | None, layouts: Mapping[str, Layout], learned_scales: bool
) -> None:
    """Prepare the last projection, behind first ones that are quantized."""
    projection = mlp.projection(mlp.site.last)
    target = projection().double()
    moment, cross = (part.double() for part in hidden_moments(mlp, moments.activations))
    if before is None or mlp.basis is None:
        lost = cross - target @ moment
    else:
        after = mlp.basis().double()
        gram = damped(after @ after.T, BASIS_DAMPING)
        target = target + torch.linalg.solve(gram, after @ ((before - after).T @ target))
        lost = torch.linalg.solve(gram, after @ (cross - after.T @ (target @ moment)))
    target = target + torch.linalg.solve(damped(moment, ACTIVATION_DAMPING), lost.T).T
    layout = layouts[mlp.factor_name(mlp.site.last)]
    projection.prepare(layout, learned_scales=learned_scales, moment=moment, target=target.float())
