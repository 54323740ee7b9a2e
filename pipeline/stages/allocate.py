"""Rank, sparsity and bits of every group, chosen together from measured sensitivities to meet a target of stored bits.

Each choice is tried on each group alone: factorized, quantized as the run would, put into the dense model, and
measured by KL(dense ‖ model) on training samples. What changes of several groups cost is taken to add up, which holds
for small ones; then the best combination within the target is found exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import initial_factors, install
from pipeline.compression.moments import open_moments
from pipeline.compression.sparsify import mask_schedule
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import read_json, write_json
from pipeline.plumbing.integrity import read_sealed, write_sealed
from pipeline.plumbing.progress import Progress
from pipeline.quantization.freeze import freeze
from pipeline.quantization.prepare import start_quantization
from pipeline.recipe.choices import Choice, choices_of
from pipeline.recipe.plan import GroupPlan, Plan, make_plan
from pipeline.recipe.schema import EndToEnd, Recipe
from pipeline.tasks.base import Task

CHOSEN, MEASURED = "chosen.json", "measured"


@dataclass(frozen=True)
class Measured:
    """What a choice takes, in bytes of a group's packed factors, and costs, in nats a token or image."""

    choice: Choice
    stored_bytes: int
    divergence: float


def allocate(folder: Path, task: Task, plan: Plan, calibration: Path, progress: Progress) -> None:
    """Measure all choices on all groups of ``plan``, and write the best combination to ``folder/chosen.json``.

    A killed stage goes on after the last choice it has measured. Raises InputError if the target is below what the
    smallest choices take.
    """
    recipe = task.recipe
    assert recipe.allocate is not None
    choices = choices_of(recipe)
    measured: dict[str, list[Measured]] = {}
    with progress.task("sensitivities", len(choices) * len(plan.groups)) as advance:
        for group in plan.groups:
            path = folder / MEASURED / f"{group.name}.json"
            known = load_measured(path, choices)
            advance(len(known), group.name)
            for choice in choices[len(known) :]:
                known.append(_measure(choice, task, group, calibration))
                write_sealed(path, [asdict(entry) for entry in known])
                advance(1, group.name)
            measured[group.name] = known
    budget = recipe.allocate.target * sum(group.dense_parameters for group in plan.groups) / 8
    chosen = best_combination(measured, budget)
    if chosen is None:
        least = 8 * sum(min(entry.stored_bytes for entry in entries) for entries in measured.values())
        enough = least / sum(group.dense_parameters for group in plan.groups)
        raise InputError(
            f"recipe {recipe.name}: allocate.target: {recipe.allocate.target} is below what the smallest choices take, "
            f"{enough:.3f}; raise it, or allow smaller budgets or fewer bits"
        )
    write_json(folder / CHOSEN, {name: asdict(entry) for name, entry in chosen.items()})


def load_chosen(recipe: Recipe, folder: Path) -> dict[str, Recipe]:
    """The recipe of every group, by name, as :func:`allocate` has chosen."""
    return {name: Choice(**entry["choice"]).apply(recipe) for name, entry in read_json(folder / CHOSEN).items()}


def best_combination(measured: Mapping[str, Sequence[Measured]], budget: float) -> dict[str, Measured] | None:
    """One entry per group, of least divergence in all, that take at most ``budget`` bytes; None if none do.

    Exact: partial combinations are kept unless another is at once no larger and no worse.
    """
    kept: list[tuple[int, float, tuple[Measured, ...]]] = [(0, 0.0, ())]
    for entries in measured.values():
        grown = [
            (size + entry.stored_bytes, loss + entry.divergence, (*before, entry))
            for size, loss, before in kept
            for entry in entries
            if size + entry.stored_bytes <= budget
        ]
        kept, least = [], float("inf")
        for candidate in sorted(grown, key=lambda candidate: candidate[:2]):
            if candidate[1] < least:
                least = candidate[1]
                kept.append(candidate)
    return dict(zip(measured, kept[-1][2], strict=True)) if kept else None


def _measure(choice: Choice, task: Task, group: GroupPlan, calibration: Path) -> Measured:
    """Try ``choice`` on ``group`` alone, in the dense model."""
    recipe = choice.apply(task.recipe)
    (own,) = (found for found in make_plan(recipe, task.sites).groups if found.index == group.index)
    mlps = _quantized(recipe, task.model, own, calibration)
    packed = freeze(mlps)
    stored = sum(weight.nbytes for weight in packed.weights().values())
    return Measured(choice, stored, _divergence(task, install(task.model, mlps)))


def _quantized(recipe: Recipe, dense: nn.Module, group: GroupPlan, calibration: Path) -> list[FactorizedMLP]:
    """The MLPs of a group as quantization starts them; sparse projections get one mask, without a fit."""
    mlps, _ = initial_factors(recipe, dense, group, calibration)
    moments = open_moments(dense, group, calibration)
    if recipe.compression.is_masked:
        once = recipe.compression.sparsifier.model_copy(update={"algorithm": "static"})
        compression = recipe.compression.model_copy(update={"sparsifier": once})
        mask_schedule(mlps, compression, 1, moments).before_step(0)
    start_quantization(recipe, group, mlps, lambda: moments)
    return mlps


@torch.no_grad()
def _divergence(task: Task, model: nn.Module) -> float:
    """KL(dense ‖ ``model``) in nats, mean over training samples, the same for every model."""
    assert task.recipe.allocate is not None
    samples = min(task.recipe.allocate.samples, task.train_samples)
    config = EndToEnd(objective="distill", steps=samples, batch_size=1)
    loss = task.end_to_end_loss(model.eval(), config, task.recipe.seed)
    return sum(float(loss(step)) for step in range(samples)) / samples


def load_measured(path: Path, choices: Sequence[Choice]) -> list[Measured]:
    """What a killed attempt has measured of ``choices``, which come in their order; nothing if that is damaged."""
    entries = read_sealed(path)
    if not isinstance(entries, list):
        return []
    return [Measured(**entry | {"choice": choice}) for entry, choice in zip(entries, choices, strict=False)]
