"""What a run does differently for image classifiers and for language models, behind one interface."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.recipe.schema import Recipe
from pipeline.tasks.base import Task

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.text import TextData


def make_task(
    recipe: Recipe, artifact: Path | None = None, expected: "Callable[[TextData], Tensor] | None" = None
) -> Task:
    """The task of a recipe, its data loaded; the model not yet.

    ``artifact``: folder of an artefact whose own preprocessing or tokenizer is to be used. ``expected``: frequencies of
    a language model's tokens, by which a vocabulary is cut (:class:`CausalLMTask`). Raises InputError for
    a model or data that cannot be found or do not go together.
    """
    if recipe.is_language_model:
        from pipeline.tasks.causal_lm import CausalLMTask

        return CausalLMTask(recipe, artifact, expected)
    from pipeline.tasks.image_classification import ImageClassificationTask

    return ImageClassificationTask(recipe, artifact)
