"""Recipe × model: ranks, layouts and sizes; every input that cannot work is named with its remedy."""

import itertools
import re

import pytest
from factored_samples import N_OF_M, dense_recipe, n_of_m, recipe, site
from hypothesis import given, settings
from hypothesis import strategies as st

from fips_ort.layout import (
    BITMAP,
    DENSE,
    PATTERNS,
    Layout,
    Pattern,
    fitting_block_size,
    padded_to_blocks,
    segments_with,
)
from pipeline.plumbing.errors import InputError
from pipeline.recipe.plan import (
    GroupPlan,
    MLPSite,
    basis_layout,
    fitted_rows,
    given_segments,
    group_size,
    kept_parameters,
    make_plan,
    projection_layout,
    rank_for_budget,
    scheme_segments,
)
from pipeline.recipe.schema import FactorScheme, Recipe


def sites(count: int = 4, **options: int) -> list[MLPSite]:
    return [site(block, **options) for block in range(count)]


def swin_sites() -> list[MLPSite]:
    widths = [32, 32, 64, 64, 64]
    return [site(block, width, 2 * width) for block, width in enumerate(widths)]


def problems(wanted: Recipe, members: list[MLPSite]) -> list[str]:
    with pytest.raises(InputError) as caught:
        make_plan(wanted, members)
    lines = str(caught.value).split("\n")
    assert all(line.startswith("recipe sample: ") for line in lines)
    return [line.removeprefix("recipe sample: ") for line in lines]


# --- what works ------------------------------------------------------------------------------------------------


def test_groups_of_consecutive_blocks() -> None:
    plan = make_plan(recipe(compression__groups=2), sites(5, hidden=128))
    assert [[member.block for member in group.sites] for group in plan.groups] == [[0, 1], [2, 3], [4]]
    assert [group.name for group in plan.groups] == ["group_0", "group_1", "group_2"]
    assert plan.dense_blocks == ()


def test_listed_groups_leave_the_rest_dense() -> None:
    members = sites(6)
    plan = make_plan(recipe(compression__groups=[[4, 1], [3]], compression__budget=0.9), members)
    assert [group.sites for group in plan.groups] == [(members[4], members[1]), (members[3],)]
    assert [group.index for group in plan.groups] == [0, 1]
    assert plan.dense_blocks == (0, 2, 5)


def test_rank_by_hand() -> None:
    # d = 32, N = 2 · 2 · 64 = 256: r = 0.5 · 32 · 256 / (32 + 0.25 · 256) = 42.7, rounded down to blocks of 16.
    group = make_plan(recipe(), sites(2)).groups[0]
    assert (group.width, group.columns, group.rank) == (32, 256, 32)
    assert group.dense_parameters == 8192
    # Three matrices in a gated MLP: N = 2 · 3 · 64 = 384, r = 48.
    gated = make_plan(recipe(), [site(block, gated=True) for block in range(2)]).groups[0]
    assert (gated.columns, gated.rank) == (384, 48)


def test_swin_groups_that_follow_the_stages() -> None:
    plan = make_plan(recipe(compression__groups=[[0, 1], [2, 3, 4]]), swin_sites())
    assert [(group.width, group.columns) for group in plan.groups] == [(32, 256), (64, 768)]


@given(
    budget=st.floats(0.2, 1.0), sparsity=st.floats(0.3, 0.95), count=st.integers(1, 6),
    width=st.sampled_from([64, 128]), block=st.sampled_from([16, 32, 64]),
)
@settings(max_examples=80, deadline=None)
def test_the_rank_keeps_the_budget_to_one_block(
    budget: float, sparsity: float, count: int, width: int, block: int
) -> None:
    wanted = recipe(
        compression__groups=count, compression__budget=budget, compression__sparsity=sparsity,
        quantization__projections__block_size=block,
    )
    members = [site(index, width, 4 * width) for index in range(count)]
    try:
        group = make_plan(wanted, members).groups[0]
    except InputError:
        assert kept_parameters(block, width, 8 * width * count, sparsity) > budget * width * 8 * width * count
        return
    dense = group.dense_parameters
    assert group.rank % block == 0
    assert kept_parameters(group.rank, width, group.columns, sparsity) <= budget * dense * (1 + 1e-9)
    assert kept_parameters(group.rank + block, width, group.columns, sparsity) > budget * dense * (1 - 1e-9)


