"""The stages of a run, each a function from typed inputs to files in its folder; :mod:`pipeline.run` lists them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from fips_ort.layout import Pattern
from pipeline.calibrate import open_activations
from pipeline.compress import (
    factorize_group,
    install,
    load_factors,
    local_targets,
    named_factors,
    restore_group,
    save_factors,
)
from pipeline.factorized_mlp import FactorizedMLP
from pipeline.files import read_json, write_json
from pipeline.fit import GroupModule, local_loss, reconstruction_errors
from pipeline.moments import MLPMoments, group_moments
from pipeline.plan import GroupPlan, Plan, Segments
from pipeline.progress import Progress
from pipeline.quantize import assert_coverage, choose_segments, needs_moments, prepare_factors, restore_prepared
from pipeline.recipe import EndToEnd, LocalTraining, Recipe
from pipeline.rest_training import make_rest_trainable, open_trained_rest, save_rest
from pipeline.saliency import projection_importances
from pipeline.sparsify import MaskSchedule
from pipeline.tasks.base import Task
from pipeline.training import train

FACTORS = "factors.safetensors"
SEGMENTS = "segments.json"
REST = "rest.safetensors"
"""In the folder of a QAT step: what has been trained outside the MLPs."""
ERROR_TOKENS = 4096
"""Calibration tokens on which reconstruction errors are reported, the same for every stage."""


# --- calibration, factorization, fit ---------------------------------------------------------------------------


def calibrate(folder: Path, task: Task, plan: Plan, progress: Progress) -> None:
    """Activations of the dense model on training samples (never test samples) drawn at random."""
    wanted = task.recipe.calibration.samples or task.train_samples
    generator = np.random.default_rng(task.recipe.seed)
    samples = sorted(generator.permutation(task.train_samples)[:wanted].tolist())
    task.calibrate(folder, plan, samples, progress)


def is_masked(recipe: Recipe) -> bool:
    return recipe.compression.pattern != "dense"


def factorize(folder: Path, recipe: Recipe, dense: nn.Module, group: GroupPlan, calibration: Path) -> None:
    """Initial factors of a group, before any sparsity."""
    initialization = recipe.compression.initialization
    mlps, singular_values = factorize_group(
        dense,
        group,
        calibration=None if initialization == "svd" else calibration,
        masked=is_masked(recipe),
        seed=recipe.seed,
        output_aware=initialization == "output_aware",
    )
    save_factors(mlps, folder / FACTORS)
    write_json(folder / "singular_values.json", [float(value) for value in singular_values])
    _save_errors(folder, recipe, dense, mlps, calibration)


def open_moments(dense: nn.Module, group: GroupPlan, calibration: Path) -> Mapping[int, MLPMoments]:
    """Second moments of what the linear layers of a group's dense MLPs read, by block."""
    return group_moments(dense, group, {site.block: open_activations(calibration, site) for site in group.sites})


def fit(
    folder: Path,
    recipe: Recipe,
    dense: nn.Module,
    group: GroupPlan,
    before: Path,
    calibration: Path,
    progress: Progress,
) -> None:
    """Local error minimisation of a group, with sparsification."""
    assert recipe.fit is not None
    mlps = restore_group(dense, group, before / FACTORS, masked=is_masked(recipe))
    compression = recipe.compression
    schedule = None
    if is_masked(recipe):
        importances = None
        if compression.sparsifier.saliency == "activation":
            importances = projection_importances(mlps, open_moments(dense, group, calibration))
        schedule = MaskSchedule(
            [mlp.projection(name) for mlp in mlps for name in (*mlp.site.first, mlp.site.last)],
            compression.sparsifier,
            Pattern.parse(compression.pattern),
            compression.target_sparsity,
            recipe.fit.steps,
            importances,
        )
    train(
        GroupModule(mlps),
        local_loss(local_targets(dense, mlps, calibration), recipe.fit.batch_tokens, recipe.seed),
        steps=recipe.fit.steps,
        learning_rate=recipe.fit.learning_rate,
        weight_decay=recipe.fit.weight_decay,
        progress=progress,
        label=f"fit {group.name}",
        checkpoint=folder / "checkpoint.pt",
        before_step=schedule.before_step if schedule else None,
        after_backward=schedule.after_backward if schedule else None,
    )
    save_factors(mlps, folder / FACTORS)
    _save_errors(folder, recipe, dense, mlps, calibration)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


