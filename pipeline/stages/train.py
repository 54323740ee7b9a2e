"""Training of the factors in the whole model or group by group: the optional fine-tuning, and the steps of QAT."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import install, load_factors
from pipeline.compression.fit import GroupModule, local_loss, local_targets
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import remove_checkpoint, train
from pipeline.quantization.rest_training import make_rest_trainable, save_rest
from pipeline.recipe.plan import Plan
from pipeline.recipe.schema import EndToEnd, LocalTraining, QuantizedEndToEnd
from pipeline.stages.quantize import TRAINED_REST, QuantizationInputs, open_base, restore_quantized
from pipeline.stages.results import FACTORS, SavedFactors, is_group_whole, note_group, save_group, save_groups
from pipeline.tasks.base import Task

_CHECKPOINT = "checkpoint.pt"


def finetune(
    folder: Path, task: Task, plan: Plan, before: SavedFactors, calibration: Path, progress: Progress
) -> None:
    """Minimise the global error: all factors are trained together, from ``before``; masks are kept."""
    recipe, dense = task.recipe, task.model
    assert recipe.finetune is not None
    mlps = before.restore(dense, plan)
    _train_end_to_end(
        install(dense, mlps),
        mlps,
        recipe.finetune,
        task=task,
        seed=recipe.seed,
        folder=folder,
        label="fine-tune",
        progress=progress,
    )
    save_groups(folder, plan, dense, mlps, calibration)
    remove_checkpoint(folder / _CHECKPOINT)


def train_quantized(
    folder: Path, inputs: QuantizationInputs, position: int, started: Path, before: Path, progress: Progress
) -> None:
    """Train as entry ``position`` of the recipe's QAT says, local per group or end to end.

    ``started``: folder of :func:`pipeline.stages.quantize.quantize`. ``before``: folder of the step before this one.
    """
    config = inputs.recipe.quantization.training[position]
    seed = inputs.recipe.seed + 1 + position
    mlps = restore_quantized(inputs, started, before)
    if (before / TRAINED_REST).exists():
        shutil.copyfile(before / TRAINED_REST, folder / TRAINED_REST)
    label = f"QAT {position + 1}, {config.objective}"
    if isinstance(config, LocalTraining):
        _train_locally(folder, inputs, mlps, config, seed=seed, label=label, progress=progress)
    else:
        _train_together(folder, inputs, mlps, config, before=before, seed=seed, label=label, progress=progress)


def _train_locally(
    folder: Path,
    inputs: QuantizationInputs,
    mlps: Sequence[FactorizedMLP],
    config: LocalTraining,
    *,
    seed: int,
    label: str,
    progress: Progress,
) -> None:
    """Train group after group; those that a killed run has finished are left as they are."""
    for group in inputs.plan.groups:
        members = [mlp for mlp in mlps if mlp.group == group.name]
        finished, checkpoint = folder / group.name, folder / f"{group.name}.pt"
        if is_group_whole(finished):
            load_factors(members, finished / FACTORS)
            continue
        train(
            GroupModule(members),
            local_loss(local_targets(inputs.dense, members, inputs.calibration), config.batch_tokens, seed),
            steps=config.steps,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            progress=progress,
            label=f"{label}, {group.name}",
            checkpoint=checkpoint,
        )
        save_group(finished, inputs.recipe, inputs.dense, members, inputs.calibration)
        note_group(finished)
        remove_checkpoint(checkpoint)


def _train_together(
    folder: Path,
    inputs: QuantizationInputs,
    mlps: Sequence[FactorizedMLP],
    config: QuantizedEndToEnd,
    *,
    before: Path,
    seed: int,
    label: str,
    progress: Progress,
) -> None:
    """Train all factors, and the weights around them where the recipe says so, in the whole model."""
    model = install(open_base(inputs, before), mlps)
    rest = make_rest_trainable(model, mlps) if config.train_rest else None
    trained = [*mlps] if rest is None else [*mlps, rest]
    _train_end_to_end(
        model, trained, config, task=inputs.task, seed=seed, folder=folder, label=label, progress=progress
    )
    if rest is not None:
        save_rest(rest, folder / TRAINED_REST)
    save_groups(folder, inputs.plan, inputs.dense, mlps, inputs.calibration)
    remove_checkpoint(folder / _CHECKPOINT)


def _train_end_to_end(
    model: nn.Module,
    trained: Sequence[nn.Module],
    config: EndToEnd,
    *,
    task: Task,
    seed: int,
    folder: Path,
    label: str,
    progress: Progress,
) -> None:
    """Train the modules ``trained`` inside the whole ``model``, with a checkpoint in ``folder``."""
    train(
        nn.ModuleList(trained),
        task.end_to_end_loss(model, config, seed),
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        progress=progress,
        label=label,
        checkpoint=folder / _CHECKPOINT,
    )
