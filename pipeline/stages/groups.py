"""The first stages of a run: the dense model, calibration, allocation, then factorization and fit of each group.

Groups are independent of one another until quantization, so they can be computed in other processes:
``python -m pipeline.stages.groups RECIPE FOLDER GROUP`` does one, in the folder of a run that is calibrated and waits
for it.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fips_ort.native import library_path
from pipeline.plumbing.engines import Command, run_on_ray
from pipeline.plumbing.environment import prepare_process
from pipeline.plumbing.errors import StageError
from pipeline.plumbing.files import digest, read_json, write_json
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.run_folder import RunFolder, StageResult
from pipeline.quantization.rest_layers import RestBits, rest_bits
from pipeline.recipe.plan import GroupPlan, Plan, make_plan
from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import Recipe
from pipeline.stages import compress
from pipeline.stages.allocate import choose, load_chosen, measure_choices
from pipeline.stages.results import SavedFactors
from pipeline.stages.vocabulary import expected_tokens
from pipeline.tasks import make_task
from pipeline.tasks.base import Task


@dataclass(frozen=True)
class Calibrated:
    """A run whose calibration is done, so that its groups can be computed.

    ``activations``: the stage that recorded them. ``planned``: the stage that ``plan`` follows from. ``rest_bits``: of
    the weights outside the MLPs that are stored as codes, by path.
    """

    folder: RunFolder
    progress: Progress
    task: Task
    plan: Plan
    activations: StageResult
    planned: StageResult
    rest_bits: Mapping[str, RestBits]

    @property
    def recipe(self) -> Recipe:
        return self.task.recipe

    def factorize(self) -> SavedFactors:
        """Factorize every group: ``W ≈ U V``."""
        results = {group.name: self._factorize(group).run(self.folder) for group in self.plan.groups}
        return SavedFactors.of_groups(results)

    def fit(self, factorized: SavedFactors) -> SavedFactors:
        """Fit every group to what the dense MLPs do: ``min |MLP(X; U, V) - Y|²``, V becoming sparse."""
        pairs = zip(self.plan.groups, factorized.results, strict=True)
        results = {group.name: self._fit(group, before).run(self.folder) for group, before in pairs}
        return SavedFactors.of_groups(results)

    def compute_group(self, group: GroupPlan) -> None:
        """Factorize one group, and fit it if the recipe says so."""
        factorized = self._factorize(group).run(self.folder)
        if self.recipe.fit is not None:
            self._fit(group, factorized).run(self.folder)

    def is_computed(self, group: GroupPlan) -> bool:
        """Whether what :meth:`compute_group` leaves is there already."""
        factorize = self._factorize(group)
        if not factorize.is_done(self.folder):
            return False
        return self.recipe.fit is None or self._fit(group, factorize.expected(self.folder)).is_done(self.folder)

    def _factorize(self, group: GroupPlan) -> "_GroupStage":
        recipe = self.plan.recipes[group.name]
        return _GroupStage(
            f"factorize/{group.name}",
            [recipe.compression.model_dump(mode="json"), asdict(group)],
            self.planned,
            partial(
                compress.factorize,
                recipe=recipe,
                dense=self.task.model,
                group=group,
                calibration=self.activations.folder,
            ),
        )

    def _fit(self, group: GroupPlan, factorized: StageResult) -> "_GroupStage":
        recipe = self.plan.recipes[group.name]
        assert recipe.fit is not None
        return _GroupStage(
            f"fit/{group.name}",
            recipe.fit.model_dump(mode="json"),
            factorized,
            partial(
                compress.fit,
                recipe=recipe,
                dense=self.task.model,
                group=group,
                before=factorized.folder,
                calibration=self.activations.folder,
                progress=self.progress,
            ),
        )


@dataclass(frozen=True)
class _GroupStage:
    """A stage of one group, with the arguments of :meth:`RunFolder.stage`; it can be asked for before it is run."""

    name: str
    settings: Any
    input: StageResult
    compute: Callable[[Path], None]

    def run(self, folder: RunFolder) -> StageResult:
        return folder.stage(self.name, self.settings, [self.input], self.compute)

    def expected(self, folder: RunFolder) -> StageResult:
        return folder.expected(self.name, self.settings, [self.input])

    def is_done(self, folder: RunFolder) -> bool:
        return folder.has(self.name, self.settings, [self.input])


def open_dense(recipe: Recipe, folder: RunFolder, progress: Progress) -> tuple[Task, StageResult]:
    """Make or find the dense model. Returns the task with it, and its stage, whose key covers where it came from."""
    task = make_task(recipe, expected=partial(expected_tokens, recipe, folder=folder, progress=progress))
    made = folder.stage(
        "model",
        [recipe.model.model_dump(mode="json"), recipe.seed, task.data_hash],
        [],
        partial(task.make_dense, progress=progress),
    )
    task.open_dense(made.folder)
    return task, StageResult(made.folder, digest([task.source_hash, task.data_hash, made.key]))


def calibrate_and_plan(task: Task, dense: StageResult, folder: RunFolder, progress: Progress) -> Calibrated:
    """Record what the dense model's MLPs read and write (X and Y), then plan the groups and what lies outside them:
    rank, sparsity and bits of each are as the recipe says or, where it has an allocation, chosen by that."""
    recipe = task.recipe
    plan = make_plan(recipe, task.sites)
    activations = folder.stage(
        "calibrate",
        [
            recipe.calibration.model_dump(mode="json"),
            [site.path for group in plan.groups for site in group.sites],
            recipe.seed,
        ],
        [dense],
        partial(task.calibrate, plan=plan, progress=progress),
    )
    rest = rest_bits(recipe, task.model, task.sites)
    if recipe.allocate is None:
        return Calibrated(folder, progress, task, plan, activations=activations, planned=activations, rest_bits=rest)
    # What is measured depends neither on the target nor on the training: another one finds it there.
    measured = folder.stage(
        "sensitivities",
        [
            recipe.allocate.model_dump(mode="json", exclude={"target"}),
            recipe.compression.model_dump(mode="json"),
            recipe.quantization.model_dump(mode="json", exclude={"training"}),
            recipe.seed,
        ],
        [activations],
        partial(measure_choices, task=task, plan=plan, calibration=activations.folder, progress=progress),
    )
    chosen = folder.stage(
        "allocate",
        [recipe.allocate.target, library_path().stat().st_size],
        [measured],
        partial(choose, task=task, plan=plan, measured=measured.folder, progress=progress),
    )
    allocation = load_chosen(recipe, chosen.folder)
    return Calibrated(
        folder,
        progress,
        task,
        make_plan(recipe, task.sites, allocation.recipes),
        activations=activations,
        planned=chosen,
        rest_bits=rest | allocation.rest,
    )


def compute_on_ray(calibrated: Calibrated) -> None:
    """Compute every group that is not there yet in a Ray task, with as many threads as this process uses.

    Raises StageError if one fails; the others are finished first.
    """
    work, progress = calibrated.folder.work, calibrated.progress
    path = work / "recipe.json"
    write_json(path, calibrated.recipe.model_dump(mode="json"))
    arguments = ("pipeline.stages.groups", str(path), str(calibrated.folder.folder))
    commands = [
        Command(group.name, (*arguments, group.name), work / "groups" / f"{group.name}.txt")
        for group in calibrated.plan.groups
        if not calibrated.is_computed(group)
    ]
    if not commands:
        return
    failed = [outcome for outcome in run_on_ray(commands, torch.get_num_threads(), progress.say) if outcome.status]
    if failed:
        raise StageError("\n".join(f"{outcome.name}, on Ray: {outcome.message}" for outcome in failed))


def main() -> None:
    """Compute one group in this process. The recipe is JSON, as :func:`compute_on_ray` wrote it."""
    prepare_process()
    path, folder, name = sys.argv[1:]
    recipe, progress = parse_recipe(read_json(Path(path)), path), Progress()
    run_folder = RunFolder(Path(folder), progress)
    calibrated = calibrate_and_plan(*open_dense(recipe, run_folder, progress), run_folder, progress)
    (group,) = (group for group in calibrated.plan.groups if group.name == name)
    calibrated.compute_group(group)


if __name__ == "__main__":
    main()
