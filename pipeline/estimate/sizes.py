"""Bytes of packed factors, as an artefact stores them."""

from fips_ort.layout import Segments, segments_with
from pipeline.recipe.plan import GroupPlan, GroupSize, given_segments, group_size
from pipeline.recipe.schema import Recipe


def least_size(recipe: Recipe, group: GroupPlan) -> GroupSize:
    """Bytes of a group's packed factors; those whose bits are left to allocation have 2 each."""
    basis, projections = least_segments(recipe, group)
    return group_size(recipe, group, basis, projections)


def least_segments(recipe: Recipe, group: GroupPlan) -> tuple[Segments, Segments]:
    """Segments of (basis, projections) of a group; 2 bits for the whole rank axis where they are allocated later."""
    two_bits = segments_with({2: group.rank})
    basis, projections = given_segments(recipe, group)
    return basis or two_bits, projections or two_bits
