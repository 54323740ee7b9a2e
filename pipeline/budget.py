"""Parameter budget → rank of the shared basis (FiPS, section 3; METHOD 'Budget')."""


def rank_for_budget(budget: float, width: int, columns: int, sparsity: float) -> float:
    """Rank r at which basis and kept projection entries cost ``budget`` of the dense parameters.

    ``p·d·N = d·r + (1-s)·r·N`` with p = ``budget``, d = ``width``, N = ``columns`` (all MLP matrices of the group,
    laid side by side) and s = ``sparsity``. The result is a real number, to be rounded by the caller.
    """
    return budget * width * columns / (width + (1.0 - sparsity) * columns)


def kept_parameters(rank: int, width: int, columns: int, sparsity: float) -> float:
    """Values kept by a factorization of the given rank: basis and non-zero projection entries."""
    return rank * width + (1.0 - sparsity) * rank * columns