def test_the_dense_baseline_has_a_group_per_block_and_no_basis() -> None:
    members = [site(0), site(1, 64, 128, gated=True)]
    plan = make_plan(dense_recipe(), members)
    assert plan.groups == (
        GroupPlan(0, (members[0],), 32, 128, 32, has_basis=False),
        GroupPlan(1, (members[1],), 64, 384, 64, has_basis=False),
    )
    assert plan.dense_blocks == ()
    assert [group.parameters for group in plan.groups] == [32 * 128, 64 * 384]
    assert GroupPlan(0, (members[0],), 32, 128, 16).parameters == 16 * (32 + 128)


# --- what does not ---------------------------------------------------------------------------------------------


def test_blocks_out_of_range() -> None:
    found = problems(recipe(compression__groups=[[0, 1], [2, 4, -1]]), sites(4))
    assert found == ["compression.groups.1: blocks [4, -1] do not exist; the model has blocks 0 to 3"]


def test_blocks_used_twice() -> None:
    found = problems(recipe(compression__groups=[[0, 1, 1], [2, 0]]), sites(4))
    assert found == [
        "compression.groups.0: block 1 is twice in this group; a block belongs to one group",
        "compression.groups.1: block 0 is in group 0 already; a block belongs to one group",
    ]


def test_unequal_widths() -> None:
    found = problems(recipe(compression__groups=[[0, 1, 2], [3, 4]]), swin_sites())
    assert found == [
        "compression.groups.0: blocks of unequal width cannot share a basis "
        "(block 0: 32, block 1: 32, block 2: 64); split the group"
    ]
    assert "compression.groups.0: blocks of unequal width" in problems(recipe(compression__groups=3), swin_sites())[0]


def test_empty_group() -> None:
    found = problems(recipe(compression__groups=[[0, 1], []]), sites(4))
    assert found == ["compression.groups.1: the group is empty; remove it"]


def test_the_dense_baseline_needs_one_bit_width() -> None:
    grades = [{"bits": 4, "fraction": 0.5}, {"bits": 2, "fraction": 0.5}]
    expected = (
        "quantization.projections.bits: graded bits follow the rank axis of a factorization, which "
        "compression.method dense does not have; take one of 2, 3, 4"
    )
    assert problems(dense_recipe(quantization__projections__bits=grades), sites(2)) == [expected]
    allocated = dense_recipe(quantization__projections__bits="allocate", quantization__target_stored_bits=3.0)
    assert problems(allocated, sites(2)) == [expected]


def test_rank_below_one_block() -> None:
    found = problems(recipe(compression__budget=0.1), sites(2))
    assert found == [
        "compression.budget: 0.1 gives group 0 rank 8.5, less than one block of 16; raise the budget to 0.188"
    ]
    assert "rank 0.1, less than one block" in problems(recipe(compression__budget=0.001), sites(2))[0]