# --- end to end ------------------------------------------------------------------------------------------------


def train_end_to_end(
    model: nn.Module,
    trained: Sequence[nn.Module],
    config: EndToEnd,
    task: Task,
    seed: int,
    checkpoint: Path,
    label: str,
    progress: Progress,
) -> None:
    """Train the parameters ``trained`` inside the whole ``model``: task loss, or KL divergence to the dense logits."""
    train(
        nn.ModuleList(trained),
        task.end_to_end_loss(model, config, seed),
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        progress=progress,
        label=label,
        checkpoint=checkpoint,
    )


def finetune(
    folder: Path, task: Task, plan: Plan, before: Sequence[Path], calibration: Path, progress: Progress
) -> None:
    """Global error minimisation: all factors together, masks kept."""
    recipe, dense = task.recipe, task.model
    assert recipe.finetune is not None
    mlps = restore_all(dense, plan, before)
    model = install(dense, mlps)
    checkpoint = folder / "checkpoint.pt"
    train_end_to_end(model, mlps, recipe.finetune, task, recipe.seed, checkpoint, "fine-tune", progress)
    for group in plan.groups:
        save_factors([mlp for mlp in mlps if mlp.group == group.name], folder / group.name / FACTORS)
    _save_errors(folder, recipe, dense, mlps, calibration)
    checkpoint.unlink(missing_ok=True)


# --- quantization ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizationInputs:
    """What every step of QAT starts from: ``base`` is the dense model with its other weights as stored,
    ``unquantized`` the folders of the groups' factors before quantization."""

    task: Task
    base: nn.Module
    plan: Plan
    unquantized: Sequence[Path]
    calibration: Path

    @property
    def recipe(self) -> Recipe:
        return self.task.recipe

    @property
    def dense(self) -> nn.Module:
        return self.task.model


def quantize(folder: Path, inputs: QuantizationInputs, progress: Progress) -> None:
    """Fake quantization without training: segments chosen, starting scales and codes found, group by group."""
    mlps = []
    segments: dict[str, tuple[Segments, Segments]] = {}
    with progress.task("starting codes", len(inputs.plan.groups)) as advance:
        for group, path in zip(inputs.plan.groups, inputs.unquantized, strict=True):
            recipe = inputs.plan.recipes[group.name]
            members = restore_group(inputs.base, group, path / FACTORS, masked=is_masked(recipe))
            moments = None
            if needs_moments(recipe):
                moments = open_moments(inputs.dense, group, inputs.calibration)
            segments[group.name] = choose_segments(recipe, group, members, moments)
            prepare_factors(recipe, group, members, segments[group.name], moments)
            save_factors(members, folder / group.name / FACTORS)
            mlps += members
            advance(1, group.name)
    assert_coverage(install(inputs.base, mlps), mlps)
    write_json(folder / SEGMENTS, segments)
    _save_errors(folder, inputs.recipe, inputs.dense, mlps, inputs.calibration)


def load_segments(folder: Path) -> dict[str, tuple[Segments, Segments]]:
    """Segments of (basis, projections) of every group, as :func:`quantize` saved them in ``folder``."""
    return {
        name: (tuple(basis), tuple(projections)) for name, (basis, projections) in read_json(folder / SEGMENTS).items()
    }


def restore_quantized(inputs: QuantizationInputs, started: Path, quantized: Path) -> list[FactorizedMLP]:
    """All MLPs with fake-quantized factors, with segments from ``started`` (the folder of :func:`quantize`) and the
    state of the step in folder ``quantized``."""
    segments, mlps = load_segments(started), []
    for group in inputs.plan.groups:
        recipe, path = inputs.plan.recipes[group.name], quantized / group.name / FACTORS
        mlps += restore_prepared(recipe, inputs.base, group, segments[group.name], path)
    return mlps


