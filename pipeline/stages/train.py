"""Training of the factors in the whole model or group by group: the optional fine-tuning, and the steps of QAT."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pipeline.compression.factors import install, load_factors, save_factors
from pipeline.compression.fit import GroupModule, local_loss, local_targets
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import train
from pipeline.quantization.rest_training import make_rest_trainable, save_rest
from pipeline.recipe.plan import Plan
from pipeline.recipe.schema import EndToEnd, LocalTraining
from pipeline.stages.quantize import REST, QuantizationInputs, open_base, restore_quantized
from pipeline.stages.results import FACTORS, restore_all, save_errors, save_groups
from pipeline.tasks.base import Task


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
    save_errors(folder, recipe, dense, mlps, calibration)
    checkpoint.unlink(missing_ok=True)


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
        save_groups(folder, inputs.plan, mlps)
        checkpoint.unlink(missing_ok=True)
    save_errors(folder, inputs.recipe, inputs.dense, mlps, inputs.calibration)
