"""Starting codes that keep a linear layer's outputs, not its weights: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

For ``y = x Wᵀ`` with second moment ``H = E[xᵀx]``, the error of a row w rounded to q is ``(w-q) H (w-q)ᵀ``. GPTQ
rounds one column after another and lets the later ones make up for what the earlier ones lost. We compute it
without the inverse of H, in the form that QuIP (arXiv 2307.13304, section 4.2) proves equal: with ``H = R D Rᵀ``, R
unit upper triangular, the error is ``Σ_j D_j (w_j + Σ_{k<j} (w_k - q_k) R_kj - q_j)²``, so column j is best
rounded from the value in front of ``- q_j``. What we do differently:

- The scale of a block is searched when the block's turn comes, for the values it then has, its columns weighted by
  their D.
- Blocks go in the order of falling second moment, and so do the columns within one: the later a column, the less is
  left that could make up for it.
- Afterwards every entry in turn is moved to the level that is best given all others (coordinate descent, as in
  CDQuant, arXiv 2406.17542), which GPTQ's single pass cannot do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fips_ort.layout import Layout, padded_to_blocks
from qat.damping import damped
from qat.fake_quantize import CLIP_RATIOS, LARGEST_SCALE, SMALLEST_SCALE, half_of_levels
from qat.padding import layout_shape, padded, present


@torch.no_grad()
def gptq(
    weight: Tensor, moment: Tensor, layout: Layout, mask: Tensor | None = None, *, damping: float = 0.01,
    sweeps: int = 2,
) -> tuple[Tensor, Tensor]:
    """Levels for ``weight`` that minimise the error of its products with inputs of second moment ``moment``.

    ``weight`` float32 [rows, columns], contracted over the columns; ``moment`` [columns, columns], symmetric and
    non-negative, to whose diagonal ``damping`` of its mean is added; ``mask`` bool [rows, columns]: entries that stay
    zero, whatever ``weight`` has there. The last block of ``layout`` may have more columns than ``weight``, which
    are zero. Returns (values float32 [rows, columns], scales float32 [rows, blocks]); the scales are exactly float16
    values and every kept value is exactly a level of its scale. Raises ValueError for unfitting shapes or an indefinite
    or non-finite moment.
    """
    rows, columns = weight.shape
    fits = rows == layout.rows and padded_to_blocks(columns, layout.block_size) == layout.columns
    if not fits or moment.shape != (columns, columns):
        shape = layout_shape(layout)
        raise ValueError(f"weight {(rows, columns)} and moment {tuple(moment.shape)} do not fit layout {shape}")
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit layout {layout_shape(layout)}")
    inside = present(weight, layout)
    if inside is not None:
        filling = layout.columns - columns
        weight, mask = padded(weight, layout), inside if mask is None else padded(mask, layout)
        moment = F.pad(moment, (0, filling, 0, filling))
    H = damped(moment.double(), damping)
    kept = torch.ones(layout_shape(layout)) if mask is None else mask.float()
    levels = _Levels(layout)
    order = _order(H.diagonal(), layout.block_size)
    unit, importance = _factorize(H[order][:, order])
    values, scales = _round_in_order(
        weight.float()[:, order], unit.float(), importance.float(), kept[:, order], levels, order
    )
    values = torch.empty_like(values).index_copy_(1, order, values)
    if sweeps:
        values = _descend(values, weight.float(), H.float(), scales, kept, levels, sweeps)
    return values[:, :columns], scales


class _Levels:
    """Levels of each block of a layout: ``half`` float32 [rows, blocks] is half their number."""

    def __init__(self, layout: Layout) -> None:
        self.block_size = layout.block_size
        self.offset = 0.5 * layout.midrise
        self.half = half_of_levels(layout)

    def nearest(self, values: Tensor, scale: Tensor, half: Tensor) -> Tensor:
        """The levels nearest to ``values``, zero where the scale is 0; the three tensors are broadcast."""
        levels = torch.round(values / scale.masked_fill(scale == 0, 1.0) - self.offset)
        return (torch.minimum(torch.maximum(levels, -half), half - 1) + self.offset) * scale

    def search(self, values: Tensor, importance: Tensor, kept: Tensor, block: int) -> Tensor:
        """Search the scales float32 [rows] of one block with the smallest error Σ importance · (value - level)².

        ``values`` float32 [rows, block_size]; ``importance`` [block_size]. The clipping range is searched among the
        fractions :data:`qat.fake_quantize.CLIP_RATIOS` of the largest magnitude. Midrise blocks of zeros have scale 0.
        """
        values = values * kept
        half = self.half[:, block : block + 1]
        widest = values.abs().amax(dim=1, keepdim=True) / (half - 0.5)
        best_scale = _storable(widest)
        best_error = torch.full_like(best_scale, torch.inf)
        for ratio in CLIP_RATIOS:
            scale = _storable(widest * float(ratio))
            error = (self.nearest(values, scale, half) - values).square() * kept
            error = (error @ importance)[:, None]
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
        if self.offset:
            best_scale = best_scale.masked_fill(widest == 0, 0.0)
        return best_scale[:, 0]


def _storable(scale: Tensor) -> Tensor:
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()


def _order(diagonal: Tensor, block_size: int) -> Tensor:
    """Columns block by block, the blocks and the columns within each in the order of falling ``diagonal``."""
    blocks = diagonal.reshape(-1, block_size)
    first = torch.arange(blocks.shape[0])[:, None] * block_size
    columns = first + torch.argsort(blocks, dim=1, descending=True, stable=True)
    return columns[torch.argsort(blocks.mean(dim=1), descending=True, stable=True)].reshape(-1)


def _factorize(H: Tensor) -> tuple[Tensor, Tensor]:
    """(R unit upper triangular, D [n]) with ``H = R diag(D) Rᵀ``: a Cholesky factorization from the last column."""
    lower, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if failed or not torch.isfinite(lower).all():
        raise ValueError("the second moment is not positive definite; are there NaN or infinite activations?")
    root = lower.flip(0, 1)
    return root / root.diagonal(), root.diagonal().square()


def _round_in_order(
    weight: Tensor, unit: Tensor, importance: Tensor, kept: Tensor, levels: _Levels, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Round the columns of ``weight`` from left to right; ``order`` says where in the layout they are.

    Returns (values with columns as in ``weight``, scales with blocks as in the layout).
    """
    size = levels.block_size
    values, errors = torch.empty_like(weight), torch.zeros_like(weight)
    scales = torch.empty_like(levels.half)
    for start in range(0, weight.shape[1], size):
        part = slice(start, start + size)
        block = int(order[start]) // size
        targets = weight[:, part] + errors[:, :start] @ unit[:start, part]
        scales[:, block] = scale = levels.search(targets, importance[part], kept[:, part], block)
        half = levels.half[:, block]
        # Columns as rows, each together in memory.
        original, allowed, target = (part.T.contiguous() for part in (weight[:, part], kept[:, part], targets))
        rounded, lost = torch.empty_like(original), torch.zeros_like(original)
        inner = unit[part, part]
        for column in range(size):
            value = target[column] + inner[:column, column] @ lost[:column]
            rounded[column] = levels.nearest(value, scale, half) * allowed[column]
            lost[column] = original[column] - rounded[column]
        values[:, part], errors[:, part] = rounded.T, lost.T
    return values, scales


def _descend(
    values: Tensor, weight: Tensor, H: Tensor, scales: Tensor, kept: Tensor, levels: _Levels, sweeps: int
) -> Tensor:
    """Move each entry in turn to its best level given all others, ``sweeps`` times over; the error never grows."""
    size = levels.block_size
    values = values.clone()
    gradient = (values - weight) @ H  # half the gradient of the error with respect to the values
    for _ in range(sweeps):
        for block in range(scales.shape[1]):
            part = slice(block * size, (block + 1) * size)
            # Columns as rows, each together in memory.
            current, allowed, slope = (whole[:, part].T.contiguous() for whole in (values, kept, gradient))
            scale, half, inner = scales[:, block], levels.half[:, block], H[part, part]
            change = torch.zeros_like(current)
            for column in range(size):
                best = current[column] - (slope[column] + inner[column] @ change) / inner[column, column]
                best = levels.nearest(best, scale, half) * allowed[column]
                change[column] = best - current[column]
                current[column] = best
            values[:, part] = current.T
            gradient.addmm_(change.T, H[part])
    return values
