"""Factorization and fit of single groups, from the activations of the dense model: each writes into its folder."""

from pathlib import Path

from torch import nn

from pipeline.compression.factors import initial_factors, restore_group
from pipeline.compression.fit import GroupModule, local_loss, local_targets
from pipeline.compression.moments import open_moments
from pipeline.compression.sparsify import mask_schedule
from pipeline.plumbing.files import write_json
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import remove_checkpoint, train
from pipeline.recipe.plan import GroupPlan
from pipeline.recipe.schema import Recipe
from pipeline.stages.results import FACTORS, save_group


def factorize(folder: Path, recipe: Recipe, dense: nn.Module, group: GroupPlan, calibration: Path) -> None:
    """Find initial factors of a group, before any sparsity."""
    mlps, singular_values = initial_factors(recipe, dense, group, calibration)
    write_json(folder / "singular_values.json", [float(value) for value in singular_values])
    save_group(folder, recipe, dense, mlps, calibration)


def fit(
    folder: Path,
    recipe: Recipe,
    dense: nn.Module,
    group: GroupPlan,
    before: Path,
    calibration: Path,
    progress: Progress,
) -> None:
    """Minimise the local error of a group, from the factors in the folder ``before``, with sparsification."""
    compression, config = recipe.compression, recipe.fit
    assert config is not None
    mlps = restore_group(dense, group, before / FACTORS, masked=compression.is_masked)
    schedule = None
    if compression.is_masked:
        by_activation = compression.sparsifier.saliency == "activation"
        moments = open_moments(dense, group, calibration) if by_activation else None
        schedule = mask_schedule(mlps, compression, config.steps, moments)
    checkpoint = folder / "checkpoint.pt"
    train(
        GroupModule(mlps),
        local_loss(local_targets(dense, mlps, calibration), config.batch_tokens, recipe.seed),
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        progress=progress,
        label=f"fit {group.name}",
        checkpoint=checkpoint,
        before_step=schedule.before_step if schedule else None,
        after_backward=schedule.after_backward if schedule else None,
    )
    save_group(folder, recipe, dense, mlps, calibration)
    remove_checkpoint(checkpoint)
