"""What a recipe's ``vocabulary`` will leave: asked of tokenizer and text, no weight is read."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.data.text import load_text_data
from pipeline.models.causal_lm import load_tokenizer
from pipeline.recipe.schema import HubTextData, LanguageModelSection, Recipe, TextDataSection
from pipeline.vocabulary.cut import CutVocabulary
from pipeline.vocabulary.of_recipe import cut_for, respelled_text, tokenizer_bytes


@dataclass(frozen=True)
class VocabularyEstimate:
    """A cut vocabulary. ``tokens``: how many stay. ``tokenizer_bytes``: of the artefact's ``tokenizer.json``.
    ``respelled``: part of the training text's tokens that are spelled otherwise; None for text that is on the hub."""

    tokens: int
    tokenizer_bytes: int
    respelled: float | None


def estimate_vocabulary(recipe: Recipe) -> tuple[CutVocabulary, VocabularyEstimate] | None:
    """The vocabulary that a recipe leaves, and what is to be known of it; None if it leaves all of it.

    All of the training text is cut into tokens, twice. Raises InputError for a tokenizer that cannot be cut, a ``keep``
    that is less than what has to stay, scripts that the text is not written in, and text that becomes too long.
    """
    if recipe.vocabulary is None:
        return None
    section, source = recipe.data, recipe.model
    assert isinstance(section, TextDataSection)
    assert isinstance(source, LanguageModelSection)
    tokenizer = load_tokenizer(source)
    data = None
    if not isinstance(section, HubTextData) or Path(section.path).exists():
        data = load_text_data(section, tokenizer, recipe.seed, None, recipe.evaluation.samples)
    cut = cut_for(recipe, tokenizer, data)
    respelled = None if data is None else respelled_text(recipe, data, cut).respelled
    return cut, VocabularyEstimate(len(cut.kept), tokenizer_bytes(cut.tokenizer), respelled)
