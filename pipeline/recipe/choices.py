"""What an allocation chooses from for each group of blocks: the combinations that a recipe allows."""

import itertools
from dataclasses import dataclass
from typing import Any

from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import Recipe


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
    """Return ``recipe`` with the choice that has most parameters, for estimates."""
    assert recipe.allocate is not None
    budgets, sparsities = recipe.allocate.budgets, recipe.allocate.sparsities
    return Choice(max(budgets) if budgets else None, min(sparsities) if sparsities else None, None).apply(recipe)
