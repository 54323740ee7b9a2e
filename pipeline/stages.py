"""The stages of a run, each a function from typed inputs to files in its folder; :mod:`pipeline.run` lists them."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import AutoImageProcessor

from exporters.rest import fix_position_embeddings, quantize_linears, round_to_float16
from fips_ort.layout import Pattern
from pipeline.calibrate import record_activations
from pipeline.compress import (
    factorize_group,
    install,
    load_factors,
    local_targets,
    named_factors,
    restore_group,
    save_factors,
)
from pipeline.data import ImageData
from pipeline.evaluate import Quality, evaluate
from pipeline.factorized_mlp import FactorizedMLP
from pipeline.files import read_json, write_aside, write_json
from pipeline.fit import GroupModule, local_loss, reconstruction_errors
from pipeline.models.adapters import MLPSite, check_finite
from pipeline.models.loading import LoadedModel, hash_model, load_model, model_class
from pipeline.models.preprocessing import Preprocessing
from pipeline.plan import GroupPlan, Plan, Segments
from pipeline.progress import Progress
from pipeline.quantize import assert_coverage, choose_segments, prepare_factors
from pipeline.recipe import EndToEnd, LocalTraining, PretrainedModel, Recipe
from pipeline.sparsify import MaskSchedule
from pipeline.training import train
from qat.factor import Factor

FACTORS = "factors.safetensors"
ERROR_TOKENS = 4096
"""Calibration tokens on which reconstruction errors are reported, the same for every stage."""


# --- dense model -----------------------------------------------------------------------------------------------


def train_dense(
    folder: Path, recipe: Recipe, preprocessing: Preprocessing, data: ImageData, progress: Progress
) -> None:
    """Models that the run trains or rebuilds itself: saved like any transformers checkpoint.

    A pretrained model stays where it is, uncopied.
    """
    if isinstance(recipe.model, PretrainedModel):
        return
    training = recipe.model.training if recipe.model.source == "scratch" else recipe.model.head
    with progress.counter("train the dense model", training.steps) as report:
        loaded = load_model(recipe.model, preprocessing, data, recipe.seed, report)
    loaded.model.save_pretrained(folder / "model")  # type: ignore[operator]
    loaded.image_processor.save_pretrained(folder / "model")


def open_dense(folder: Path, recipe: Recipe, preprocessing: Preprocessing, data: ImageData) -> LoadedModel:
    """The dense model: a pretrained one from where it is, another from what :func:`train_dense` saved."""
    if isinstance(recipe.model, PretrainedModel):
        return load_model(recipe.model, preprocessing, data, recipe.seed)
    model = model_class().from_pretrained(folder / "model", attn_implementation="eager").eval()
    check_finite(model)
    processor = AutoImageProcessor.from_pretrained(folder / "model", backend="pil")
    return LoadedModel(model, processor, preprocessing.image_size, data.labels, hash_model(model))


# --- quality ---------------------------------------------------------------------------------------------------


def measure(
    predict: Callable[[Tensor], Tensor], recipe: Recipe, data: ImageData, progress: Progress, label: str
) -> Quality:
    """Accuracy of a form of the model on the recipe's test samples."""
    total = recipe.evaluation.samples or len(data.test)
    with progress.counter(f"evaluate {label}", total) as report:
        quality = evaluate(predict, data.test, recipe.evaluation.batch_size, recipe.evaluation.samples, report)
    progress.say(f"  accuracy, {label}: {100 * quality.accuracy:.2f} ± {100 * quality.standard_error:.2f} %")
    return quality


def evaluate_model(
    folder: Path, name: str, make_model: Callable[[], nn.Module], recipe: Recipe, data: ImageData, progress: Progress
) -> None:
    """Accuracy of a PyTorch model, which is made only if it has to be evaluated."""
    save_quality(measure(predictor(make_model().eval()), recipe, data, progress, name), folder)


