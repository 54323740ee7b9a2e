"""The start of quantization: segments, scales and codes of every factor; and how later stages restore them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import install, restore_group, save_factors
from pipeline.compression.moments import open_moments
from pipeline.plumbing.files import read_json, write_json
from pipeline.plumbing.progress import Progress
from pipeline.quantization.prepare import assert_coverage, needs_moments, prepare_factors, restore_prepared
from pipeline.quantization.rest_training import open_trained_rest
from pipeline.quantization.segments import choose_segments
from pipeline.recipe.plan import Plan, Segments
from pipeline.recipe.schema import Recipe
from pipeline.stages.results import FACTORS, save_errors
from pipeline.tasks.base import Task

SEGMENTS = "segments.json"
REST = "rest.safetensors"
"""In the folder of a QAT step: what has been trained outside the MLPs."""


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
            members = restore_group(inputs.base, group, path / FACTORS, masked=recipe.compression.is_masked)
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
    save_errors(folder, inputs.recipe, inputs.dense, mlps, inputs.calibration)


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
