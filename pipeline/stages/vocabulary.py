"""How often the dense model expects each token: what a vocabulary is cut by, before there is a cut model."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.data.text import TextData, check_vocabulary
from pipeline.models.causal_lm import load_language_model
from pipeline.models.causal_lm_parts import output_table
from pipeline.plumbing.files import write_aside
from pipeline.plumbing.progress import Advance, Progress
from pipeline.plumbing.run_folder import RunFolder
from pipeline.recipe.schema import LanguageModelSection, Recipe
from pipeline.vocabulary.frequency import expected_frequencies, windows_to_expect_from

_EXPECTED = "expected.safetensors"


def expected_tokens(recipe: Recipe, data: TextData, *, folder: RunFolder, progress: Progress) -> Tensor:
    """Measure or find how often the dense model of ``recipe`` expects each token of its full vocabulary in ``data``:
    float64 [vocabulary] (:func:`pipeline.vocabulary.frequency.expected_frequencies`). Raises InputError where the
    model cannot be loaded, or does not know a token of the text."""
    settings = [recipe.model.model_dump(mode="json"), data.hash, recipe.seed]
    stage = folder.stage("vocabulary", settings, [], partial(_measure, recipe=recipe, data=data, progress=progress))
    return load_file(stage.folder / _EXPECTED)["expected"]


def _measure(folder: Path, recipe: Recipe, data: TextData, progress: Progress) -> None:
    section = recipe.model
    assert isinstance(section, LanguageModelSection)
    loaded = load_language_model(section)
    check_vocabulary(data, loaded.tokenizer, len(output_table(loaded.model)))
    windows = list(windows_to_expect_from(data.train, recipe.seed))
    with progress.task("tokens that the model expects", len(windows)) as advance:
        expected = expected_frequencies(loaded.model, _each(windows, advance))
    write_aside(folder / _EXPECTED, lambda path: save_file({"expected": expected}, path))


def _each(windows: Sequence[Tensor], advance: Advance) -> Iterator[Tensor]:
    """Yield the ``windows``, and note each that is done with."""
    for window in windows:
        yield window
        advance(1, "")
