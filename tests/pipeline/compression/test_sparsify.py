"""Sparsifiers: schedules, exact counts, n:m patterns, nesting, RigL's swaps, resuming."""

import math

import pytest
import torch
from factored_samples import ALGORITHMS, N_OF_M, sparsifier
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fips_ort.layout import BITMAP, Pattern
from pipeline.compression.sparsify import MaskSchedule, gmp_sparsity, magnitude_masks, swap_masks
from pipeline.recipe.schema import Sparsifier
from qat.factor import Factor


def kept_in_groups(mask: Tensor, pattern: Pattern) -> Tensor:
    return mask.reshape(-1, pattern.of).sum(dim=1)


def target(pattern: Pattern) -> float:
    return 1 - pattern.keep / pattern.of


def factors(seed: int, shapes: tuple[tuple[int, int], ...] = ((8, 16), (16, 32))) -> list[Factor]:
    generator = torch.Generator().manual_seed(seed)
    return [Factor(torch.randn(shape, generator=generator), torch.ones(shape, dtype=torch.bool)) for shape in shapes]


def step(schedule: MaskSchedule, index: int, seed: int = 0) -> None:
    """One training step with a loss and an update that depend on nothing but the step."""
    schedule.before_step(index)
    generator = torch.Generator().manual_seed(seed * 1000 + index)
    for projection in schedule.projections:
        projection.weight.grad = None
        wanted = torch.randn(projection.weight.shape, generator=generator)
        (projection() - wanted).square().sum().backward()
    schedule.after_backward(index)
    with torch.no_grad():
        for projection in schedule.projections:
            projection.weight.sub_(0.05 * projection.weight.grad)
            # An optimiser's momentum goes on moving pruned entries; what they hold must not matter.
            projection.weight.add_(9.0 * ~projection.mask)


# --- pure functions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.05), (0.5, 0.75 - 0.7 * 0.125), (0.9, 0.75 - 0.7 * 0.001), (1.0, 0.75), (-1.0, 0.05), (2.0, 0.75)],
)
def test_cubic_schedule(progress: float, expected: float) -> None:
    assert gmp_sparsity(progress, 0.05, 0.75) == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 10_000), sparsity=st.floats(0, 1), jointly=st.booleans())
@settings(max_examples=60, deadline=None)
def test_unstructured_masks_drop_exactly_the_smallest(seed: int, sparsity: float, jointly: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.rand(3, 8, generator=generator), 10 * torch.rand(5, 16, generator=generator)]
    masks = magnitude_masks(tensors, sparsity, BITMAP, jointly=jointly)
    assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]
    pools = [(tensors, masks)] if jointly else [([t], [m]) for t, m in zip(tensors, masks, strict=True)]
    for values, kept in pools:
        flat = torch.cat([value.flatten() for value in values])
        mask = torch.cat([part.flatten() for part in kept])
        assert int((~mask).sum()) == round(sparsity * flat.numel())
        if mask.any() and not mask.all():
            assert flat[~mask].max() <= flat[mask].min()


def test_ranking_jointly_empties_the_weaker_tensor() -> None:
    weak, strong = torch.full((2, 8), 0.1), torch.full((2, 8), 1.0)
    masks = magnitude_masks([weak, strong], 0.5, BITMAP, jointly=True)
    assert [int(mask.sum()) for mask in masks] == [0, 16]
    masks = magnitude_masks([weak, strong], 0.5, BITMAP, jointly=False)
    assert [int(mask.sum()) for mask in masks] == [8, 8]


def test_ties_fall_to_the_first_entries() -> None:
    mask = magnitude_masks([torch.ones(2, 4)], 0.375, BITMAP, jointly=False)[0]
    assert mask.tolist() == [[False, False, False, True], [True] * 4]
    mask = magnitude_masks([torch.ones(1, 8)], 0.75, Pattern(1, 4), jointly=False)[0]
    assert mask.tolist() == [[True, False, False, False] * 2]


