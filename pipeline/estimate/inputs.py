"""A recipe's inputs, asked for before anything is computed: is all of it there, and do model and data go together?"""

from pathlib import Path
from typing import Any

from pipeline.data.hub import check_splits_differ
from pipeline.data.images import check_data
from pipeline.data.samples import check_samples_asked, check_train_samples
from pipeline.data.text import check_vocabulary, describe_tokens, load_text_data, tokens_beyond
from pipeline.evaluation.perplexity import check_windows
from pipeline.models.causal_lm import load_language_config, load_tokenizer
from pipeline.models.checkpoint import check_no_file
from pipeline.models.image_classifier import load_preprocessing
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import (
    CausalLanguageModel,
    HubTextData,
    ImageDataSection,
    ImageModelSection,
    LanguageModelSection,
    LocalTextData,
    PretrainedModel,
    Recipe,
    TextDataSection,
)


def check_inputs(recipe: Recipe) -> tuple[str, ...]:
    """Raise InputError for what is missing or unfit in a recipe's model and data, the model's weights unread, and
    return notes for the user.

    Data of the hub are left out, since they would be downloaded; a run opens them first of all.
    """
    model, data = recipe.model, recipe.data
    if isinstance(model, PretrainedModel | CausalLanguageModel):
        _check_model_path(model)
    if isinstance(model, LanguageModelSection):
        assert isinstance(data, TextDataSection)
        return _check_text(recipe, model, data)
    assert isinstance(data, ImageDataSection)
    return _check_images(recipe, model, data)


def _check_model_path(model: PretrainedModel | CausalLanguageModel) -> None:
    path = Path(model.path)
    check_no_file(path, f"model.path: {model.path}")
    if model.revision is not None and path.is_dir():
        raise InputError(
            f"model.revision: {model.revision}: {model.path} is a local folder, which has no revisions; leave it out"
        )


def _check_images(recipe: Recipe, model: ImageModelSection, data: ImageDataSection) -> tuple[str, ...]:
    checked = check_data(data, load_preprocessing(model, data), recipe.seed, recipe.evaluation.samples)
    if checked is None:
        return ()
    check_train_samples(recipe, checked.train_samples)
    return checked.notes


def _check_text(recipe: Recipe, model: LanguageModelSection, data: TextDataSection) -> tuple[str, ...]:
    if isinstance(data, LocalTextData):
        for key, file in (("train", data.train), ("test", data.test)):
            if file is not None and not Path(file).is_file():
                problem = "not a file" if Path(file).exists() else "no such file"
                raise InputError(f"data.{key}: {file}: {problem}")
    if isinstance(data, HubTextData):
        check_splits_differ(data)
        if not Path(data.path).exists():
            return ()
    rows = int(load_language_config(model).vocab_size)
    tokenizer = load_tokenizer(model)
    beyond = tokens_beyond(tokenizer, rows)
    _check_windows(recipe, data, tokenizer, rows, whole=bool(beyond))
    if not beyond:
        return ()
    return (
        f"the tokenizer knows tokens for which the model, with {rows} rows in its table, has none: "
        f"{describe_tokens(beyond)}. The text holds none of them, but a prompt that does cannot be answered",
    )


def _check_windows(recipe: Recipe, data: TextDataSection, tokenizer: Any, rows: int, *, whole: bool) -> None:
    """Check as many windows as the recipe asks for, or all of the text if ``whole``."""
    calibration, evaluation = recipe.calibration.samples, recipe.evaluation
    stride = evaluation.stride or data.context
    fewest = 2 + data.context // stride  # of which an evaluation has a standard error
    text = load_text_data(
        data,
        tokenizer,
        recipe.seed,
        None if whole else max(calibration or 1, recipe.allocate.samples if recipe.allocate else 1),
        evaluation.samples or (None if whole else fewest),
    )
    check_vocabulary(text, tokenizer, rows)
    check_train_samples(recipe, len(text.train))
    check_samples_asked("evaluation", evaluation.samples, "test", len(text.test))
    check_windows(text.test.strided(evaluation.stride))
