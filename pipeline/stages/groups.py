"""The first stages of a run: the dense model, calibration, allocation, then factorization and fit of each group.

Groups are independent of one another until quantization, so they can be computed in other processes:
``python -m pipeline.stages.groups RECIPE FOLDER GROUP`` does one, in the folder of a run that is calibrated and waits
for it.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.plumbing.engines import Command, run_on_ray
from pipeline.plumbing.environment import prepare_process
from pipeline.plumbing.errors import StageError
from pipeline.plumbing.files import read_json, write_json
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.run_folder import RunFolder, stage_key
from pipeline.recipe.plan import GroupPlan, Plan, make_plan
from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import Recipe
from pipeline.stages import compress
from pipeline.stages.allocate import allocate, load_chosen
from pipeline.tasks import make_task
from pipeline.tasks.base import Task

StageArguments = tuple[str, Any, str, Callable[[Path], None]]
"""Of :meth:`RunFolder.stage`: name, settings, key of the stage before, computation."""


@dataclass(frozen=True)
class Calibrated:
    """A run whose calibration is done, so that its groups can be computed. ``key``: of the stage before them."""

    recipe: Recipe
    folder: RunFolder
    progress: Progress
    task: Task
    plan: Plan
    key: str

    @property
    def calibration(self) -> Path:
        return self.folder.work / "calibrate"

    def factorize(self, group: GroupPlan) -> str:
        """The stage; returns its key."""
        return self.folder.stage(*self._factorize(group))

    def fit(self, group: GroupPlan, factorized: str) -> str:
        """The stage, after the one with the key ``factorized``; returns its key."""
        return self.folder.stage(*self._fit(group, factorized))

    def is_fitted(self, group: GroupPlan) -> bool:
        """Whether both stages of a group, if the recipe has them, are there already."""
        name, settings, before, _ = self._factorize(group)
        key = stage_key(name, settings, before)
        done = self.folder.has(name, key)
        if done and self.recipe.fit is not None:
            name, settings, before, _ = self._fit(group, key)
            done = self.folder.has(name, stage_key(name, settings, before))
        return done

    def _factorize(self, group: GroupPlan) -> StageArguments:
        recipe = self.plan.recipes[group.name]
        settings = [recipe.compression.model_dump(mode="json"), asdict(group)]
        compute = partial(compress.factorize, recipe=recipe, dense=self.task.model, group=group)
        return (
            f"factorize/{group.name}",
            settings,
            self.key,
            partial(compute, calibration=self.calibration),
        )

    def _fit(self, group: GroupPlan, factorized: str) -> StageArguments:
        recipe = self.plan.recipes[group.name]
        assert recipe.fit is not None
        before = self.folder.work / "factorize" / group.name
        compute = partial(compress.fit, recipe=recipe, dense=self.task.model, group=group, before=before)
        return (
            f"fit/{group.name}",
            recipe.fit.model_dump(mode="json"),
            factorized,
            partial(compute, calibration=self.calibration, progress=self.progress),
        )


def open_dense(recipe: Recipe, folder: RunFolder, progress: Progress) -> tuple[Task, str]:
    """The task with its dense model, and the key of everything that follows from them."""
    task = make_task(recipe)
    key = folder.stage(
        "model",
        [recipe.model.model_dump(mode="json"), recipe.seed, task.data_hash],
        "",
        partial(task.make_dense, progress=progress),
    )
    task.open_dense(folder.work / "model")
    return task, json.dumps([task.source_hash, task.data_hash, key])


def calibrate(task: Task, dense_key: str, folder: RunFolder, progress: Progress) -> Calibrated:
    """What the dense model's MLPs read and write, and what follows from it for the groups."""
    recipe = task.recipe
    plan = make_plan(recipe, task.sites)
    calibration = recipe.calibration.model_dump(mode="json")
    key = folder.stage(
        "calibrate",
        [calibration, [site.path for group in plan.groups for site in group.sites], recipe.seed],
        dense_key,
        partial(compress.calibrate, task=task, plan=plan, progress=progress),
    )
    if recipe.allocate is not None:
        sections = (recipe.allocate, recipe.compression, recipe.quantization)
        depends_on = [section.model_dump(mode="json") for section in sections]
        key = folder.stage(
            "allocate",
            [*depends_on, recipe.seed],
            key,
            partial(allocate, task=task, plan=plan, calibration=folder.work / "calibrate", progress=progress),
        )
        plan = make_plan(recipe, task.sites, load_chosen(recipe, folder.work / "allocate"))
    return Calibrated(recipe, folder, progress, task, plan, key)


def run_group(recipe: Recipe, folder: Path, name: str, progress: Progress) -> None:
    """Factorize and fit the group ``name``, in the folder of a run that is calibrated and waits for it."""
    run_folder = RunFolder(folder, progress)
    calibrated = calibrate(*open_dense(recipe, run_folder, progress), run_folder, progress)
    (group,) = (group for group in calibrated.plan.groups if group.name == name)
    key = calibrated.factorize(group)
    if recipe.fit is not None:
        calibrated.fit(group, key)


def fit_on_ray(calibrated: Calibrated) -> None:
    """Every group that is not fitted yet by :func:`run_group` in a Ray task, with as many threads as this process uses.

    Raises StageError if one fails; the others are finished first.
    """
    work, progress = calibrated.folder.work, calibrated.progress
    path = work / "recipe.json"
    write_json(path, calibrated.recipe.model_dump(mode="json"))
    arguments = ("pipeline.stages.groups", str(path), str(calibrated.folder.folder))
    commands = [
        Command(group.name, (*arguments, group.name), work / "groups" / f"{group.name}.txt")
        for group in calibrated.plan.groups
        if not calibrated.is_fitted(group)
    ]
    if not commands:
        return
    failed = [outcome for outcome in run_on_ray(commands, torch.get_num_threads(), progress.say) if outcome.status]
    if failed:
        raise StageError("\n".join(f"{outcome.name}, on Ray: {outcome.message}" for outcome in failed))


def main() -> None:
    """RECIPE is JSON, as :func:`fit_on_ray` wrote it."""
    prepare_process()
    recipe, folder, name = sys.argv[1:]
    run_group(parse_recipe(read_json(Path(recipe)), recipe), Path(folder), name, Progress())


if __name__ == "__main__":
    main()
