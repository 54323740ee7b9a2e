"""Accuracy of an artefact, from what is in its folder and the test data its recipe names."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from fips_ort.load import load
from fips_ort.manifest import MANIFEST, read_manifest
from pipeline.data import load_data
from pipeline.evaluate import Quality, evaluate
from pipeline.models.loading import load_preprocessing
from pipeline.progress import Progress
from pipeline.recipe import PretrainedModel, parse_recipe


def evaluate_artifact(folder: Path, progress: Progress, *, native: bool = True) -> Quality:
    """Evaluate the artefact in ``folder`` on the test samples of the recipe in its manifest.

    Images are prepared, and labels numbered, as the artefact's own configuration files say. Raises ArtifactError
    for a damaged artefact, InputError for data that is not there (any more).
    """
    recipe = parse_recipe(read_manifest(folder).recipe, str(folder / MANIFEST))
    session = load(folder, native=native)
    preprocessing = load_preprocessing(PretrainedModel(source="pretrained", path=str(folder)), recipe.data)
    data = load_data(recipe.data, preprocessing, recipe.seed, 1, recipe.evaluation.samples)
    with progress.counter("evaluate", len(data.test)) as report:
        return evaluate(
            session_predictor(session), data.test, recipe.evaluation.batch_size, recipe.evaluation.samples, report
        )


def session_predictor(session: "onnxruntime.InferenceSession") -> Callable[[Tensor], Tensor]:
    """A session as a function from pixel values to logits."""

    def predict(pixel_values: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])

    return predict
