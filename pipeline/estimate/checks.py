"""What can be refused before anything is computed: inputs that are not there, blocks that do not divide."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.estimate.sizes import rest_linears
from pipeline.plumbing.errors import InputError
from pipeline.recipe.plan import MLPSite
from pipeline.recipe.schema import CausalLanguageModel, ImageFolderData, LocalTextData, PretrainedModel, Recipe

_OFFENDERS_NAMED = 3


def check_inputs(recipe: Recipe) -> None:
    """Raise InputError naming a folder or file of the recipe's data that is not there, or a revision of a model that
    has none."""
    model, data = recipe.model, recipe.data
    if isinstance(model, PretrainedModel | CausalLanguageModel) and model.revision and Path(model.path).is_dir():
        raise InputError(
            f"recipe {recipe.name}: model.revision: {model.revision}: model.path {model.path} is a folder, and has no "
            "revisions; leave it out"
        )
    if isinstance(data, ImageFolderData):
        for name in (data.train, data.test):
            if not (Path(data.path) / name).is_dir():
                raise InputError(f"data.path: {Path(data.path) / name}: no such folder; expected LABEL/image.* in it")
    if isinstance(data, LocalTextData):
        for key, file in (("train", data.train), ("test", data.test)):
            if file is not None and not Path(file).is_file():
                raise InputError(f"data.{key}: {file}: no such file")


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
