"""What can be refused before anything is computed: blocks that do not divide."""

from collections.abc import Sequence
from typing import Any

from pipeline.estimate.sizes import rest_linears
from pipeline.plumbing.errors import InputError
from pipeline.recipe.plan import MLPSite
from pipeline.recipe.schema import Recipe

_OFFENDERS_NAMED = 3


def check_rest_blocks(recipe: Recipe, model: Any, sites: Sequence[MLPSite]) -> None:
    """Raise InputError where ``quantization.rest.block_size`` does not divide what it has to."""
    rest = recipe.quantization.rest
    uneven = []
    for name, linear in rest_linears(model, sites).items():
        if rest.linear_bits and linear.in_features % rest.block_size:
            uneven.append(f"{name}: {linear.in_features}")
    if rest.embedding_bits and model.config.hidden_size % rest.block_size:
        uneven.append(f"token table: {model.config.hidden_size}")
    if uneven:
        unnamed = len(uneven) - _OFFENDERS_NAMED
        more = f" and {unnamed} more" if unnamed > 0 else ""
        raise InputError(
            f"recipe {recipe.name}: quantization.rest.block_size: {rest.block_size} does not divide the inputs of "
            f"{', '.join(uneven[:_OFFENDERS_NAMED])}{more}; take a smaller one"
        )