@given(seed=st.integers(0, 10_000), name=st.sampled_from(N_OF_M), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_n_largest_of_m_are_never_dropped(seed: int, name: str, share: float) -> None:
    pattern = Pattern.parse(name)
    generator = torch.Generator().manual_seed(seed)
    # Few different values, so that there are ties.
    magnitude = torch.randint(0, 4, (6, 32), generator=generator).float()
    sparsity = share * target(pattern)
    mask = magnitude_masks([magnitude], sparsity, pattern, jointly=False)[0]
    assert int((~mask).sum()) == round(sparsity * mask.numel())
    counts = kept_in_groups(mask, pattern)
    assert int(counts.min()) >= pattern.keep
    groups, kept = magnitude.reshape(-1, pattern.of), mask.reshape(-1, pattern.of)
    largest = groups.topk(pattern.keep, dim=1).values.sum(dim=1)
    assert torch.equal(torch.where(kept, groups, -1.0).topk(pattern.keep, dim=1).values.sum(dim=1), largest)
    final = magnitude_masks([magnitude], target(pattern), pattern, jointly=False)[0]
    assert torch.all(kept_in_groups(final, pattern) == pattern.keep)
    assert torch.equal((final * magnitude).reshape(-1, pattern.of).sum(dim=1), largest)


@given(seed=st.integers(0, 10_000), fraction=st.floats(0, 1), density=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_unstructured_swap(seed: int, fraction: float, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitude, gradient = torch.rand(6, 16, generator=generator), torch.randn(6, 16, generator=generator)
    mask = torch.rand(6, 16, generator=generator) < density
    new = swap_masks(magnitude, gradient, mask, fraction, BITMAP)
    assert int(new.sum()) == int(mask.sum())
    dropped, grown = mask & ~new, new & ~mask
    count = min(round(fraction * int(mask.sum())), int((~mask).sum()))
    assert int(dropped.sum()) == int(grown.sum()) == count
    if count:
        stayed, passed_over = mask & new, ~mask & ~new
        if stayed.any():
            assert magnitude[dropped].max() <= magnitude[stayed].min()
        if passed_over.any():
            assert gradient.abs()[grown].min() >= gradient.abs()[passed_over].max()


@given(seed=st.integers(0, 10_000), fraction=st.floats(0, 1), name=st.sampled_from(N_OF_M))
@settings(max_examples=60, deadline=None)
def test_n_of_m_swap(seed: int, fraction: float, name: str) -> None:
    pattern = Pattern.parse(name)
    generator = torch.Generator().manual_seed(seed)
    magnitude, gradient = torch.rand(6, 32, generator=generator), torch.randn(6, 32, generator=generator)
    start = torch.rand(6, 32, generator=generator)
    mask = magnitude_masks([start], target(pattern), pattern, jointly=False)[0]
    new = swap_masks(magnitude, gradient, mask, fraction, pattern)
    assert torch.all(kept_in_groups(new, pattern) == pattern.keep)
    dropped, grown = (mask & ~new).reshape(-1, pattern.of), (new & ~mask).reshape(-1, pattern.of)
    groups = dropped.shape[0]
    assert int(dropped.sum()) == min(round(fraction * int(mask.sum())), groups)
    changed = dropped.any(dim=1)
    assert torch.equal(dropped.sum(dim=1), changed.long())
    kept = mask.reshape(-1, pattern.of)
    weakest = torch.where(kept, magnitude.reshape(-1, pattern.of), torch.inf).amin(dim=1)
    assert torch.equal(magnitude.reshape(-1, pattern.of)[dropped], weakest[changed])
    strongest = torch.where(kept, -1.0, gradient.abs().reshape(-1, pattern.of)).amax(dim=1)
    assert torch.equal(gradient.abs().reshape(-1, pattern.of)[grown], strongest[changed])
    if changed.any() and not changed.all():
        assert weakest[changed].max() <= weakest[~changed].min()


# --- schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranking", ["layer", "group"])
def test_gmp_prunes_along_the_schedule_and_never_back(seed: int, ranking: str) -> None:
    config = Sparsifier(algorithm="gmp", ranking=ranking, update_every=5, end=0.75, initial_sparsity=0.1)
    projections = factors(seed)
    schedule = MaskSchedule(projections, config, BITMAP, 0.8, 40)
    before = [projection.mask.clone() for projection in projections]
    for index in range(40):
        step(schedule, index, seed)
        masks = [projection.mask for projection in projections]
        assert all(torch.all(old | ~new) for old, new in zip(before, masks, strict=True))
        updated = min(index - index % 5, 30)
        expected = gmp_sparsity(updated / 30, 0.1, 0.8)
        pools = [torch.cat([mask.flatten() for mask in masks])] if ranking == "group" else masks
        assert [int((~pool).sum()) for pool in pools] == [round(expected * pool.numel()) for pool in pools]
        before = [mask.clone() for mask in masks]
    for projection in projections:
        assert torch.all(projection()[~projection.mask] == 0)
        assert int((projection() == 0).sum()) == int((~projection.mask).sum())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", N_OF_M)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("steps", "end"), [(40, 0.75), (7, 0.5), (3, 0.99), (2, 0.01), (1, 0.75)])
def test_every_algorithm_ends_on_the_pattern(seed: int, name: str, algorithm: str, steps: int, end: float) -> None:
    pattern = Pattern.parse(name)
    config = Sparsifier(**sparsifier(algorithm, update_every=3, end=end, drop_fraction=0.4))
    projections = factors(seed)
    schedule = MaskSchedule(projections, config, pattern, target(pattern), steps)
    for index in range(steps):
        step(schedule, index, seed)
    for projection in projections:
        assert torch.all(kept_in_groups(projection.mask, pattern) == pattern.keep)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("ranking", ["layer", "group"])
@pytest.mark.parametrize(("steps", "end"), [(40, 0.75), (10, 0.99), (1, 0.75)])
def test_every_algorithm_ends_at_the_exact_sparsity(algorithm: str, ranking: str, steps: int, end: float) -> None:
    config = Sparsifier(**sparsifier(algorithm, ranking=ranking, update_every=4, end=end))
    projections = factors(0)
    schedule = MaskSchedule(projections, config, BITMAP, 0.7, steps)
    for index in range(steps):
        step(schedule, index)
    dropped = [int((~projection.mask).sum()) for projection in projections]
    if ranking == "layer":
        assert dropped == [round(0.7 * 128), round(0.7 * 512)]
    else:
        assert sum(dropped) == round(0.7 * 640)


def test_static_keeps_the_first_mask() -> None:
    projections = factors(0)
    expected = magnitude_masks([p().detach().abs() for p in projections], 0.75, BITMAP, jointly=False)
    schedule = MaskSchedule(projections, Sparsifier(algorithm="static"), BITMAP, 0.75, 20)
    for index in range(20):
        step(schedule, index)
        for projection, mask in zip(projections, expected, strict=True):
            assert torch.equal(projection.mask, mask)


def test_magnitudes_are_those_of_the_effective_matrix() -> None:
    """Rows of a factor are stored at unit RMS; the smallest entries of the *matrix* must go all the same."""
    matrix = torch.tensor([[0.1, 0.2, 0.3, 0.4], [10.0, 20.0, 30.0, 40.0]])
    projection = Factor(matrix, torch.ones(2, 4, dtype=torch.bool))
    MaskSchedule([projection], Sparsifier(algorithm="static"), BITMAP, 0.5, 10).before_step(0)
    assert projection.mask.tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("name", ["bitmap", "1:4", "2:4"])
def test_rigl_swaps_by_the_cosine_and_grows_by_gradient(name: str) -> None:
    pattern = Pattern.parse(name)
    sparsity = target(pattern) if pattern.is_n_of_m else 0.75
    config = Sparsifier(algorithm="rigl", update_every=5, end=0.75, drop_fraction=0.3)
    projection = factors(0, ((16, 32),))[0]
    schedule = MaskSchedule([projection], config, pattern, sparsity, 40)
    kept = round((1 - sparsity) * 512)
    swaps = 0
    for index in range(40):
        schedule.before_step(index)
        before = projection.mask.clone()
        projection.weight.grad = None
        wanted = torch.randn(16, 32, generator=torch.Generator().manual_seed(index))
        matrix = projection()
        (matrix - wanted).square().sum().backward()
        dense_gradient = 2 * (matrix - wanted).detach()
        magnitude = matrix.detach().abs()
        schedule.after_backward(index)
        assert int(projection.mask.sum()) == kept
        if index % 5 or not 0 < index <= 30:
            assert torch.equal(projection.mask, before)
        else:
            fraction = 0.5 * 0.3 * (1 + math.cos(math.pi * index / 30))
            expected = swap_masks(magnitude, dense_gradient, before, fraction, pattern)
            assert torch.equal(projection.mask, expected)
            grown = projection.mask & ~before
            assert int(grown.sum()) == round(fraction * kept)
            assert torch.all(projection()[grown] == 0)
            assert torch.all(projection()[projection.mask & before] != 0)
            swaps += int(grown.sum())
        with torch.no_grad():
            projection.weight.sub_(0.05 * projection.weight.grad)
    assert swaps > 30


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["bitmap", "1:4"])
@pytest.mark.parametrize("killed_at", [1, 5, 6, 15, 29, 31])
def test_resumed_schedule_gives_the_same_masks(algorithm: str, name: str, killed_at: int) -> None:
    pattern = Pattern.parse(name)
    config = Sparsifier(**sparsifier(algorithm, update_every=5, end=0.75, drop_fraction=0.3))

    def schedule_of(projections: list[Factor]) -> MaskSchedule:
        return MaskSchedule(projections, config, pattern, 0.75, 40)

    whole = factors(0)
    schedule = schedule_of(whole)
    for index in range(40):
        step(schedule, index)
    first = factors(0)
    schedule = schedule_of(first)
    for index in range(killed_at):
        step(schedule, index)
    resumed = factors(1)
    for projection, saved in zip(resumed, first, strict=True):
        projection.load_state_dict(saved.state_dict())
    schedule = schedule_of(resumed)
    for index in range(killed_at, 40):
        step(schedule, index)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one(), other())
