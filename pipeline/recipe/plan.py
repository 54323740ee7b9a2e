"""Recipe × model, before any expensive work: groups, ranks, layouts and sizes, and everything that cannot work.

The rank of a shared basis follows from the parameter budget: FiPS (arXiv 2411.09816), section 3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np

from fips_ort.layout import (
    DENSE,
    Layout,
    Pattern,
    Segments,
    fitting_block_size,
    padded_to_blocks,
    segments_with,
    smallest_block_size,
)
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import LARGEST_BUDGET, BlockSize, Compression, FactorScheme, OneWidth, Recipe


@dataclass(frozen=True)
class MLPSite:
    """One MLP of a model.

    ``block``: running index over the whole model, in execution order. ``path``: module path of the MLP. ``first``:
    child names of the linears that read the input, gate before up. ``last``: child name of the last linear.
    ``activation``: child name of the activation module. ``width``: model dimension d of this block. ``hidden``: output
    dimension of each first linear. ``output_scale``: path of the layer-scale parameter [d] that multiplies the MLP's
    output, if there is one.
    """

    block: int
    path: str
    first: tuple[str, ...]
    last: str
    activation: str
    width: int
    hidden: int
    output_scale: str | None

    @property
    def linears(self) -> tuple[str, ...]:
        """Child names of all linears, in the order of computation."""
        return (*self.first, self.last)

    @property
    def linear_paths(self) -> tuple[str, ...]:
        """Module paths of all linears, in the order of computation."""
        return tuple(f"{self.path}.{name}" for name in self.linears)

    @property
    def columns(self) -> int:
        """Columns that the MLP's matrices have side by side, with the model dimension as rows."""
        return self.hidden * len(self.linears)


def group_name(index: int) -> str:
    """Name of the group with number ``index`` in the recipe: in folders, files and reports."""
    return f"group_{index}"


