"""Factorization of a group: shared basis U and projections V with W ≈ U V.

FiPS (arXiv 2411.09816), section 3: every MLP matrix of the group is laid with the model dimension d as rows
and all are concatenated along columns, W [d, N]; U [d, r] comes from a truncated SVD, V takes the singular
values. What we do differently:

- ``activation_svd``: the SVD is taken of ``LᵀW`` with ``H = L Lᵀ`` the second moment of the MLPs' inputs, and
  undone afterwards, so that directions count by what the data puts into them (as in SVD-LLM, arXiv
  2403.07378).
- r > d: the reference pads U with zero columns. We split the leading directions into halves, one half
  rotated at random: the product is exactly the same, and every column carries weight from the start.
"""

import torch
from torch import Tensor


def svd_factors(W: Tensor, rank: int, *, seed: int, second_moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shared basis and projections of a group.

    ``W`` float32 [d, N]; ``second_moment`` float32 [d, d] (symmetric, non-negative) weights the SVD. Returns U
    [d, rank] and V [rank, N], float32, in the order of falling singular values; rows of V have equal RMS,
    their magnitudes moved into U, so that quantization blocks along the rank axis see values of one scale.
    The columns of U beyond d (see module docstring) come last.
    """
    d = W.shape[0]
    W64 = W.double()
    if second_moment is None:
        left, singular, right = torch.linalg.svd(W64, full_matrices=False)
    else:
        L = _square_root(second_moment.double())
        left, singular, right = torch.linalg.svd(L.T @ W64, full_matrices=False)
        left = torch.linalg.solve(L.T, left)
    kept = min(rank, d, singular.numel())
    U, V = left[:, :kept], singular[:kept, None] * right[:kept]
    U, V = _equal_rows(U, V)
    if rank > kept:
        U, V = _extend(U, V, rank - kept, seed)
        U, V = _equal_rows(U, V)
    return U.float().contiguous(), V.float().contiguous()


def _square_root(moment: Tensor) -> Tensor:
    """Cholesky factor L with L Lᵀ = moment + a little of its mean diagonal, which makes it invertible."""
    damping = 1e-4 * moment.diagonal().mean()
    eye = torch.eye(moment.shape[0], dtype=moment.dtype)
    return torch.linalg.cholesky(moment + damping * eye)


def _equal_rows(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Move the rows' magnitudes from V into U: the largest column of U gets RMS 1, all rows of V equal RMS."""
    rms = V.square().mean(dim=1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    U = U * rms
    common = U.square().mean(dim=0).sqrt().max()
    return U / common, V / rms[:, None] * common


def _extend(U: Tensor, V: Tensor, extra: int, seed: int) -> tuple[Tensor, Tensor]:
    """Append ``extra`` columns to U and rows to V without changing U V, as often as needed."""
    generator = torch.Generator().manual_seed(seed)
    base_U, base_V = U, V
    copies = -(-extra // U.shape[1])
    for _ in range(copies):
        count = min(extra, base_U.shape[1])
        rotation, _ = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=U.dtype))
        # The leading directions are shared equally between all copies.
        share = 1.0 / (copies + 1)
        U = torch.cat([U, base_U[:, :count] @ rotation], dim=1)
        V = torch.cat([V, share * (rotation.T @ base_V[:count])], dim=0)
        V[:count] -= share * base_V[:count]
        extra -= count
    return U, V
