"""From a dense model to one with factorized MLPs and back: building, saving and loading factors by name.

Names of factors: ``group_G.basis`` and ``block_B.LINEAR``. The dense baseline has no bases.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.compression.calibrate import open_activations, second_moment
from pipeline.compression.factorize import finish_factors, first_projection, output_aware_basis, svd_factors
from pipeline.compression.factorized_mlp import FactorizedMLP, dense_columns, original_mlp
from pipeline.compression.moments import MLPMoments, group_moments
from pipeline.plumbing.files import write_aside
from pipeline.recipe.plan import GroupPlan
from pipeline.recipe.schema import Recipe
from qat.factor import Factor


def initial_factors(
    recipe: Recipe, model: nn.Module, group: GroupPlan, calibration: Path
) -> tuple[list[FactorizedMLP], Tensor]:
    """Factorize a group (:func:`factorize_group`) as ``compression.initialization`` of a recipe says, before any
    sparsity."""
    compression = recipe.compression
    return factorize_group(
        model,
        group,
        calibration=None if compression.initialization == "svd" else calibration,
        masked=compression.is_masked,
        seed=recipe.seed,
        output_aware=compression.initialization == "output_aware",
    )


def factorize_group(
    model: nn.Module,
    group: GroupPlan,
    *,
    calibration: Path | None,
    masked: bool,
    seed: int,
    output_aware: bool = False,
) -> tuple[list[FactorizedMLP], Tensor]:
    """The MLPs of a group, factorized, and the singular values [d] of their concatenated matrices W.

    A group without a basis keeps its matrices as they are. ``calibration``: folder of recorded activations, which
    then weight the SVD; or, ``output_aware``, say how much the errors of each matrix count in the MLPs' outputs.
    ``masked``: give the projections masks (all true) for a sparsifier to work on.
    """
    W = torch.cat([dense_columns(model.get_submodule(site.path), site) for site in group.sites], dim=1)
    if not group.has_basis:
        return _originals(model, group), torch.linalg.svdvals(W)
    activations = {}
    if calibration is not None:
        activations = {site.block: open_activations(calibration, site) for site in group.sites}
    if output_aware:
        U, V = _output_aware_factors(model, group, group_moments(model, group, activations), seed + group.index)
    else:
        moment = second_moment(list(activations.values())) if activations else None
        U, V = svd_factors(W, group.rank, seed=seed + group.index, second_moment=moment)
    return _assemble(model, group, U, V, masked), torch.linalg.svdvals(W)


def _output_aware_factors(
    model: nn.Module, group: GroupPlan, moments: Mapping[int, MLPMoments], seed: int
) -> tuple[Tensor, Tensor]:
    """U and V of a group by the errors of the MLPs' outputs."""
    H = torch.stack([moments[site.block].input for site in group.sites]).double().mean(dim=0)
    G, K = torch.zeros_like(H), torch.zeros_like(H)
    for site in group.sites:
        K += moments[site.block].output
        for name in site.first:
            W = model.get_submodule(site.path).get_parameter(f"{name}.weight").detach().double()
            G += W.T @ (moments[site.block].sensitivity[name].double()[:, None] * W)
    U = output_aware_basis(H, G, K, group.rank)
    parts = []
    for site in group.sites:
        mlp = model.get_submodule(site.path)
        for name in site.first:
            W = mlp.get_parameter(f"{name}.weight").detach().T
            parts.append(first_projection(U, moments[site.block].input, W))
        parts.append(U.T @ mlp.get_parameter(f"{site.last}.weight").detach().double())
    return finish_factors(U, torch.cat(parts, dim=1), group.rank, seed=seed)


def restore_group(model: nn.Module, group: GroupPlan, path: Path, *, masked: bool) -> list[FactorizedMLP]:
    """The MLPs of a group with the factors saved at ``path``; the rest of them is the dense ``model``'s."""
    mlps = empty_group(model, group, masked=masked)
    load_factors(mlps, path)
    return mlps


