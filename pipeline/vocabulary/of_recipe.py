"""A recipe's cut vocabulary, from its model's tokenizer and its text."""

from typing import Any

import torch
from torch import Tensor

from exporters.genai_config import compact_tokenizer
from pipeline.data.text import TextData
from pipeline.data.token_bytes import content_of
from pipeline.models.causal_lm import load_generation_config, load_language_config, longest_text
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import LanguageModelSection, Recipe, TextDataSection
from pipeline.vocabulary.cut import CutVocabulary, cut_vocabulary
from pipeline.vocabulary.cut_model import named_ids
from pipeline.vocabulary.frequency import frequency_order
from pipeline.vocabulary.respelled import RespelledText, respell


def cut_for(
    recipe: Recipe, tokenizer: Any, data: TextData | None, expected: Tensor | None = None
) -> CutVocabulary:
    """Cut the vocabulary of a recipe's model, whose tokenizer is ``tokenizer``, as the recipe says.

    ``data``: the recipe's text in the full vocabulary; None where it is not read yet, and no token is more frequent
    than another. ``expected``: float64 [vocabulary], by which tokens are kept that the text has equally often
    (:func:`pipeline.vocabulary.frequency.expected_frequencies`); None where the model is not read, and ids decide.
    Raises InputError as :func:`cut_vocabulary` does.
    """
    section = recipe.model
    assert recipe.vocabulary is not None
    assert isinstance(section, LanguageModelSection)
    config = load_language_config(section)
    rows = int(config.vocab_size)
    text = torch.empty(0, dtype=torch.int32) if data is None else data.train.tokens
    counts = torch.bincount(text, minlength=rows)
    order = frequency_order(counts, torch.zeros(len(counts)) if expected is None else expected).tolist()
    named = named_ids(config, load_generation_config(section))
    return cut_vocabulary(recipe.vocabulary, tokenizer, rows, named, order)


def respelled_text(recipe: Recipe, data: TextData, vocabulary: CutVocabulary) -> RespelledText:
    """A recipe's text, ``data``, in its cut vocabulary.

    Raises InputError where that has none of the text's tokens left, or where the text of a window becomes longer than
    the model takes.
    """
    section = recipe.model
    assert isinstance(section, LanguageModelSection)
    assert isinstance(recipe.data, TextDataSection)
    assert recipe.vocabulary is not None
    text = respell(data, vocabulary, practise=recipe.vocabulary.keep is not None)
    longest = longest_text(load_language_config(section))
    tokens = int(text.test.strided(recipe.evaluation.stride).sizes().max())
    if tokens > longest:
        raise InputError(
            f"data.context: {recipe.data.context}: the text of a test window takes up to {tokens} tokens of the cut "
            f"vocabulary, and the model takes {longest}; lower data.context, or keep more of the vocabulary"
        )
    return text


def tokenizer_bytes(tokenizer: Any) -> int:
    """Count the bytes of ``tokenizer.json`` in an artefact with this tokenizer."""
    return len(compact_tokenizer(content_of(tokenizer)).encode())
