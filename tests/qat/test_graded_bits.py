"""Reverse water-filling: budget kept, monotone, optimal where a greedy choice can be."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.graded_bits import allocate_bits, segments_of

# Mean squared errors of the best uniform quantizers of a unit Gaussian (Max 1960, table II), 2 to 4 bits.
MAX_1960 = {2: 0.1188, 3: 0.03744, 4: 0.01154}

energies = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=24).map(np.array)


def distortion(energy: np.ndarray, bits: np.ndarray) -> float:
    table = {**MAX_1960, 8: 0.0001}
    return float(sum(e * table[int(b)] for e, b in zip(energy, bits, strict=True)))


def optimum(energy: np.ndarray, budget: float) -> float:
    """Smallest distortion of any allocation whose mean is at most ``budget``."""
    choices = itertools.product((2, 3, 4, 8), repeat=energy.size)
    affordable = (np.array(bits) for bits in choices if sum(bits) <= budget * energy.size + 1e-9)
    return min(distortion(energy, bits) for bits in affordable)


@given(energy=energies, budget=st.floats(2.0, 10.0))
@settings(max_examples=150, deadline=None)
def test_budget_is_kept_and_spent(energy: np.ndarray, budget: float) -> None:
    bits = allocate_bits(energy, budget)
    assert bits.shape == energy.shape
    assert set(bits.tolist()) <= {2, 3, 4, 8}
    assert bits.sum() <= budget * energy.size + 1e-9
    # No further step can be bought: what is left is below the cheapest one.
    steps = [{2: 1, 3: 1, 4: 4}[int(width)] for width in bits if width < 8]
    if steps:
        assert budget * energy.size - bits.sum() < min(steps)


@given(energy=energies, budget=st.floats(2.0, 8.0))
@settings(max_examples=100, deadline=None)
def test_more_energy_never_means_fewer_bits(energy: np.ndarray, budget: float) -> None:
    bits = allocate_bits(energy, budget)
    falling = bits[np.argsort(-energy, kind="stable")]
    assert np.all(np.diff(falling) <= 0)


@given(energy=energies, extra=st.integers(0, 140))
@settings(max_examples=100, deadline=None)
def test_larger_budgets_never_hurt(energy: np.ndarray, extra: int) -> None:
    budgets = [2 + extra / energy.size, 2 + (extra + 1) / energy.size]
    less, more = (allocate_bits(energy, budget) for budget in budgets)
    assert more.sum() >= less.sum()
    # Up to 4 bits all steps cost the same, so that a larger budget only adds; the step of 4 bits to 8 may
    # have to wait until several smaller ones can be paid, which then are not taken.
    if more.max() <= 4:
        assert np.all(more >= less)
        assert distortion(energy, more) <= distortion(energy, less)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [2.0, 2.2, 2.5, 3.0, 3.4])
def test_optimal_where_steps_cost_the_same(seed: int, budget: float) -> None:
    """Below the steps to 8 bits every purchase costs one bit, and greedy purchases are optimal.

    Energies within a factor of 7 keep 8 bits out of the optimum (a bit there gains a tenth of the step 3 → 4).
    """
    energy = np.random.default_rng(seed).uniform(1.0, 7.0, 5)
    bits = allocate_bits(energy, budget)
    assert distortion(energy, bits) == pytest.approx(optimum(energy, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [2.5, 3.0, 4.0, 5.0, 6.5])
def test_between_the_optima_of_neighbouring_budgets(seed: int, budget: float) -> None:
    """In general greedy reaches the optimum only on the convex hull of (bits, distortion): between two points of
    the hull, at most one step of 4 bits apart, it may be behind the best use of the odd bits."""
    energy = 10 ** np.random.default_rng(seed).uniform(-3, 3, 5)
    bits = allocate_bits(energy, budget)
    assert distortion(energy, bits) >= optimum(energy, budget) * (1 - 1e-12)
    assert distortion(energy, bits) <= optimum(energy, max(2.0, budget - 4 / energy.size)) * (1 + 1e-12)


@given(size=st.integers(1, 30), budget=st.floats(2.0, 4.0))
@settings(max_examples=60, deadline=None)
def test_equal_energies_get_equal_bits_up_to_one_step(size: int, budget: float) -> None:
    bits = allocate_bits(np.full(size, 3.7), budget)
    assert bits.max() - bits.min() <= 1
    assert np.all(np.diff(bits) <= 0)
    assert bits.sum() == int(budget * size + 1e-9)


def test_by_hand() -> None:
    # Gains per bit at energy 1: 2→3 0.0814, 3→4 0.0259, 4→8 0.0029 (each of four).
    assert allocate_bits(np.array([1.0, 1.0, 10.0, 1.0]), 2.5).tolist() == [2, 2, 4, 2]
    assert allocate_bits(np.array([1.0, 100.0]), 5.0).tolist() == [2, 8]
    # The step to 8 bits gains 0.057, but it costs four bits; a bit each for the four others gains 0.104.
    assert allocate_bits(np.array([1.0, 1.0, 1.0, 1.0, 5.0]), 4.0).tolist() == [4, 4, 4, 4, 4]
    assert allocate_bits(np.array([1.0, 2.0]), 100.0).tolist() == [8, 8]
    assert allocate_bits(np.array([5.0, 1.0, 3.0]), 2.0).tolist() == [2, 2, 2]


@pytest.mark.parametrize("budget", [1.99, 0.0, -3.0])
def test_budgets_below_two_bits_are_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="below the smallest bit-width, 2"):
        allocate_bits(np.ones(3), budget)


def test_segments() -> None:
    assert segments_of(np.array([8, 4, 4, 2, 2, 2]), 16) == (16, 32, 0, 48)
    assert segments_of(np.array([3]), 64) == (0, 0, 64, 0)


@given(energy=energies, budget=st.floats(2.0, 8.0), chunk=st.sampled_from([16, 64]))
@settings(max_examples=40, deadline=None)
def test_segments_cover_the_rank_axis(energy: np.ndarray, budget: float, chunk: int) -> None:
    bits = allocate_bits(energy, budget)
    sizes = segments_of(bits, chunk)
    assert sum(sizes) == energy.size * chunk
    assert all(size % chunk == 0 for size in sizes)
    mean = sum(width * size for width, size in zip((8, 4, 3, 2), sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(bits.mean())
