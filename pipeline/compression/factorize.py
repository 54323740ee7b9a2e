"""Factorization of a group: shared basis U and projections V with W ≈ U V.

FiPS (arXiv 2411.09816), section 3: every MLP matrix of the group is laid with the model dimension d as rows
and all are concatenated along columns, W [d, N]; U [d, r] comes from a truncated SVD, V takes the singular
values. What we do differently:

- ``activation_svd``: the SVD is taken of ``LᵀW`` with ``H = L Lᵀ`` the second moment of the MLPs' inputs, and
  undone afterwards, so that directions count by what the data puts into them (as in SVD-LLM, arXiv
  2403.07378).
- ``output_aware``: the error that counts is that of the MLPs' outputs. To first order an error ``E`` of a first
  matrix costs ``tr(Eᵀ H E S)``, S diagonal with the sensitivities of the n neurons, and one of a last matrix
  ``tr(E A Eᵀ)``, A the second moment of what it reads (:mod:`pipeline.compression.moments`). Given U, both are
  solved for V by least squares; what is left depends on U through d × d matrices only, and U is found by alternating
  the two.
- r > d: the reference pads U with zero columns. We split the leading directions into halves, one half
  rotated at random: the product is exactly the same, and every column carries weight from the start.
"""

import torch
from torch import Tensor

from qat.damping import damped

_MOMENT_DAMPING = 1e-4
"""Damping of the second moments of what matrices read: calibration may leave some directions without any energy."""
_ROUNDING = 1e-12
"""Damping of a moment in float64 that is singular by rounding only."""


def svd_factors(W: Tensor, rank: int, *, seed: int, second_moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shared basis and projections of a group.

    ``W`` float32 [d, N]; ``second_moment`` float32 [d, d] (symmetric, non-negative) weights the SVD. Returns U
    [d, rank] and V [rank, N], float32, in the order of falling singular values; rows of V have equal RMS,
    their magnitudes moved into U, so that quantization blocks along the rank axis see values of one scale.
    The columns of U beyond d (see module docstring) come last. Columns of W that are zero, of neurons or whole matrices
    that were pruned, are zero in V, where a decomposition leaves its rounding.
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
    V = singular[:kept, None] * right[:kept] * W64.any(dim=0)
    return finish_factors(left[:, :kept], V, rank, seed=seed)


def output_aware_basis(H: Tensor, G: Tensor, K: Tensor, rank: int, *, rounds: int = 30) -> Tensor:
    """Shared basis with the smallest summed error of the MLPs' outputs, to first order: float64 [d, min(rank, d)].

    ``H`` [d, d]: second moment of the inputs. ``G`` = Σ W S Wᵀ over the first matrices W [d, n] with sensitivities S,
    ``K`` = Σ W A Wᵀ over the last ones, that is the second moments of their outputs, in the same unit. U is
    orthonormal, its columns rotated so that the rows of V are uncorrelated, in the order of falling energy.

    With ``M = P G Pᵀ``, ``P = (UᵀHU)⁻¹UᵀH`` (the first V), and ``N = Q K Qᵀ``, ``Q = (UᵀU)⁻¹Uᵀ`` (the last V), the best
    U for given V solves ``H U M + U N = H G Pᵀ + K Qᵀ``, a Sylvester equation that becomes one division in the
    eigenvectors of H and those of (M, N).
    """
    d = H.shape[0]
    H = damped(H.double(), _MOMENT_DAMPING)
    G, K = G.double(), K.double()
    inputs, directions = torch.linalg.eigh(H)
    # Start: principal directions in a metric halfway between the two, which are H and the identity.
    root = (directions * inputs.pow(0.25)) @ directions.T
    inverse_root = (directions * inputs.pow(-0.25)) @ directions.T
    energy = inverse_root @ H @ G @ H @ inverse_root + root @ K @ root
    U = torch.linalg.qr(inverse_root @ torch.linalg.eigh(energy)[1].flip(1)[:, :rank])[0]
    for _ in range(rounds if rank < d else 0):
        P, Q = _first_map(U, H), U.T
        M, N = P @ G @ P.T, damped(Q @ K @ Q.T, _ROUNDING)
        right = H @ G @ P.T + K @ Q.T
        lower = torch.linalg.cholesky(N)
        whitened = torch.linalg.solve_triangular(lower, M, upper=False)
        whitened = torch.linalg.solve_triangular(lower, whitened.T, upper=False)
        ratio, vectors = torch.linalg.eigh(whitened)
        Z = torch.linalg.solve_triangular(lower.T, vectors, upper=True)  # Zᵀ N Z = 1, Zᵀ M Z = ratio
        X = directions @ ((directions.T @ right @ Z) / (inputs[:, None] * ratio + 1))
        U = torch.linalg.qr(X @ Z.T)[0]
    P = _first_map(U, H)
    energy = P @ G @ P.T * (H.trace() / d) + U.T @ K @ U
    return U @ torch.linalg.eigh(energy)[1].flip(1)


def first_projection(U: Tensor, H: Tensor, W: Tensor) -> Tensor:
    """V [rank, n] with the smallest error ``tr((W - U V)ᵀ H (W - U V))`` of a first matrix W [d, n]: float64."""
    return _first_map(U, damped(H.double(), _MOMENT_DAMPING)) @ W.double()


def finish_factors(U: Tensor, V: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """U [d, ``rank``] and V [``rank``, N] from U [d, r] and V [r, N] with r of at most ``rank``: float32, with the same
    product, rows of V of equal RMS."""
    U, V = _equal_rows(U, V)
    if rank > U.shape[1]:
        U, V = _extend(U, V, rank - U.shape[1], seed)
        U, V = _equal_rows(U, V)
    return U.float().contiguous(), V.float().contiguous()


def _first_map(U: Tensor, H: Tensor) -> Tensor:
    return torch.linalg.solve(U.T @ H @ U, U.T @ H)


def _square_root(moment: Tensor) -> Tensor:
    """Cholesky factor L with L Lᵀ = moment + a little of its mean diagonal, which makes it invertible."""
    return torch.linalg.cholesky(damped(moment, _MOMENT_DAMPING))


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