@given(
    pattern=st.sampled_from(PATTERNS),
    budget=st.floats(0.001, 2.0),
    width=st.sampled_from([16, 32, 72, 100, 192]),
    block_size=st.sampled_from([16, 32, 64, 128, 256]),
)
@settings(max_examples=60, deadline=None)
def test_remedies_for_a_small_rank_can_be_followed(pattern: str, budget: float, width: int, block_size: int) -> None:
    """No block size is named that is not there, or that the pattern does not have, and no budget above the largest."""
    if pattern in N_OF_M:
        parsed = Pattern.parse(pattern)
        block_size = max(block_size, 8 * parsed.of // parsed.keep)
    settings = {
        "compression__pattern": pattern,
        "compression__sparsity": 0.75 if pattern == "bitmap" else None,
        "quantization__projections__block_size": block_size,
    }
    members = sites(2, width=width, hidden=4 * width)
    try:
        make_plan(recipe(**settings, compression__budget=budget), members)
        return
    except InputError as error:
        said = str(error)
    named = re.search(r"budget to ([0-9.]+)", said)
    lowered = re.search(r"block_size to ([0-9]+)", said)
    if named is not None:
        make_plan(recipe(**settings, compression__budget=float(named[1])), members)
    if lowered is not None:
        settings["quantization__projections__block_size"] = int(lowered[1])
        make_plan(recipe(**settings, compression__budget=budget), members)
    assert named or lowered or "leave these blocks out of compression.groups" in said


def test_all_problems_are_listed_with_the_numbers_of_the_recipe() -> None:
    wanted = recipe(
        compression__groups=[[0, 2], [1, 9], [], [3, 4, 3], [4]],
        compression__budget=0.001,
        quantization__basis__block_size=128,
    )
    found = problems(wanted, swin_sites())
    keys = [line.split(":")[0] for line in found]
    assert keys == [
        "compression.groups.0",
        "compression.groups.1",
        "compression.groups.2",
        "compression.groups.3",
        "compression.groups.4",
        "compression.budget",
        "compression.budget",
        "compression.budget",
    ]
    assert [line.split("group ")[1][0] for line in found[5:]] == ["1", "3", "4"]


# --- layouts and sizes -----------------------------------------------------------------------------------------


def group_of(rank: int) -> GroupPlan:
    return GroupPlan(0, tuple(sites(2)), 32, 256, rank)


def scheme(bits: object) -> FactorScheme:
    return FactorScheme(bits=bits, block_size=16)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "expected"), [(4, (0, 64, 0, 0)), (3, (0, 0, 64, 0)), (2, (0, 0, 0, 64))])
def test_one_bit_width(bits: int, expected: tuple[int, int, int, int]) -> None:
    assert scheme_segments(scheme(bits), group_of(64), 16) == expected


def test_allocation_is_left_open() -> None:
    assert scheme_segments(scheme("allocate"), group_of(64), 16) is None


def test_grades_are_rounded_to_chunks() -> None:
    grades = [{"bits": 8, "fraction": 0.1}, {"bits": 4, "fraction": 0.4}, {"bits": 3, "fraction": 0.5}]
    assert scheme_segments(scheme(grades), group_of(160), 16) == (16, 64, 80, 0)
    # 16 · round(0.1 · 64 / 16) = 0, 16 · round(1.6) = 32.
    assert scheme_segments(scheme(grades), group_of(64), 16) == (0, 32, 32, 0)


@given(
    cuts=st.lists(st.integers(1, 99), min_size=3, max_size=3, unique=True), chunks=st.integers(1, 40),
    chunk=st.sampled_from([16, 32, 64]),
)
def test_grades_cover_the_rank_axis(cuts: list[int], chunks: int, chunk: int) -> None:
    edges = [0, *sorted(cuts), 100]
    fractions = [(high - low) / 100 for low, high in itertools.pairwise(edges)]
    grades = [{"bits": bits, "fraction": part} for bits, part in zip((8, 4, 3, 2), fractions, strict=True)]
    sizes = scheme_segments(scheme(grades), group_of(chunks * chunk), chunk)
    assert sizes is not None
    assert sum(sizes) == chunks * chunk
    assert all(size >= 0 and size % chunk == 0 for size in sizes)
    # Rounding moves an edge by at most half a chunk a segment.
    for size, part in zip(sizes, fractions, strict=True):
        assert abs(size - part * chunks * chunk) <= 2 * chunk


