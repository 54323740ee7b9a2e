"""What can be refused before anything is computed: texts that are too long, matrices that cannot be stored so."""

from typing import Any

import torch

from exporters.causal_lm import MAX_LENGTH
from pipeline.evaluation.text_speed import GENERATED_TOKENS
from pipeline.models.causal_lm import longest_text
from pipeline.plumbing.errors import InputError
from pipeline.recipe.plan import Plan, fitted_rows
from pipeline.recipe.schema import Recipe, TextSection


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


def check_filling(recipe: Recipe, model: Any, plan: Plan) -> None:
    """Raise InputError where rows of an MLP's last matrix are filled up, and what fills them would count: without a
    gate and with levels of which none is zero, the activation of zero has to be zero."""
    scheme, pattern = recipe.quantization.projections, recipe.compression.pattern
    if scheme.levels != "midrise" or pattern == "bitmap":
        return
    filled = {row.length for row in fitted_rows(plan) if row.stored > row.length}
    for group in plan.groups:
        for site in group.sites:
            activation = model.get_submodule(f"{site.path}.{site.activation}")
            if site.hidden in filled and len(site.first) == 1 and activation(torch.zeros(1)).any():
                raise InputError(
                    f"recipe {recipe.name}: quantization.projections.levels: midrise has no level at zero, and rows of "
                    f"{site.hidden} values are filled up to whole blocks behind an activation that is not zero at zero "
                    f"({type(activation).__name__} of block {site.block}); take midtread"
                )
