"""Bytes of the weights outside the compressed MLPs, as an artefact stores them."""

from collections.abc import Mapping, Sequence
from typing import Any

from exporters.packed_rest import rest_block_size
from fips_ort.layout import padded_to_blocks
from pipeline.quantization.rest_layers import RestBits, rest_bits
from pipeline.recipe.plan import MLPSite, Plan
from pipeline.recipe.schema import Recipe, Tier

_SCALE_BYTES = 2
"""Bytes of the scale that each block has: a float16."""


def rest_bytes(recipe: Recipe, model: Any, sites: Sequence[MLPSite], plan: Plan) -> int:
    """Bytes of all weights outside the compressed MLPs, with the bits that ``recipe`` gives them; a tied token table is
    stored once. ``sites``: all MLPs of ``model``, which need not have values."""
    bits = rest_bits(recipe, model, sites)
    packed = {id(model.get_submodule(path).weight) for path in bits}
    compressed = {path for group in plan.groups for site in group.sites for path in site.linear_paths}
    plain = {
        id(parameter): parameter.numel()
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
        if id(parameter) not in packed and not (name in compressed and parameter.dim() == 2)
    }
    each = 2 if recipe.quantization.rest.weights == "float16" else 4
    return each * sum(plain.values()) + packed_bytes(model, bits, recipe.quantization.rest.block_size)


def packed_bytes(model: Any, bits: Mapping[str, RestBits], block_size: int) -> int:
    """Bytes of weights of ``model`` stored with ``bits``, by path."""
    return sum(
        _matrix_bytes(*_shape(model, path), width, block_size)
        for path, width in bits.items()
    )


def _shape(model: Any, path: str) -> tuple[int, int]:
    rows, columns = model.get_submodule(path).weight.shape
    return rows, columns


def _matrix_bytes(rows: int, columns: int, bits: int | Sequence[Tier], block_size: int) -> int:
    """Bytes of a packed matrix [rows, columns], of a table in tiers also of the bits of each row."""
    block_size = rest_block_size(columns, block_size)
    stored = padded_to_blocks(columns, block_size)
    scales = rows * (stored // block_size) * _SCALE_BYTES
    if isinstance(bits, int):
        return rows * stored * bits // 8 + scales
    counts = [tier.tokens or 0 for tier in bits]
    counts[-1] = rows - sum(counts)
    return sum(count * stored * tier.bits // 8 for count, tier in zip(counts, bits, strict=True)) + scales + rows