def test_layouts() -> None:
    wanted = recipe(quantization__basis__levels="midrise", quantization__basis__block_size=32)
    group = group_of(64)
    segments = (0, 16, 0, 48)
    assert basis_layout(wanted, group, segments) == Layout(64, 32, 32, segments, 0, True, DENSE)
    first = projection_layout(wanted, group, group.sites[0], "fc1", segments)
    assert first == Layout(64, 64, 16, segments, 1, False, BITMAP)
    tall = site(0, hidden=128)
    assert projection_layout(wanted, group, tall, "fc1", segments) == Layout(128, 64, 16, segments, 1, False, BITMAP)
    assert projection_layout(wanted, group, tall, "fc2", segments) == Layout(64, 128, 16, segments, 0, False, BITMAP)
    wanted = n_of_m("1:4", quantization__projections__levels="midrise")
    layout = projection_layout(wanted, group, group.sites[0], "fc2", (0, 64, 0, 0))
    assert layout == Layout(64, 64, 32, (0, 64, 0, 0), 0, True, Pattern(1, 4))


def test_sizes_by_hand() -> None:
    group = group_of(64)
    # Basis 64 x 32 at 4 bits, four projections of 64 x 64 at 2 bits, a quarter of them kept.
    size = group_size(n_of_m("1:4"), group, (0, 64, 0, 0), (0, 0, 0, 64))
    assert size.codes == 64 * 32 * 4 // 8 + 4 * 1024 * 2 // 8
    assert size.pattern == 4 * 1024 * 2 // 8
    assert size.scales == 2 * (64 * 2 + 4 * 64 * 2)
    assert size.values == 64 * 32 + 4 * 1024
    assert size.value_bits == 64 * 32 * 4 + 4 * 1024 * 2
    assert size.stored == size.codes + size.pattern + size.scales
    bitmap = group_size(recipe(), group, (0, 64, 0, 0), (0, 0, 0, 64))
    assert bitmap.pattern == 4 * 4096 // 8
    assert bitmap.codes == size.codes
    assert bitmap.scales == 2 * (64 * 2 + 4 * 64 * 4)
    dense = group_size(n_of_m("dense"), group, (0, 64, 0, 0), (0, 0, 32, 32))
    assert dense.pattern == 0
    assert dense.codes == 64 * 32 * 4 // 8 + 4 * 64 * 32 * (3 + 2) // 8
    assert dense.values == 64 * 32 + 4 * 4096