def predictor(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A PyTorch classifier as a function of pixel values."""
    return lambda pixel_values: model(pixel_values=pixel_values).logits


def save_quality(quality: Quality, folder: Path) -> None:
    fields = {key: value for key, value in asdict(quality).items() if key != "logits"}
    write_aside(folder / "logits.safetensors", lambda path: save_file({"logits": quality.logits.numpy()}, path))
    write_json(folder / "quality.json", fields)


def load_quality(folder: Path) -> Quality:
    logits = torch.from_numpy(load_file(folder / "logits.safetensors")["logits"])
    return Quality(**read_json(folder / "quality.json"), logits=logits)


# --- calibration, factorization, fit ---------------------------------------------------------------------------


def calibrate(
    folder: Path, recipe: Recipe, dense: nn.Module, plan: Plan, data: ImageData, progress: Progress
) -> None:
    """Activations of the dense model on training images (never test images) drawn at random."""
    wanted = recipe.calibration.samples or len(data.train)
    generator = np.random.default_rng(recipe.seed)
    samples = sorted(generator.permutation(len(data.train))[:wanted].tolist())
    sites = [site for group in plan.groups for site in group.sites]
    record_activations(dense, sites, data.train, samples, recipe.calibration.batch_size, folder, progress)


def is_masked(recipe: Recipe) -> bool:
    return recipe.compression.pattern != "dense"


def factorize(folder: Path, recipe: Recipe, dense: nn.Module, group: GroupPlan, calibration: Path) -> None:
    """Initial factors of a group, before any sparsity."""
    weighted = calibration if recipe.compression.initialization == "activation_svd" else None
    mlps, singular_values = factorize_group(
        dense, group, calibration=weighted, masked=is_masked(recipe), seed=recipe.seed
    )
    save_factors(mlps, folder / FACTORS)
    write_json(folder / "singular_values.json", [float(value) for value in singular_values])
    _save_errors(folder, recipe, dense, mlps, calibration)


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
    mlps = restore_group(dense, group, before / FACTORS, masked=is_masked(recipe))
    compression = recipe.compression
    schedule = None
    if is_masked(recipe):
        schedule = MaskSchedule(
            [projection for mlp in mlps for projection in mlp.projections.values() if isinstance(projection, Factor)],
            compression.sparsifier,
            Pattern.parse(compression.pattern),
            compression.target_sparsity,
            recipe.fit.steps,
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
    mlps: Sequence[FactorizedMLP],
    config: EndToEnd,
    dense: nn.Module,
    data: ImageData,
    seed: int,
    checkpoint: Path,
    label: str,
    progress: Progress,
) -> None:
    """Train the factors inside the whole ``model``: task loss, or KL divergence to the dense logits."""

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        count = min(config.batch_size, len(data.train))
        indices = torch.randperm(len(data.train), generator=generator)[:count]
        pixel_values, labels = data.train.batch(indices.numpy())
        logits = model(pixel_values=pixel_values).logits
        if config.objective == "task":
            return F.cross_entropy(logits, labels)
        with torch.no_grad():
            target = torch.log_softmax(dense(pixel_values=pixel_values).logits, dim=-1)
        return F.kl_div(torch.log_softmax(logits, dim=-1), target, log_target=True, reduction="batchmean")

    train(
        nn.ModuleList(mlps),
        loss,
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        progress=progress,
        label=label,
        checkpoint=checkpoint,
    )


def finetune(
    folder: Path,
    recipe: Recipe,
    dense: nn.Module,
    plan: Plan,
    before: Sequence[Path],
    calibration: Path,
    data: ImageData,
    progress: Progress,
) -> None:
    """Global error minimisation: all factors together, masks kept."""
    assert recipe.finetune is not None
    mlps = restore_all(recipe, dense, plan, before)
    model = install(dense, mlps)
    checkpoint = folder / "checkpoint.pt"
    train_end_to_end(model, mlps, recipe.finetune, dense, data, recipe.seed, checkpoint, "fine-tune", progress)
    for group in plan.groups:
        save_factors([mlp for mlp in mlps if mlp.group == group.name], folder / group.name / FACTORS)
    _save_errors(folder, recipe, dense, mlps, calibration)
    checkpoint.unlink(missing_ok=True)


# --- quantization ----------------------------------------------------------------------------------------------


def store_rest(recipe: Recipe, dense: nn.Module, sites: Sequence[MLPSite], image_size: int) -> nn.Module:
    """A copy of the dense model that computes with its weights outside the MLPs as they will be stored."""
    rest = recipe.quantization.rest
    base = copy.deepcopy(dense)
    # Before rounding: what is interpolated here is stored too.
    fix_position_embeddings(base, image_size, image_size)
    if rest.linear_bits is not None:
        skip = ["classifier", *(f"{site.path}.{name}" for site in sites for name in (*site.first, site.last))]
        base = quantize_linears(base, rest.linear_bits, rest.block_size, skip, recipe.export.accuracy_level)
    return round_to_float16(base) if rest.weights == "float16" else base


def segments_of_groups(
    recipe: Recipe, dense: nn.Module, plan: Plan, before: Sequence[Path]
) -> dict[str, tuple[Segments, Segments]]:
    """Segments of (basis, projections) of every group, from the factors before quantization."""
    segments = {}
    for group, path in zip(plan.groups, before, strict=True):
        mlps = restore_group(dense, group, path / FACTORS, masked=is_masked(recipe))
        segments[group.name] = choose_segments(recipe, group, mlps)
    return segments


@dataclass(frozen=True)
class QuantizationInputs:
    """What every step of QAT starts from: ``base`` is the dense model with its other weights as stored,
    ``unquantized`` the folders of the groups' factors before quantization."""

    recipe: Recipe
    dense: nn.Module
    base: nn.Module
    plan: Plan
    unquantized: Sequence[Path]
    calibration: Path


def restore_quantized(inputs: QuantizationInputs, quantized: Path | None) -> list[FactorizedMLP]:
    """All MLPs with fake-quantized factors: prepared from the unquantized ones, then with the trained state of
    the step in folder ``quantized``, if given."""
    mlps = []
    for group, path in zip(inputs.plan.groups, inputs.unquantized, strict=True):
        members = restore_group(inputs.base, group, path / FACTORS, masked=is_masked(inputs.recipe))
        prepare_factors(inputs.recipe, group, members)
        if quantized is not None:
            load_factors(members, quantized / group.name / FACTORS)
        mlps += members
    return mlps


def quantize(folder: Path, inputs: QuantizationInputs) -> None:
    """Fake quantization without training: scales searched, nothing else changed."""
    mlps = restore_quantized(inputs, None)
    assert_coverage(install(inputs.base, mlps), mlps)
    _save_groups(folder, inputs.plan, mlps)
    _save_errors(folder, inputs.recipe, inputs.dense, mlps, inputs.calibration)


def train_quantized(
    folder: Path, inputs: QuantizationInputs, position: int, before: Path, data: ImageData, progress: Progress
) -> None:
    """Entry ``position`` of the recipe's QAT, local per group or end to end, from the step in folder ``before``."""
    config = inputs.recipe.quantization.training[position]
    seed = inputs.recipe.seed + 1 + position
    mlps = restore_quantized(inputs, before)
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
        model = install(inputs.base, mlps)
        train_end_to_end(model, mlps, config, inputs.dense, data, seed, checkpoint, label, progress)
        _save_groups(folder, inputs.plan, mlps)
        checkpoint.unlink(missing_ok=True)
    _save_errors(folder, inputs.recipe, inputs.dense, mlps, inputs.calibration)


def restore_all(recipe: Recipe, model: nn.Module, plan: Plan, folders: Sequence[Path]) -> list[FactorizedMLP]:
    """All MLPs with unquantized factors, one folder per group."""
    mlps = []
    for group, folder in zip(plan.groups, folders, strict=True):
        mlps += restore_group(model, group, folder / FACTORS, masked=is_masked(recipe))
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
