"""What can be refused before anything is computed: blocks that do not divide, texts that are too long."""

from collections.abc import Sequence
from typing import Any

from exporters.causal_lm import MAX_LENGTH
from pipeline.estimate.sizes import rest_linears
from pipeline.evaluation.text_speed import GENERATED_TOKENS
from pipeline.models.causal_lm import longest_text
from pipeline.plumbing.errors import InputError
from pipeline.recipe.plan import MLPSite
from pipeline.recipe.schema import Recipe, TextSection

_OFFENDERS_NAMED = 3


def check_lengths(recipe: Recipe, config: Any) -> None:
    """Raise InputError if texts are longer than the language model of configuration ``config`` takes."""
    longest = longest_text(config)
    limited = f"config.json: max_position_embeddings: {config.max_position_embeddings}"
    if longest <= GENERATED_TOKENS:
        raise InputError(f"{limited}: too short: {GENERATED_TOKENS} tokens are generated to measure speed")
    context = recipe.data.context if isinstance(recipe.data, TextSection) else 0
    if context > longest:
        why = limited if longest < MAX_LENGTH else "no model is exported for more"
        raise InputError(f"data.context: {context} is more than the {longest} tokens that the model takes ({why})")


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
