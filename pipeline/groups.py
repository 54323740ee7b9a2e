"""The first stages of a run: the dense model, calibration, allocation, then factorization and fit of each group.

Groups are independent of one another until quantization, so they can be computed in other processes:
``python -m pipeline.groups RECIPE FOLDER GROUP`` does one, in the folder of a run that is calibrated and waits for it.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import stages
from pipeline.allocate import allocate, load_chosen
from pipeline.engines import Command, run_on_ray
from pipeline.environment import prepare_process
from pipeline.errors import StageError
from pipeline.files import read_json, write_json
from pipeline.plan import GroupPlan, Plan, make_plan
from pipeline.progress import Progress
from pipeline.recipe import Recipe, parse_recipe
from pipeline.run_folder import RunFolder, stage_key
from pipeline.tasks import make_task
from pipeline.tasks.base import Task

StageArguments = tuple[str, Any, str, Callable[[Path], None]]
"""Of :meth:`RunFolder.stage`: name, settings, key of the stage before, computation."""


@dataclass(frozen=True)
class Opened:
    """A run whose dense model is there and whose calibration is done."""

    recipe: Recipe
    folder: RunFolder
    progress: Progress
    task: Task
    plan: Plan
    dense_key: str
    calibrated_key: str

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
        compute = partial(stages.factorize, recipe=recipe, dense=self.task.model, group=group)
        return (
            f"factorize/{group.name}",
            settings,
            self.calibrated_key,
            partial(compute, calibration=self.calibration),
        )

    def _fit(self, group: GroupPlan, factorized: str) -> StageArguments:
        recipe = self.plan.recipes[group.name]
        assert recipe.fit is not None
        before = self.folder.work / "factorize" / group.name
        compute = partial(stages.fit, recipe=recipe, dense=self.task.model, group=group, before=before)
        return (
            f"fit/{group.name}",
            recipe.fit.model_dump(mode="json"),
            factorized,
            partial(compute, calibration=self.calibration, progress=self.progress),
        )


def open_run(recipe: Recipe, folder: RunFolder, progress: Progress) -> Opened:
    """The dense model and its data, and what its MLPs read and write."""
    settings = recipe.model_dump(mode="json")
    task = make_task(recipe)
    key = folder.stage(
        "model",
        [settings["model"], recipe.seed, task.data_hash],
        "",
        partial(task.make_dense, progress=progress),
    )
    task.open_dense(folder.work / "model")
    plan = make_plan(recipe, task.sites)
    dense_key = json.dumps([task.source_hash, task.data_hash, key])
    calibrated = folder.stage(
        "calibrate",
        [settings["calibration"], [site.path for group in plan.groups for site in group.sites], recipe.seed],
        dense_key,
        partial(stages.calibrate, task=task, plan=plan, progress=progress),
    )
    if recipe.allocate is not None:
        calibrated = folder.stage(
            "allocate",
            [settings[part] for part in ("allocate", "compression", "quantization")] + [recipe.seed],
            calibrated,
            partial(allocate, task=task, plan=plan, calibration=folder.work / "calibrate", progress=progress),
        )
        plan = make_plan(recipe, task.sites, load_chosen(recipe, folder.work / "allocate"))
    return Opened(recipe, folder, progress, task, plan, dense_key, calibrated)


def run_group(recipe: Recipe, folder: Path, name: str, progress: Progress) -> None:
    """Factorize and fit the group ``name``, in the folder of a run that is calibrated and waits for it."""
    opened = open_run(recipe, RunFolder(folder, progress), progress)
    (group,) = (group for group in opened.plan.groups if group.name == name)
    key = opened.factorize(group)
    if recipe.fit is not None:
        opened.fit(group, key)


def fit_on_ray(opened: Opened) -> None:
    """Every group that is not fitted yet by :func:`run_group` in a Ray task, with as many threads as this process uses.

    Raises StageError if one fails; the others are finished first.
    """
    work, progress = opened.folder.work, opened.progress
    path = work / "recipe.json"
    write_json(path, opened.recipe.model_dump(mode="json"))
    arguments = ("pipeline.groups", str(path.resolve()), str(opened.folder.folder.resolve()))
    commands = [
        Command(group.name, (*arguments, group.name), work / "groups" / f"{group.name}.txt")
        for group in opened.plan.groups
        if not opened.is_fitted(group)
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