def empty_group(model: nn.Module, group: GroupPlan, *, masked: bool) -> list[FactorizedMLP]:
    """The MLPs of a group with factors of the right shapes, whose values are still to be loaded."""
    if not group.has_basis:
        return _originals(model, group)
    return _assemble(
        model, group, torch.zeros(group.width, group.rank), torch.zeros(group.rank, group.columns), masked
    )


def _originals(model: nn.Module, group: GroupPlan) -> list[FactorizedMLP]:
    return [original_mlp(model.get_submodule(site.path), site, group.name) for site in group.sites]


def _assemble(model: nn.Module, group: GroupPlan, U: Tensor, V: Tensor, masked: bool) -> list[FactorizedMLP]:
    basis = Factor(U.T)
    mlps, start = [], 0
    for site in group.sites:
        projections = {}
        for name in site.linears:
            part = V[:, start : start + site.hidden]
            start += site.hidden
            matrix = part if name == site.last else part.T
            mask = torch.ones(matrix.shape, dtype=torch.bool) if masked else None
            projections[name] = Factor(matrix, mask)
        mlps.append(FactorizedMLP(site, group.name, model.get_submodule(site.path), basis, projections))
    return mlps


def install(model: nn.Module, mlps: Sequence[FactorizedMLP]) -> nn.Module:
    """The dense model, frozen, with the given MLPs in place of its own (the MLPs themselves, not copies).

    ``model`` stays as it is; the result shares its weights, which are held once however many forms there are.
    """
    tensors = [*model.parameters(), *model.buffers()]
    shared: dict[int, object] = {id(tensor): tensor for tensor in tensors}
    for mlp in mlps:
        shared[id(model.get_submodule(mlp.site.path))] = mlp
    trained = {id(parameter) for mlp in mlps for parameter in mlp.parameters()}
    compressed = copy.deepcopy(model, shared)
    for parameter in compressed.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    return compressed


def named_factors(mlps: Sequence[FactorizedMLP]) -> dict[str, Factor]:
    """All factors by name, the basis of each group once.

    Asserted: the basis is one module in all MLPs of its group, and no other weight is in two places.
    """
    factors: dict[str, Factor] = {}
    for mlp in mlps:
        if mlp.basis is not None and factors.setdefault(mlp.basis_name, mlp.basis) is not mlp.basis:
            raise AssertionError(f"the MLPs of {mlp.group} hold different bases")
        for name, projection in mlp.named_projections():
            key = mlp.factor_name(name)
            if key in factors:
                raise AssertionError(f"two factors are called {key}")
            factors[key] = projection
    owners: dict[int, str] = {}
    for name, factor in factors.items():
        owner = owners.setdefault(id(factor.weight), name)
        if owner != name:
            raise AssertionError(f"{owner} and {name} are one weight")
    return factors


def save_factors(mlps: Sequence[FactorizedMLP], path: Path) -> None:
    """Write weights, gains and masks of all factors, the shared bases once (safetensors)."""
    tensors = {}
    for name, factor in named_factors(mlps).items():
        for key, value in factor.state_dict().items():
            tensors[f"{name}/{key}"] = value.contiguous()
    write_aside(path, lambda temporary: save_file(tensors, temporary))


def load_factors(mlps: Sequence[FactorizedMLP], path: Path) -> None:
    """Read what :func:`save_factors` has written into factors of the same names and shapes."""
    tensors = load_file(path)
    for name, factor in named_factors(mlps).items():
        prefix = f"{name}/"
        factor.load_state_dict({key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)})


def kept_values(mlps: Sequence[FactorizedMLP]) -> int:
    """Count the values that the factors keep: bases, and unmasked entries of the projections."""
    factors = named_factors(mlps).values()
    return sum(factor.weight.numel() if factor.mask is None else int(factor.mask.sum()) for factor in factors)
