"""What lies outside the MLPs and can be packed, and the blocks that it is stored in."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from exporters.packed_rest import rest_block_size
from pipeline.plumbing.errors import InputError
from pipeline.recipe.plan import FittedRows, MLPSite
from pipeline.recipe.schema import Recipe


def rest_linears(model: Any, sites: Sequence[MLPSite]) -> dict[str, nn.Linear]:
    """Linear layers outside the MLPs that the rest's bits apply to, not the classifier or output layer, by path."""
    mlps = {path for site in sites for path in site.linear_paths}
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name != "classifier" and name not in mlps
    }


def check_tiers(recipe: Recipe, model: Any) -> None:
    """Raise InputError if the tiers of the token table leave no token for the last one."""
    tiers = recipe.quantization.rest.embedding_bits
    if not isinstance(tiers, list):
        return
    given, tokens = sum(tier.tokens or 0 for tier in tiers), len(model.get_output_embeddings().weight)
    if given >= tokens:
        raise InputError(
            f"recipe {recipe.name}: quantization.rest.embedding_bits: the tiers before the last take {given:,} tokens, "
            f"and the vocabulary has {tokens:,}; give them fewer"
        )


def fitted_rest(recipe: Recipe, model: Any, sites: Sequence[MLPSite]) -> list[FittedRows]:
    """Lengths of rows that ``quantization.rest.block_size`` does not divide, each once."""
    rest = recipe.quantization.rest
    lengths = {linear.in_features for linear in rest_linears(model, sites).values()} if rest.linear_bits else set()
    if rest.embedding_bits:
        lengths.add(model.config.hidden_size)
    key, wanted = "quantization.rest.block_size", rest.block_size
    return [
        FittedRows(key, "input features", length, wanted, rest_block_size(length, wanted))
        for length in sorted(lengths)
        if length % wanted
    ]
