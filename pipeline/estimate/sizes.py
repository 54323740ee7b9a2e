"""Bytes of what an artefact stores: packed factors, and the weights outside the compressed MLPs."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from exporters.packed_rest import rest_block_size
from fips_ort.layout import Segments, padded_to_blocks, segments_with
from pipeline.recipe.plan import GroupPlan, GroupSize, Plan, given_segments, group_size
from pipeline.recipe.schema import Recipe, Tier

_SCALE_BYTES = 2
"""Bytes of the scale that each block has: a float16."""


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
            bits: int | Sequence[Tier] | None = None
            if parameter.dim() == 2:
                if any(module is table for table in tables):
                    bits = rest.embedding_bits
                elif isinstance(module, nn.Linear) and name != "classifier":
                    bits = rest.linear_bits
            if bits is None:
                total += parameter.numel() * (2 if rest.weights == "float16" else 4)
            else:
                rows, columns = parameter.shape
                total += _packed_bytes(rows, columns, bits, rest.block_size)
    return total


def _packed_bytes(rows: int, columns: int, bits: int | Sequence[Tier], block_size: int) -> int:
    """Bytes of a packed matrix [rows, columns], of a table in tiers also of the bits of each row."""
    block_size = rest_block_size(columns, block_size)
    stored = padded_to_blocks(columns, block_size)
    scales = rows * (stored // block_size) * _SCALE_BYTES
    if isinstance(bits, int):
        return rows * stored * bits // 8 + scales
    counts = [tier.tokens or 0 for tier in bits]
    counts[-1] = rows - sum(counts)
    return sum(count * stored * tier.bits // 8 for count, tier in zip(counts, bits, strict=True)) + scales + rows
