"""Calibration of the dense model, factorization and fit of single groups: each writes its result into a folder."""

from pathlib import Path

import numpy as np
from torch import nn

from fips_ort.layout import Pattern
from pipeline.compression.factors import factorize_group, restore_group, save_factors
from pipeline.compression.fit import GroupModule, local_loss, local_targets
from pipeline.compression.moments import open_moments
from pipeline.compression.saliency import projection_importances
from pipeline.compression.sparsify import MaskSchedule
from pipeline.plumbing.files import write_json
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import train
from pipeline.recipe.plan import GroupPlan, Plan
from pipeline.recipe.schema import Recipe
from pipeline.stages.results import FACTORS, save_errors
from pipeline.tasks.base import Task


def calibrate(folder: Path, task: Task, plan: Plan, progress: Progress) -> None:
    """Activations of the dense model on training samples (never test samples) drawn at random."""
    wanted = task.recipe.calibration.samples or task.train_samples
    generator = np.random.default_rng(task.recipe.seed)
    samples = sorted(generator.permutation(task.train_samples)[:wanted].tolist())
    task.calibrate(folder, plan, samples, progress)


def factorize(folder: Path, recipe: Recipe, dense: nn.Module, group: GroupPlan, calibration: Path) -> None:
    """Initial factors of a group, before any sparsity."""
    initialization = recipe.compression.initialization
    mlps, singular_values = factorize_group(
        dense,
        group,
        calibration=None if initialization == "svd" else calibration,
        masked=recipe.compression.is_masked,
        seed=recipe.seed,
        output_aware=initialization == "output_aware",
    )
    save_factors(mlps, folder / FACTORS)
    write_json(folder / "singular_values.json", [float(value) for value in singular_values])
    save_errors(folder, recipe, dense, mlps, calibration)


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
    mlps = restore_group(dense, group, before / FACTORS, masked=recipe.compression.is_masked)
    compression = recipe.compression
    schedule = None
    if recipe.compression.is_masked:
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
    save_errors(folder, recipe, dense, mlps, calibration)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
