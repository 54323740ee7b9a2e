"""Quality of an artefact, from what is in its folder and the test data its recipe names."""

import tempfile
from pathlib import Path

from fips_ort.load import load
from fips_ort.manifest import MANIFEST, read_manifest
from pipeline.plumbing.progress import Progress
from pipeline.recipe.reading import parse_recipe
from pipeline.tasks import make_task


def evaluate_artifact(folder: Path, progress: Progress, *, native: bool = True) -> str:
    """Evaluate the artefact in ``folder`` on the test samples of the recipe in its manifest; a line that says it.

    Images are prepared, labels numbered and text cut into tokens as the artefact's own configuration files say.
    Raises ArtifactError for a damaged artefact, InputError for data that is not there (any more).
    """
    recipe = parse_recipe(read_manifest(folder).recipe, str(folder / MANIFEST))
    session = load(folder, native=native)
    task = make_task(recipe, artifact=folder)
    with tempfile.TemporaryDirectory() as scratch:
        return task.measure(session, Path(scratch), "artefact", progress)
