"""Sparsification of the projections during the fit: GMP, RigL, static magnitude; bitmap or n:m patterns.

FiPS, section 3.2 and appendix. The algorithms act on masks only, between optimiser steps:

- static magnitude: the final mask at once, before the first step, and never again.
- GMP (Zhu & Gupta, arXiv 1710.01878): sparsity rises along ``s(t) = s_f + (s_0 - s_f)(1 - t)³``, smallest
  magnitudes go first and do not come back.
- RigL (Evci et al., arXiv 1911.11134): the final sparsity from the start; every update drops the smallest
  magnitudes and grows as many entries with the largest gradients, a fraction that decays by a cosine.

Magnitudes are those of the effective matrix (weight times gain), or its saliency: each entry's expected
contribution to the output, as Wanda (arXiv 2306.11695) weighs magnitudes by the norm of their inputs, here also by
that of the basis vector behind a last projection. With an n:m pattern the n largest of every
m neighbours along the contracted axis are never pruned, so that GMP ends exactly on the pattern; RigL swaps
the weakest kept entry of a group with its strongest other entry. The last group of a row may have less than m columns:
it counts as filled up with entries that go first.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fips_ort.layout import Pattern
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.moments import MLPMoments
from pipeline.compression.saliency import projection_importances
from pipeline.recipe.schema import Compression, Sparsifier
from qat.factor import Factor

_FILLING = -2.0
"""Magnitude of entries that are not there: they are dropped before all others, also those that a mask has dropped."""


def gmp_sparsity(progress: float, initial: float, final: float) -> float:
    """Cubic schedule of gradual magnitude pruning at ``progress`` in 0 … 1."""
    return final + (initial - final) * (1.0 - min(max(progress, 0.0), 1.0)) ** 3


def magnitude_masks(magnitudes: Sequence[Tensor], sparsity: float, pattern: Pattern, *, jointly: bool) -> list[Tensor]:
    """Masks that drop the smallest ``sparsity`` of the entries, of each tensor or of all together (``jointly``).

    ``magnitudes``: non-negative float [rows, columns] each; masked-out entries may be given as -1 so that they go
    first. With an n:m ``pattern``, the n largest of each group of m columns are kept in any case. Returns bool
    masks of the same shapes.
    """
    widths = [magnitude.shape[1] for magnitude in magnitudes]
    magnitudes = [_filled_groups(magnitude, pattern, _FILLING) for magnitude in magnitudes]
    scores = [_protect_n_of_m(m, pattern) if pattern.is_n_of_m else m for m in magnitudes]
    pools = [torch.cat([score.flatten() for score in scores])] if jointly else [score.flatten() for score in scores]
    flat_masks = []
    for pool in pools:
        drop = round(sparsity * pool.numel())
        mask = torch.ones(pool.numel(), dtype=torch.bool)
        # A stable order makes ties fall the same way on every run.
        mask[torch.sort(pool, stable=True).indices[:drop]] = False
        flat_masks.append(mask)
    if jointly:
        flat_masks = list(flat_masks[0].split([score.numel() for score in scores]))
    return [
        mask.reshape(score.shape)[:, :width] for mask, score, width in zip(flat_masks, scores, widths, strict=True)
    ]


def swap_masks(magnitude: Tensor, gradient: Tensor, mask: Tensor, fraction: float, pattern: Pattern) -> Tensor:
    """RigL's update of one mask: drop ``fraction`` of the kept entries, grow as many by ``|gradient|``.

    All arguments [rows, columns]. Returns the new mask with the same number of kept entries (with an n:m
    pattern: the same in every group).
    """
    if pattern.is_n_of_m:
        return _swap_n_of_m(magnitude, gradient, mask, fraction, pattern)
    count = min(round(fraction * int(mask.sum())), int((~mask).sum()))
    new = mask.flatten().clone()
    weakest = torch.where(new, magnitude.flatten(), torch.inf)
    strongest = torch.where(new, -torch.inf, gradient.abs().flatten())
    new[torch.sort(weakest, stable=True).indices[:count]] = False
    new[torch.sort(strongest, stable=True, descending=True).indices[:count]] = True
    return new.reshape(mask.shape)


class MaskSchedule:
    """Applies a sparsifier to the projections of one group while they are trained.

    ``before_step(step)`` is called before every optimiser step's forward pass and ``after_backward(step)`` after
    its backward pass. The masks live in the factors, so a checkpoint of the factors resumes the schedule.
    """

    def __init__(
        self,
        projections: Sequence[Factor],
        config: Sparsifier,
        pattern: Pattern,
        sparsity: float,
        steps: int,
        importances: Sequence[Tensor] | None = None,
    ) -> None:
        """Make a schedule. ``importances``: factors of the magnitudes, broadcast to the projections' shapes; ones if
        None."""
        self.projections = projections
        self.importances = importances or [torch.ones(())] * len(projections)
        self.config = config
        self.pattern = pattern
        self.sparsity = sparsity
        # Even the shortest run must reach the final sparsity before its last step.
        self.last_update = min(steps - 1, max(1, round(config.end * steps)))

    def before_step(self, step: int) -> None:
        gmp = self.config.algorithm == "gmp"
        if step == 0 and not gmp:
            self._prune(self.sparsity)
        elif gmp and self._is_update(step):
            progress = step / self.last_update if self.last_update else 1.0
            self._prune(gmp_sparsity(progress, self.config.initial_sparsity, self.sparsity))
        grows = self.config.algorithm == "rigl" and step > 0 and self._is_update(step)
        for projection in self.projections:
            projection.track_dense_gradient = grows

    def after_backward(self, step: int) -> None:
        if self.config.algorithm != "rigl" or step == 0 or not self._is_update(step):
            return
        fraction = 0.5 * self.config.drop_fraction * (1.0 + math.cos(math.pi * step / self.last_update))
        with torch.no_grad():
            for projection, importance in zip(self.projections, self.importances, strict=True):
                assert projection.mask is not None
                source = projection.dense_gradient_source
                assert source is not None
                assert source.grad is not None
                magnitude = _magnitude(projection) * importance
                new = swap_masks(magnitude, source.grad, projection.mask, fraction, self.pattern)
                # Grown entries start at zero, as in RigL.
                projection.weight.mul_(projection.mask & new)
                projection.mask.copy_(new)
                projection.dense_gradient_source = None

    def _is_update(self, step: int) -> bool:
        return step == self.last_update or (step < self.last_update and step % self.config.update_every == 0)

    def _prune(self, sparsity: float) -> None:
        with torch.no_grad():
            magnitudes = []
            for projection, importance in zip(self.projections, self.importances, strict=True):
                assert projection.mask is not None
                magnitudes.append(torch.where(projection.mask, _magnitude(projection) * importance, -1.0))
            jointly = self.config.ranking == "group"
            masks = magnitude_masks(magnitudes, sparsity, self.pattern, jointly=jointly)
            for projection, mask in zip(self.projections, masks, strict=True):
                assert projection.mask is not None
                projection.mask.copy_(mask)
                projection.weight.mul_(mask)


def mask_schedule(
    mlps: Sequence[FactorizedMLP],
    compression: Compression,
    steps: int,
    moments: Mapping[int, MLPMoments] | None = None,
) -> MaskSchedule:
    """The schedule of a recipe's section ``compression`` for the projections of a group, over ``steps`` of training.

    ``moments``: of the group's dense MLPs, by block; entries are ranked by their saliency then, else by magnitude.
    """
    return MaskSchedule(
        [projection for mlp in mlps for _, projection in mlp.named_projections()],
        compression.sparsifier,
        Pattern.parse(compression.pattern),
        compression.target_sparsity,
        steps,
        None if moments is None else projection_importances(mlps, moments),
    )


def _magnitude(projection: Factor) -> Tensor:
    return (projection.weight * projection.gain).abs()


def _protect_n_of_m(magnitude: Tensor, pattern: Pattern) -> Tensor:
    """Magnitudes with the n largest of every m columns raised above all others."""
    groups = magnitude.reshape(-1, pattern.of)
    order = torch.sort(groups, dim=1, descending=True, stable=True).indices
    protected = groups.clone()
    protected.scatter_(1, order[:, : pattern.keep], torch.inf)
    return protected.reshape(magnitude.shape)


def _swap_n_of_m(magnitude: Tensor, gradient: Tensor, mask: Tensor, fraction: float, pattern: Pattern) -> Tensor:
    groups = _filled_groups(mask, pattern, 0).reshape(-1, pattern.of)
    magnitudes = _filled_groups(magnitude, pattern, 0.0).reshape(groups.shape)
    gradients = _filled_groups(gradient.abs(), pattern, -torch.inf).reshape(groups.shape)
    weakest = torch.where(groups, magnitudes, torch.inf).min(dim=1)
    strongest = torch.where(groups, -torch.inf, gradients).max(dim=1)
    # At most one swap in a group at a time; the slice ends with the groups if the fraction asks for more.
    order = torch.sort(weakest.values, stable=True).indices
    # A last group that is not whole may keep all that it has.
    chosen = order[strongest.values[order] > -torch.inf][: round(fraction * int(mask.sum()))]
    new = groups.clone()
    new[chosen, weakest.indices[chosen]] = False
    new[chosen, strongest.indices[chosen]] = True
    return new.reshape(len(mask), -1)[:, : mask.shape[1]]


def _filled_groups(matrix: Tensor, pattern: Pattern, value: float) -> Tensor:
    """``matrix`` [rows, columns] with columns of ``value`` that fill up the last group of an n:m pattern."""
    return F.pad(matrix, (0, -matrix.shape[1] % pattern.of), value=value) if pattern.is_n_of_m else matrix
