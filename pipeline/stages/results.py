"""What stages leave in their folders, beside what is theirs alone: the factors of groups, and their errors."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import restore_group, save_factors
from pipeline.compression.fit import local_targets, reconstruction_errors
from pipeline.plumbing.files import write_json
from pipeline.recipe.plan import Plan
from pipeline.recipe.schema import Recipe

FACTORS = "factors.safetensors"
ERROR_TOKENS = 4096
"""Calibration tokens on which reconstruction errors are reported, the same for every stage."""


def restore_all(model: nn.Module, plan: Plan, folders: Sequence[Path]) -> list[FactorizedMLP]:
    """All MLPs with unquantized factors, one folder per group."""
    mlps = []
    for group, folder in zip(plan.groups, folders, strict=True):
        mlps += restore_group(model, group, folder / FACTORS, masked=plan.recipes[group.name].compression.is_masked)
    return mlps


def load_errors(folder: Path) -> dict[str, float]:
    """Relative reconstruction error by block, as a stage saved it."""
    errors: dict[str, float] = json.loads((folder / "errors.json").read_text(encoding="utf-8"))
    return errors


def merge_errors(folders: Sequence[Path]) -> dict[str, float]:
    """Errors of several groups in one."""
    return {block: error for folder in folders for block, error in load_errors(folder).items()}


def save_groups(folder: Path, plan: Plan, mlps: Sequence[FactorizedMLP]) -> None:
    for group in plan.groups:
        save_factors([mlp for mlp in mlps if mlp.group == group.name], folder / group.name / FACTORS)


def save_errors(
    folder: Path, recipe: Recipe, dense: nn.Module, mlps: Sequence[FactorizedMLP], calibration: Path
) -> None:
    errors = reconstruction_errors(local_targets(dense, mlps, calibration), ERROR_TOKENS, recipe.seed)
    write_json(folder / "errors.json", errors)