def open_base(inputs: QuantizationInputs, quantized: Path) -> nn.Module:
    """The base with what the step in folder ``quantized`` has trained outside the MLPs, if anything."""
    path = quantized / REST
    if not path.exists():
        return inputs.base
    return open_trained_rest(inputs.base, path, float16=inputs.recipe.quantization.rest.weights == "float16")


def train_quantized(
    folder: Path, inputs: QuantizationInputs, position: int, started: Path, before: Path, progress: Progress
) -> None:
    """Entry ``position`` of the recipe's QAT, local per group or end to end, from the step in folder ``before``."""
    config = inputs.recipe.quantization.training[position]
    seed = inputs.recipe.seed + 1 + position
    mlps = restore_quantized(inputs, started, before)
    if (before / REST).exists():
        shutil.copyfile(before / REST, folder / REST)
    label = f"QAT {position + 1}, {config.objective}"
    checkpoint = folder / "checkpoint.pt"
    if isinstance(config, LocalTraining):
        for group in inputs.plan.groups:
            members = [mlp for mlp in mlps if mlp.group == group.name]
            finished = folder / group.name / FACTORS
            if finished.exists():
                load_factors(members, finished)
                continue
            train(
                GroupModule(members),
                local_loss(local_targets(inputs.dense, members, inputs.calibration), config.batch_tokens, seed),
                steps=config.steps,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                progress=progress,
                label=f"{label}, {group.name}",
                checkpoint=folder / f"{group.name}.pt",
            )
            save_factors(members, finished)
            (folder / f"{group.name}.pt").unlink(missing_ok=True)
    else:
        model = install(open_base(inputs, before), mlps)
        trained: list[nn.Module] = [*mlps]
        if config.train_rest:
            rest = make_rest_trainable(model, mlps)
            trained.append(rest)
        train_end_to_end(model, trained, config, inputs.task, seed, checkpoint, label, progress)
        if config.train_rest:
            save_rest(rest, folder / REST)
        _save_groups(folder, inputs.plan, mlps)
        checkpoint.unlink(missing_ok=True)
    _save_errors(folder, inputs.recipe, inputs.dense, mlps, inputs.calibration)


def restore_all(model: nn.Module, plan: Plan, folders: Sequence[Path]) -> list[FactorizedMLP]:
    """All MLPs with unquantized factors, one folder per group."""
    mlps = []
    for group, folder in zip(plan.groups, folders, strict=True):
        mlps += restore_group(model, group, folder / FACTORS, masked=is_masked(plan.recipes[group.name]))
    return mlps


def load_errors(folder: Path) -> dict[str, float]:
    """Relative reconstruction error by block, as a stage saved it."""
    errors: dict[str, float] = json.loads((folder / "errors.json").read_text(encoding="utf-8"))
    return errors


def merge_errors(folders: Sequence[Path]) -> dict[str, float]:
    """Errors of several groups in one."""
    return {block: error for folder in folders for block, error in load_errors(folder).items()}


def _save_groups(folder: Path, plan: Plan, mlps: Sequence[FactorizedMLP]) -> None:
    for group in plan.groups:
        save_factors([mlp for mlp in mlps if mlp.group == group.name], folder / group.name / FACTORS)


def _save_errors(
    folder: Path, recipe: Recipe, dense: nn.Module, mlps: Sequence[FactorizedMLP], calibration: Path
) -> None:
    errors = reconstruction_errors(local_targets(dense, mlps, calibration), ERROR_TOKENS, recipe.seed)
    write_json(folder / "errors.json", errors)


def kept_values(mlps: Sequence[FactorizedMLP]) -> int:
    """Values that the factors keep: bases, and unmasked entries of the projections."""
    factors = named_factors(mlps).values()
    return sum(factor.weight.numel() if factor.mask is None else int(factor.mask.sum()) for factor in factors)
