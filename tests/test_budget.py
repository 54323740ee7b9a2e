import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.budget import kept_parameters, rank_for_budget


@pytest.mark.parametrize(
    ("budget", "width", "columns", "sparsity", "rank"),
    [
        # p·d·N / (d + (1-s)·N), computed by hand.
        (0.5, 100, 300, 0.0, 37.5),
        (0.5, 100, 400, 0.75, 100.0),
        (1.0, 64, 64, 0.0, 32.0),
        # DeiT-B, a group of four: N = 8 · 3072; overcomplete at 75 % sparsity.
        (0.5, 768, 24576, 0.75, 0.5 * 768 * 24576 / 6912),
    ],
)
def test_rank_by_hand(budget: float, width: int, columns: int, sparsity: float, rank: float) -> None:
    assert rank_for_budget(budget, width, columns, sparsity) == pytest.approx(rank, rel=1e-14)


def test_high_sparsity_makes_the_basis_overcomplete() -> None:
    assert rank_for_budget(0.5, 768, 24576, 0.75) > 768
    assert rank_for_budget(0.5, 768, 24576, 0.0) < 768


def test_kept_parameters_by_hand() -> None:
    # 10 basis columns of 100 values, and a quarter of 10 x 400 projection entries.
    assert kept_parameters(10, 100, 400, 0.75) == 10 * 100 + 1000


@given(
    budget=st.floats(0.01, 1.0),
    width=st.integers(1, 10_000),
    columns=st.integers(1, 1_000_000),
    sparsity=st.floats(0.0, 0.99),
)
def test_the_rank_spends_exactly_the_budget(budget: float, width: int, columns: int, sparsity: float) -> None:
    rank = rank_for_budget(budget, width, columns, sparsity)
    assert kept_parameters(rank, width, columns, sparsity) == pytest.approx(budget * width * columns, rel=1e-12)
