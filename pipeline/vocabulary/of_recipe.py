"""A recipe's cut vocabulary, from its model's tokenizer and its text."""

from typing import Any

import torch

from exporters.genai_config import compact_tokenizer
from pipeline.data.text import TextData
from pipeline.data.token_bytes import content_of
from pipeline.models.causal_lm import load_generation_config, load_language_config
from pipeline.recipe.schema import LanguageModelSection, Recipe
from pipeline.vocabulary.cut import CutVocabulary, cut_vocabulary
from pipeline.vocabulary.cut_model import named_ids


def cut_for(recipe: Recipe, tokenizer: Any, data: TextData | None) -> CutVocabulary:
    """Cut the vocabulary of a recipe's model, whose tokenizer is ``tokenizer``, as the recipe says.

    ``data``: the recipe's text in the full vocabulary; None where it is not read yet, and no token is more frequent
    than another. Raises InputError as :func:`cut_vocabulary` does.
    """
    section = recipe.model
    assert recipe.vocabulary is not None
    assert isinstance(section, LanguageModelSection)
    config = load_language_config(section)
    rows = int(config.vocab_size)
    text = torch.empty(0, dtype=torch.int32) if data is None else data.train.tokens
    counts = torch.bincount(text, minlength=rows).tolist()
    named = named_ids(config, load_generation_config(section))
    return cut_vocabulary(recipe.vocabulary, tokenizer, rows, named, counts)


def tokenizer_bytes(tokenizer: Any) -> int:
    """Count the bytes of ``tokenizer.json`` in an artefact with this tokenizer."""
    return len(compact_tokenizer(content_of(tokenizer)).encode())