def test_layouts_and_sizes_of_the_dense_baseline() -> None:
    wanted = dense_recipe(quantization__projections={"bits": 3, "block_size": 32, "levels": "midrise"})
    member = site(0, 32, 64, gated=True)
    (group,) = make_plan(wanted, [member]).groups
    segments = given_segments(wanted, group)
    assert segments == ((0, 0, 0, 0), (0, 0, 32, 0))
    for name, shape in (("gate_proj", (64, 32)), ("up_proj", (64, 32)), ("down_proj", (32, 64))):
        layout = projection_layout(wanted, group, member, name, segments[1])
        assert layout.submatrices() == [(3, slice(0, shape[0]), slice(0, shape[1]))]
        assert (layout.block_size, layout.midrise, layout.pattern) == (32, True, DENSE)
    size = group_size(wanted, group, *segments)
    weights = 3 * 32 * 64
    assert (size.values, size.value_bits) == (weights, 3 * weights)
    assert (size.codes, size.pattern, size.scales) == (3 * weights // 8, 0, 2 * weights // 32)


@pytest.mark.parametrize(
    ("length", "wanted", "smallest", "block_size", "stored"),
    [
        (768, 256, 8, 256, 768),
        (576, 128, 8, 64, 576),  # SmolLM2's width: 640 values in blocks of 128 would take more
        (192, 128, 8, 64, 192),
        (96, 128, 8, 32, 96),
        (1152, 256, 8, 128, 1152),
        (4304, 128, 8, 128, 4352),  # 1.1 % of zeros; blocks of 16, which divide, take a bit a value for scales
        (4304, 256, 64, 256, 4352),
        (4304, 16, 8, 16, 4304),
        (172, 128, 8, 64, 192),
        (172, 64, 32, 64, 192),
        (200, 128, 8, 32, 224),
        (72, 128, 8, 16, 80),
        (24, 16, 8, 8, 24),
        (100, 128, 8, 128, 128),
        (1, 256, 8, 8, 8),
    ],
)
def test_block_sizes_of_rows(length: int, wanted: int, smallest: int, block_size: int, stored: int) -> None:
    assert fitting_block_size(length, wanted, smallest) == block_size
    assert padded_to_blocks(length, block_size) == stored


@given(length=st.integers(1, 5000), wanted=st.sampled_from([16, 32, 64, 128, 256]))
def test_block_sizes_take_the_fewest_bits(length: int, wanted: int) -> None:
    sizes = [size for size in (8, 16, 32, 64, 128, 256) if size <= wanted]
    bits = {size: -(-length // size) * (4 * size + 16) for size in sizes}
    assert fitting_block_size(length, wanted, 8) == max(size for size in sizes if bits[size] == min(bits.values()))
    if length % wanted == 0:
        assert fitting_block_size(length, wanted, 8) == wanted


def test_layouts_are_filled_up() -> None:
    """SigLIP's widths: rows of the model dimension take smaller blocks, rows of the MLP width are filled up."""
    wanted = n_of_m("1:4", quantization__basis__block_size=256, quantization__projections__block_size=128)
    (group,) = make_plan(wanted, [site(0, 1152, 4304), site(1, 1152, 4304)]).groups
    basis, projections = given_segments(wanted, group)
    assert basis is not None
    assert projections is not None
    layout = basis_layout(wanted, group, basis)
    assert (layout.rows, layout.columns, layout.block_size) == (group.rank, 1152, 128)
    first = projection_layout(wanted, group, group.sites[0], "fc1", projections)
    assert (first.rows, first.columns, first.block_size, first.segments) == (4352, group.rank, 128, projections)
    last = projection_layout(wanted, group, group.sites[0], "fc2", projections)
    assert (last.rows, last.columns, last.block_size, last.segments) == (group.rank, 4352, 128, projections)
    plan = make_plan(wanted, list(group.sites))
    assert [str(row) for row in fitted_rows(plan)] == [
        "quantization.basis.block_size: 256 does not divide the model dimension 1,152; its rows are stored in blocks "
        "of 128",
        "quantization.projections.block_size: 128 does not divide the MLP width 4,304; its rows are stored filled up "
        "to 4,352, in blocks of 128",
    ]
    size = group_size(wanted, group, basis, projections)
    entries = 4 * 4352 * group.rank // 4
    assert size.codes == group.rank * 1152 // 2 + entries // 2
    assert size.pattern == entries // 4
    assert size.scales == 2 * (group.rank * 9 + 2 * 4352 * group.rank // 128 + 2 * group.rank * 34)
    assert size.value_bits == 4 * (group.rank * 1152 + 4 * 4304 * group.rank // 4)


def test_layouts_of_whole_matrices_are_filled_up() -> None:
    wanted = dense_recipe(quantization__projections={"bits": 3, "block_size": 64})
    member = site(0, 72, 200, gated=True)
    (group,) = make_plan(wanted, [member]).groups
    segments = given_segments(wanted, group)[1]
    assert segments is not None
    for name in member.first:
        layout = projection_layout(wanted, group, member, name, segments)
        assert (layout.rows, layout.columns, layout.block_size) == (224, 80, 16)
        assert layout.submatrices() == [(3, slice(0, 224), slice(0, 80))]
    layout = projection_layout(wanted, group, member, "down_proj", segments)
    assert (layout.rows, layout.columns, layout.block_size) == (72, 224, 32)
    size = group_size(wanted, group, segments_with({}), segments)
    assert size.codes == (2 * 224 * 80 + 72 * 224) * 3 // 8
    assert size.value_bits == 3 * 3 * 72 * 200


# --- budget -------------------------------------------------------------------------------------------------------


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
def test_budget_by_hand(budget: float, width: int, columns: int, sparsity: float, rank: float) -> None:
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
