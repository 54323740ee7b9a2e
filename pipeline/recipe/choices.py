"""What an allocation chooses from, for each group of blocks and for what lies outside the MLPs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import EmbeddingBits, LinearBits, Recipe


@dataclass(frozen=True)
class Choice:
    """What one group can get in place of what the recipe says; None leaves that as it is.

    ``budget``, ``sparsity``: those of ``compression``. ``bits``: those of ``quantization.projections``, a number or
    segments of the rank axis.
    """

    budget: float | None
    sparsity: float | None
    bits: Any

    def apply(self, recipe: Recipe) -> Recipe:
        """Return ``recipe`` with this choice for all groups."""
        content = recipe.model_dump(mode="json")
        if self.budget is not None:
            content["compression"]["budget"] = self.budget
        if self.sparsity is not None:
            content["compression"]["sparsity"] = self.sparsity
        if self.bits is not None:
            content["quantization"]["projections"]["bits"] = self.bits
        return parse_recipe(content, f"recipe {recipe.name}, choice {self}")


def choices_of(recipe: Recipe) -> list[Choice]:
    """Return every combination that the key ``allocate`` of the recipe allows."""
    assert recipe.allocate is not None
    content = recipe.allocate.model_dump(mode="json")
    lists = (content[name] or [None] for name in ("budgets", "sparsities", "bits"))
    return [Choice(*combination) for combination in itertools.product(*lists)]


def largest_choice(recipe: Recipe) -> Recipe:
    """Return ``recipe`` with the choice for all groups that has most parameters, for estimates."""
    assert recipe.allocate is not None
    budgets, sparsities = recipe.allocate.budgets, recipe.allocate.sparsities
    return Choice(max(budgets) if budgets else None, min(sparsities) if sparsities else None, None).apply(recipe)


def rest_choices(recipe: Recipe) -> list[Recipe]:
    """Return ``recipe`` once for every combination of bits outside the MLPs that its ``allocate`` allows, each for all
    layers; the recipe as it is if that leaves them alone."""
    assert recipe.allocate is not None
    rest = recipe.quantization.rest
    linear: Sequence[LinearBits | None] = recipe.allocate.linear_bits or (rest.linear_bits,)
    embedding: Sequence[EmbeddingBits | None] = recipe.allocate.embedding_bits or (rest.embedding_bits,)
    return [
        recipe.model_copy(
            update={
                "quantization": recipe.quantization.model_copy(
                    update={"rest": rest.model_copy(update={"linear_bits": linears, "embedding_bits": tables})}
                )
            }
        )
        for linears, tables in itertools.product(linear, embedding)
    ]
