"""The start of quantization: segments, scales and codes of every factor; and how later stages restore them."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from fips_ort.layout import Segments
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import install
from pipeline.compression.moments import open_moments
from pipeline.plumbing.files import read_json, write_json
from pipeline.plumbing.progress import Progress
from pipeline.quantization.freeze import assert_coverage
from pipeline.quantization.prepare import restore_prepared, start_quantization
from pipeline.quantization.rest_training import open_trained_rest
from pipeline.recipe.plan import Plan
from pipeline.recipe.schema import Recipe
from pipeline.stages.results import FACTORS, SavedFactors, save_groups
from pipeline.tasks.base import Task

SEGMENTS = "segments.json"
TRAINED_REST = "rest.safetensors"
"""File in the folder of a QAT step with what has been trained outside the MLPs."""


@dataclass(frozen=True)
class QuantizationInputs:
    """What every step of QAT starts from.

    ``base``: the dense model with its weights outside the MLPs as they will be stored. ``unquantized``: the factors
    before quantization. ``calibration``: folder of the recorded activations.
    """

    task: Task
    base: nn.Module
    plan: Plan
    unquantized: SavedFactors
    calibration: Path

    @property
    def recipe(self) -> Recipe:
        return self.task.recipe

    @property
    def dense(self) -> nn.Module:
        return self.task.model


def quantize(folder: Path, inputs: QuantizationInputs, progress: Progress) -> None:
    """Start fake quantization without training: segments are chosen, scales and codes found, group by group."""
    plan, mlps = inputs.plan, []
    segments: dict[str, tuple[Segments, Segments]] = {}
    with progress.task("starting codes", len(plan.groups)) as advance:
        for group in plan.groups:
            members = inputs.unquantized.restore_group(inputs.base, plan, group)
            moments = partial(open_moments, inputs.dense, group, inputs.calibration)
            segments[group.name] = start_quantization(plan.recipes[group.name], group, members, moments)
            mlps += members
            advance(1, group.name)
    assert_coverage(install(inputs.base, mlps), mlps)
    write_json(folder / SEGMENTS, segments)
    save_groups(folder, plan, inputs.dense, mlps, inputs.calibration)


def load_segments(folder: Path) -> dict[str, tuple[Segments, Segments]]:
    """Segments of (basis, projections) of every group, as :func:`quantize` saved them in ``folder``."""
    return {
        name: (tuple(basis), tuple(projections)) for name, (basis, projections) in read_json(folder / SEGMENTS).items()
    }


def restore_quantized(inputs: QuantizationInputs, started: Path, quantized: Path) -> list[FactorizedMLP]:
    """All MLPs with fake-quantized factors: segments from ``started``, the folder of :func:`quantize`, and the state
    that the step in the folder ``quantized`` left."""
    segments, mlps = load_segments(started), []
    for group in inputs.plan.groups:
        recipe, path = inputs.plan.recipes[group.name], quantized / group.name / FACTORS
        mlps += restore_prepared(recipe, inputs.base, group, segments[group.name], path)
    return mlps


def open_base(inputs: QuantizationInputs, quantized: Path) -> nn.Module:
    """The base with what the step in the folder ``quantized`` has trained outside the MLPs, if anything."""
    path = quantized / TRAINED_REST
    if not path.exists():
        return inputs.base
    return open_trained_rest(inputs.base, path, float16=inputs.recipe.quantization.rest.weights == "float16")
