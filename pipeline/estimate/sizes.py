"""Bytes of what an artefact stores: packed factors, and the weights outside the compressed MLPs."""

import math
from typing import Any

from torch import nn

from exporters.nbits import block_size_for
from fips_ort.layout import Segments, padded_to_blocks, segments_with
from pipeline.recipe.plan import GroupPlan, GroupSize, Plan, given_segments, group_size
from pipeline.recipe.schema import Recipe

_SCALE_BITS = 16
"""Bits of the scale that each block of n-bit weights has: a float16."""


def least_size(recipe: Recipe, group: GroupPlan) -> GroupSize:
    """Bytes of a group's packed factors; those whose bits are left to allocation have 2 each."""
    basis, projections = least_segments(recipe, group)
    return group_size(recipe, group, basis, projections)


def least_segments(recipe: Recipe, group: GroupPlan) -> tuple[Segments, Segments]:
    """Segments of (basis, projections) of a group; 2 bits for the whole rank axis where they are allocated later."""
    two_bits = segments_with({2: group.rank})
    basis, projections = given_segments(recipe, group)
    return basis or two_bits, projections or two_bits


def rest_bytes(recipe: Recipe, model: Any, plan: Plan) -> int:
    """Bytes of the weights outside the compressed MLPs; a tied token table is stored once."""
    rest = recipe.quantization.rest
    compressed = {path for group in plan.groups for site in group.sites for path in site.linear_paths}
    tables = (model.get_input_embeddings(), model.get_output_embeddings()) if recipe.is_language_model else ()
    total = 0
    seen: set[int] = set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or (name in compressed and parameter.dim() == 2):
                continue
            seen.add(id(parameter))
            bits: float = 16 if rest.weights == "float16" else 32
            if parameter.dim() == 2:
                if any(module is table for table in tables):
                    bits = rest.embedding_bits or bits
                elif isinstance(module, nn.Linear) and name != "classifier":
                    bits = rest.linear_bits or bits
                if bits < 16:
                    rows, columns = parameter.shape
                    block_size = block_size_for(columns, rest.block_size)
                    stored = padded_to_blocks(columns, block_size)
                    total += rows * (stored * int(bits) + stored // block_size * _SCALE_BITS) // 8
                    continue
            total += math.ceil(parameter.numel() * bits / 8)
    return total
