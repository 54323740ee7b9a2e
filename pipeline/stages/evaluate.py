"""Quality of the model after each step, measured on the test samples: an evaluation is a stage of its own."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from pipeline.evaluation.measurements import Stage, TrainedStage
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.run_folder import RunFolder, StageResult
from pipeline.tasks.base import Task


class Evaluations:
    """Evaluates forms of the model in PyTorch, and knows where the results are."""

    def __init__(self, task: Task, folder: RunFolder, progress: Progress) -> None:
        self.folders: dict[Stage, Path] = {}
        """Folder of the saved quality by the report's name of the stage."""
        self.errors: dict[TrainedStage, dict[str, float]] = {}
        """Relative reconstruction errors by the same names, then by block."""
        self._task, self._folder, self._progress = task, folder, progress

    def evaluate_dense(self, dense: StageResult) -> None:
        """Measure the dense model, which all others are compared with."""
        self._stage("dense", [dense], lambda out: self._task.measure_dense(out, self._progress))

    def evaluate(
        self,
        name: TrainedStage,
        inputs: Sequence[StageResult],
        make_model: Callable[[], nn.Module],
        errors: dict[str, float],
    ) -> None:
        """Measure the model that ``make_model`` gives, unless the result is there already.

        ``inputs``: what the model depends on. ``errors``: what its MLPs lost on the calibration data, by block.
        """
        self._stage(name, inputs, lambda out: self._task.measure(make_model().eval(), out, name, self._progress))
        self.errors[name] = errors

    def _stage(self, name: Stage, inputs: Sequence[StageResult], measure: Callable[[Path], str]) -> None:
        settings = self._task.recipe.evaluation.model_dump(mode="json")
        result = self._folder.stage(
            f"evaluate/{name}", settings, inputs, lambda out: self._progress.say(f"  {name}: {measure(out)}")
        )
        self.folders[name] = result.folder