@dataclass(frozen=True)
class GroupPlan:
    """A group of blocks that share one basis: ``rank`` entries of width ``width``.

    ``has_basis`` False: the dense baseline, whose blocks are groups of their own. It is the factorization with the
    identity for a basis (so ``rank`` is ``width``), which need not be stored.
    """

    index: int
    sites: tuple[MLPSite, ...]
    width: int
    columns: int
    rank: int
    has_basis: bool = True

    @property
    def name(self) -> str:
        return group_name(self.index)

    @property
    def dense_parameters(self) -> int:
        """Entries of all matrices of the dense MLPs."""
        return self.width * self.columns

    @property
    def parameters(self) -> int:
        """Entries of all factors, whatever a mask leaves of them."""
        return self.rank * (self.columns + self.width * self.has_basis)


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a model: its groups, and the blocks it leaves dense.

    ``recipes``: the recipe as it applies to each group, by name; they differ where an allocation has chosen
    (:mod:`pipeline.stages.allocate`).
    """

    groups: tuple[GroupPlan, ...]
    dense_blocks: tuple[int, ...]
    recipes: Mapping[str, Recipe]


def make_plan(recipe: Recipe, sites: list[MLPSite], chosen: Mapping[str, Recipe] | None = None) -> Plan:
    """Check a recipe against the MLPs of a model and derive the ranks. ``chosen``: recipes of single groups, by name.

    Raises InputError listing every offender: group indices out of range or used twice, groups of unequal
    width, a rank below one block, bits graded along a rank axis that is not there.
    """
    problems: list[str] = []
    if recipe.compression.method == "dense" and not isinstance(recipe.quantization.projections.bits, int):
        problems.append(
            "quantization.projections.bits: graded bits follow the rank axis of a factorization, which "
            f"compression.method dense does not have; take one of {', '.join(map(str, get_args(OneWidth)))}"
        )
    groups = _group_sites(recipe, sites, problems)
    plans = []
    recipes: dict[str, Recipe] = {}
    for index, members in groups:
        own = (chosen or {}).get(group_name(index), recipe)
        plan = _plan_group(own, index, members, problems)
        if plan is not None:
            plans.append(plan)
            recipes[plan.name] = own
    if problems:
        raise InputError("\n".join(f"recipe {recipe.name}: {problem}" for problem in problems))
    grouped = {site.block for group in plans for site in group.sites}
    return Plan(tuple(plans), tuple(site.block for site in sites if site.block not in grouped), recipes)


def _group_sites(recipe: Recipe, sites: list[MLPSite], problems: list[str]) -> list[tuple[int, list[MLPSite]]]:
    """(number in the recipe, MLPs) of every group that can share a basis; what cannot goes to ``problems``."""
    wanted = recipe.compression.groups
    if isinstance(wanted, int):
        wanted = [list(range(start, min(start + wanted, len(sites)))) for start in range(0, len(sites), wanted)]
    seen: dict[int, int] = {}
    groups = []
    for number, blocks in enumerate(wanted):
        key = f"compression.groups.{number}"
        if not blocks:
            problems.append(f"{key}: the group is empty; remove it")
        outside = [block for block in blocks if not 0 <= block < len(sites)]
        if outside:
            problems.append(f"{key}: blocks {outside} do not exist; the model has blocks 0 to {len(sites) - 1}")
        for block in blocks:
            if block in seen:
                where = "twice in this group" if seen[block] == number else f"in group {seen[block]} already"
                problems.append(f"{key}: block {block} is {where}; a block belongs to one group")
            seen[block] = number
        members = [sites[block] for block in blocks if 0 <= block < len(sites)]
        widths = sorted({site.width for site in members})
        if len(widths) > 1:
            listed = ", ".join(f"block {site.block}: {site.width}" for site in members)
            problems.append(f"{key}: blocks of unequal width cannot share a basis ({listed}); split the group")
        elif members:
            groups.append((number, members))
    return groups


def _plan_group(recipe: Recipe, index: int, sites: list[MLPSite], problems: list[str]) -> GroupPlan | None:
    compression, quantization = recipe.compression, recipe.quantization
    width = sites[0].width
    columns = sum(site.columns for site in sites)
    block_size = quantization.projections.block_size
    if compression.method == "dense":
        return GroupPlan(index, tuple(sites), width, columns, rank=width, has_basis=False)
    wanted = rank_for_budget(compression.budget, width, columns, compression.target_sparsity)
    # First projections have blocks along the rank axis; rounding down keeps the budget.
    rank = int(wanted) // block_size * block_size
    if rank < 1:
        problems.append(
            f"compression.budget: {compression.budget} gives group {index} rank {wanted:.1f}, less than one block of "
            f"{block_size}; {_remedy_of_small_rank(compression, block_size, wanted)}"
        )
        return None
    return GroupPlan(index, tuple(sites), width, columns, rank)


def _remedy_of_small_rank(compression: Compression, block_size: int, rank: float) -> str:
    """What can be done about a ``rank`` of less than one block: remedies that the schema permits."""
    smallest = smallest_block_size(Pattern.parse(compression.pattern))
    sizes = [size for size in get_args(BlockSize) if size <= rank and size % smallest == 0]
    lower = f"quantization.projections.block_size to {max(sizes)}" if sizes else ""
    # Rounded up, so that the value named is one that works; rank grows with the budget in proportion.
    enough = math.ceil(1000 * compression.budget * block_size / rank) / 1000
    if enough > LARGEST_BUDGET:
        other = "leave these blocks out of compression.groups, or group more of them"
        return f"lower {lower}" if lower else other
    return f"raise the budget to {enough:g}" + (f", or lower {lower}" if lower else "")


# --- budget -------------------------------------------------------------------------------------------------------


def rank_for_budget(budget: float, width: int, columns: int, sparsity: float) -> float:
    """Rank r at which basis and kept projection entries cost ``budget`` of the dense parameters.

    ``p·d·N = d·r + (1-s)·r·N`` with p = ``budget``, d = ``width``, N = ``columns`` (all MLP matrices of the group,
    laid side by side) and s = ``sparsity``. The result is a real number, to be rounded by the caller.
    """
    return budget * width * columns / (width + (1.0 - sparsity) * columns)


def kept_parameters(rank: int, width: int, columns: int, sparsity: float) -> float:
    """Values kept by a factorization of the given rank: basis and non-zero projection entries."""
    return rank * width + (1.0 - sparsity) * rank * columns


# --- layouts ---------------------------------------------------------------------------------------------------


def scheme_segments(scheme: FactorScheme, group: GroupPlan, chunk: int) -> Segments | None:
    """Segments of a group's rank axis, multiples of ``chunk``.

    None if the scheme leaves them to the allocation. The last segment takes what rounding leaves.
    """
    if scheme.bits == "allocate":
        return None
    if isinstance(scheme.bits, int):
        return segments_with({scheme.bits: group.rank})
    sizes: dict[int, int] = {}
    left = group.rank
    for grade in scheme.bits[:-1]:
        size = min(left, round(grade.fraction * group.rank / chunk) * chunk)
        sizes[grade.bits] = size
        left -= size
    sizes[scheme.bits[-1].bits] = left
    return segments_with(sizes)


def given_segments(recipe: Recipe, group: GroupPlan) -> tuple[Segments | None, Segments | None]:
    """Segments of (basis, projections) that follow from the recipe alone; None where they are allocated.

    A basis that is not stored has no entries at any bit-width.
    """
    quantization = recipe.quantization
    chunk = quantization.projections.block_size
    basis = segments_with({}) if quantization.basis is None else scheme_segments(quantization.basis, group, chunk)
    return basis, scheme_segments(quantization.projections, group, chunk)


def basis_layout(recipe: Recipe, group: GroupPlan, segments: Segments) -> Layout:
    """Stored basis: U.T [rank, d], segments along the rows; d filled up to whole blocks."""
    scheme = recipe.quantization.basis
    assert scheme is not None
    midrise = scheme.levels == "midrise"
    block_size = _block_size(group.width, scheme, DENSE)
    columns = padded_to_blocks(group.width, block_size)
    return Layout(group.rank, columns, block_size, segments, segment_axis=0, midrise=midrise)


def projection_layout(recipe: Recipe, group: GroupPlan, site: MLPSite, name: str, segments: Segments) -> Layout:
    """Stored projection: of a first linear V.T [n, rank], of the last V [rank, n]; the contracted axis last.

    Without a basis V is the dense matrix and the rank axis the model dimension. Contracted axes are filled up to whole
    blocks, and so are the rows of the first linears, which write what the last one reads.
    """
    scheme, pattern = recipe.quantization.projections, Pattern.parse(recipe.compression.pattern)
    block_size = _block_size(site.hidden, scheme, pattern)
    hidden = padded_to_blocks(site.hidden, block_size)
    rows, columns, rank_axis = group.rank, hidden, 0
    if name != site.last:
        block_size = _block_size(group.rank, scheme, pattern)
        rows, columns, rank_axis = hidden, padded_to_blocks(group.rank, block_size), 1
        segments = _filled_up(segments, columns - group.rank)
    return Layout(
        rows,
        columns,
        block_size,
        segments,
        segment_axis=rank_axis,
        midrise=scheme.levels == "midrise",
        pattern=pattern,
    )


def _block_size(columns: int, scheme: FactorScheme, pattern: Pattern) -> int:
    """Block size of rows of ``columns`` values: the scheme's wherever it divides them, as it does every rank."""
    return fitting_block_size(columns, scheme.block_size, smallest_block_size(pattern))


