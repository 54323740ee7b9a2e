"""Rank, sparsity and bits of every group, and bits of what lies outside the MLPs, chosen together from measured
sensitivities to meet a target of stored bits, or of bytes of the whole artefact.

Each choice is tried on each group, or on each part outside the MLPs, alone: its weights stored as the run would start
them, put into the dense model, and measured by KL(dense ‖ model) on training samples. What changes of several parts
cost is taken to add up, which holds for small ones; then the best combination within the target is found.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from exporters.rest import install_rest
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
from pipeline.quantization.rest_layers import (
    RestBits,
    bits_as_json,
    bits_from_json,
    layers_by_input,
    rest_linears,
    token_tables,
)
from pipeline.quantization.rest_start import RestMoments
from pipeline.recipe.choices import Choice, choices_of
from pipeline.recipe.plan import GroupPlan, Plan, make_plan
from pipeline.recipe.schema import EndToEnd, Recipe
from pipeline.stages.best_combination import best_combination
from pipeline.stages.unchosen import unchosen_bytes
from pipeline.tasks.base import Task

CHOSEN = "chosen.json"
_Choice = TypeVar("_Choice", Choice, "RestChoice")


@dataclass(frozen=True)
class RestChoice:
    """Bits that a part outside the MLPs can get, a number or a table's tiers. ``paths``: of its weights."""

    paths: tuple[str, ...]
    bits: RestBits

    @property
    def by_path(self) -> dict[str, RestBits]:
        """The bits of each weight."""
        return dict.fromkeys(self.paths, self.bits)


@dataclass(frozen=True)
class Measured(Generic[_Choice]):
    """What a choice takes, in packed bytes of a group or part, and costs, in nats a token or image."""

    choice: _Choice
    stored_bytes: int
    divergence: float


@dataclass(frozen=True)
class Allocation:
    """What was chosen. ``recipes``: of every group, by name. ``rest``: bits of weights outside the MLPs by path, where
    they were open."""

    recipes: dict[str, Recipe]
    rest: dict[str, RestBits]


# --- sensitivities ---------------------------------------------------------------------------------------------


def measure_choices(folder: Path, task: Task, plan: Plan, calibration: Path, progress: Progress) -> None:
    """Measure all choices on all groups of ``plan`` and all parts outside the MLPs, each into a file of ``folder``.

    A killed stage goes on after the last choice it has measured.
    """
    choices, parts = choices_of(task.recipe), rest_parts(task)
    moments: RestMoments | None = None
    if parts:
        moments = task.rest_moments([path for own in parts.values() for path in own[0].paths])

    def measure_group(group: GroupPlan) -> Callable[[Choice], Measured[Choice]]:
        return lambda choice: _measure_group(choice, task, group, calibration)

    total = len(choices) * len(plan.groups) + sum(map(len, parts.values()))
    with progress.task("sensitivities", total) as advance:
        for group in plan.groups:
            _measure_all(folder, group.name, choices, measure_group(group), advance)
        for name, own in parts.items():
            _measure_all(folder, name, own, lambda choice: _measure_part(choice, task, moments), advance)


def rest_parts(task: Task) -> dict[str, list[RestChoice]]:
    """What there is to choose for each part outside the MLPs, by the path of its first weight: linear layers that read
    the same input, which are one product in the artefact, and all tables of tokens."""
    allocate = task.recipe.allocate
    assert allocate is not None
    parts: dict[tuple[str, ...], Sequence[RestBits]] = {}
    if allocate.linear_bits is not None:
        sample = task.training_batch([0])
        with torch.no_grad():
            layers = layers_by_input(lambda: task.run_dense(sample), rest_linears(task.model, task.sites))
        parts |= dict.fromkeys(layers, allocate.linear_bits)
    if allocate.embedding_bits is not None:
        parts[tuple(token_tables(task.model))] = allocate.embedding_bits
    return {paths[0]: [RestChoice(paths, bits) for bits in choices] for paths, choices in parts.items()}


def _measure_all(
    folder: Path,
    name: str,
    choices: Sequence[_Choice],
    measure: Callable[[_Choice], Measured[_Choice]],
    advance: Callable[[int, str], None],
) -> None:
    """Measure those of ``choices`` that the file of ``name`` in ``folder`` does not have yet."""
    path = _file(folder, name)
    known = load_measured(path, choices)
    advance(len(known), name)
    for choice in choices[len(known) :]:
        known.append(measure(choice))
        write_sealed(path, [_as_json(entry) for entry in known])
        advance(1, name)