def _filled_up(segments: Segments, filling: int) -> Segments:
    """Segments whose last one is longer by ``filling``."""
    last = max(index for index, size in enumerate(segments) if size)
    return tuple(size + filling * (index == last) for index, size in enumerate(segments))


@dataclass(frozen=True, order=True)
class FittedRows:
    """Rows of ``length`` values that a recipe's block size, at ``key``, does not divide: they are stored in blocks of
    ``block_size``. ``axis``: what the length is, in words."""

    key: str
    axis: str
    length: int
    wanted: int
    block_size: int

    @property
    def stored(self) -> int:
        """How many values are stored for such a row, the last of them zeros."""
        return padded_to_blocks(self.length, self.block_size)

    def __str__(self) -> str:
        filled = f"filled up to {self.stored:,}, " if self.stored > self.length else ""
        return (
            f"{self.key}: {self.wanted} does not divide the {self.axis} {self.length:,}; its rows are stored "
            f"{filled}in blocks of {self.block_size}"
        )


def fitted_rows(plan: Plan) -> list[FittedRows]:
    """All lengths of rows that the recipe's block sizes do not divide, each once."""
    found = set()
    for group in plan.groups:
        quantization = plan.recipes[group.name].quantization
        pattern = Pattern.parse(plan.recipes[group.name].compression.pattern)
        rows = [("projections", quantization.projections, pattern, "MLP width", site.hidden) for site in group.sites]
        if quantization.basis is not None:
            rows.append(("basis", quantization.basis, DENSE, "model dimension", group.width))
        else:
            rows.append(("projections", quantization.projections, pattern, "model dimension", group.width))
        for key, scheme, stored_as, axis, length in rows:
            if length % scheme.block_size:
                size = _block_size(length, scheme, stored_as)
                found.add(FittedRows(f"quantization.{key}.block_size", axis, length, scheme.block_size, size))
    return sorted(found)


# --- sizes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupSize:
    """Promised sizes of a group's packed factors.

    ``values``: entries that are kept. ``value_bits``: bits of their codes, which the paper counts. ``codes``,
    ``pattern``, ``scales``: stored bytes, those of what fills up rows and columns included.
    """

    values: float
    value_bits: float
    codes: int
    pattern: int
    scales: int

    @property
    def stored(self) -> int:
        """Bytes in all."""
        return self.codes + self.pattern + self.scales


def group_size(recipe: Recipe, group: GroupPlan, basis: Segments, projections: Segments) -> GroupSize:
    """Sizes of a group's packed factors with the given segments of the rank axis; bitmaps at the target sparsity."""
    sparsity = recipe.compression.target_sparsity
    layouts = [(basis_layout(recipe, group, basis), (group.rank, group.width))] if group.has_basis else []
    for site in group.sites:
        for name in site.linears:
            shape = (group.rank, site.hidden) if name == site.last else (site.hidden, group.rank)
            layouts.append((projection_layout(recipe, group, site, name, projections), shape))
    codes = pattern = scales = 0
    value_bits = 0.0
    for layout, shape in layouts:
        density = 1.0 if layout.pattern == DENSE else 1.0 - sparsity
        kept = []
        for bits, rows, columns in layout.submatrices():
            entries = (min(rows.stop, shape[0]) - rows.start) * (min(columns.stop, shape[1]) - columns.start)
            kept.append(round(entries * density))
            value_bits += entries * density * bits
        codes += layout.code_bytes(kept)
        pattern += layout.pattern_bytes
        scales += 2 * int(np.prod(layout.stored_scales_shape))
    values = kept_parameters(group.rank, group.width * group.has_basis, group.columns, sparsity)
    return GroupSize(values, value_bits, codes, pattern, scales)