def _measure_group(choice: Choice, task: Task, group: GroupPlan, calibration: Path) -> Measured[Choice]:
    """Try ``choice`` on ``group`` alone, in the dense model."""
    recipe = choice.apply(task.recipe)
    (own,) = (found for found in make_plan(recipe, task.sites).groups if found.index == group.index)
    mlps = _quantized(recipe, task.model, own, calibration)
    packed = freeze(mlps)
    stored = sum(weight.nbytes for weight in packed.weights().values())
    return Measured(choice, stored, _divergence(task, install(task.model, mlps)))


def _measure_part(choice: RestChoice, task: Task, moments: RestMoments | None) -> Measured[RestChoice]:
    """Try ``choice`` on its part alone, in the dense model."""
    packed = task.start_rest(choice.by_path, moments, lambda _: None)
    stored = sum(weight.nbytes for weight in packed.linears.values())
    stored += sum(table.nbytes for table in packed.tables.values())
    return Measured(choice, stored, _divergence(task, install_rest(task.model, packed)))


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


def load_measured(path: Path, choices: Sequence[_Choice]) -> list[Measured[_Choice]]:
    """What a killed attempt has measured of ``choices``, which come in their order; nothing if that is damaged."""
    entries = read_sealed(path)
    if not isinstance(entries, list):
        return []
    return [Measured(**entry | {"choice": choice}) for entry, choice in zip(entries, choices, strict=False)]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _as_json(entry: Measured[Any]) -> dict[str, Any]:
    """A measurement as values of JSON: of a part outside the MLPs, the bits by path."""
    described = asdict(entry)
    if isinstance(entry.choice, RestChoice):
        described["choice"] = bits_as_json(entry.choice.by_path)
    return described


# --- choice ----------------------------------------------------------------------------------------------------


def choose(folder: Path, task: Task, plan: Plan, measured: Path, progress: Progress) -> None:
    """Find the best combination of what :func:`measure_choices` has left in ``measured``, and write it to ``folder``.

    Raises InputError if the target is below what the smallest choices take.
    """
    recipe = task.recipe
    assert recipe.allocate is not None
    groups = {group.name: load_measured(_file(measured, group.name), choices_of(recipe)) for group in plan.groups}
    parts = {name: load_measured(_file(measured, name), own) for name, own in rest_parts(task).items()}
    entries: dict[str, Sequence[Measured[Any]]] = {**groups, **parts}
    unchosen = None
    if recipe.allocate.artifact_bytes is None:
        budget = recipe.allocate.stored_bits * sum(group.dense_parameters for group in plan.groups) / 8
    else:
        chosen_paths = {path for own in parts.values() for path in own[0].choice.paths}
        unchosen = unchosen_bytes(task, plan, chosen_paths)
        budget = recipe.allocate.artifact_bytes - unchosen
    best = best_combination(
        {name: [(entry.stored_bytes, entry.divergence) for entry in own] for name, own in entries.items()}, budget
    )
    if best is None:
        least = sum(min(entry.stored_bytes for entry in own) for own in entries.values())
        raise InputError(_too_small(recipe, plan, least, unchosen))
    chosen = {name: entries[name][index] for name, index in best.items()}
    spent = sum(entry.stored_bytes for entry in chosen.values())
    divergence = sum(entry.divergence for entry in chosen.values())
    others = "" if unchosen is None else f"; all else takes {unchosen:,} at most"
    progress.say(f"  {spent:,} of {budget:,.0f} bytes spent, for {divergence:.4f} nats in all{others}")
    write_json(
        folder / CHOSEN,
        {
            "groups": {name: _as_json(chosen[name]) for name in groups},
            "rest": {name: _as_json(chosen[name]) for name in parts},
            "unchosen_bytes": unchosen,
        },
    )


def _too_small(recipe: Recipe, plan: Plan, least: int, unchosen: int | None) -> str:
    """What is wrong with a target below what the smallest choices take, ``least`` bytes, and ``unchosen`` others."""
    assert recipe.allocate is not None
    if unchosen is None:
        enough = f"{8 * least / sum(group.dense_parameters for group in plan.groups):.3f}"
    else:
        enough = f"{least + unchosen:,} bytes, {unchosen:,} of them for what is not chosen"
    return (
        f"recipe {recipe.name}: allocate.target: {recipe.allocate.target} is below what the smallest choices take, "
        f"{enough}; raise it, or allow smaller budgets or fewer bits"
    )


def load_chosen(recipe: Recipe, folder: Path) -> Allocation:
    """What :func:`choose` has written to ``folder``."""
    content = read_json(folder / CHOSEN)
    recipes = {name: Choice(**entry["choice"]).apply(recipe) for name, entry in content["groups"].items()}
    parts = [bits_from_json(entry["choice"]) for entry in content["rest"].values()]
    return Allocation(recipes, {path: bits for part in parts for path, bits in part.items()})
