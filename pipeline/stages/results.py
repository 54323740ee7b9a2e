"""What stages leave: factors and reconstruction errors, in a folder for each group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import restore_group, save_factors
from pipeline.compression.fit import local_targets, reconstruction_errors
from pipeline.plumbing.files import read_json, write_json
from pipeline.plumbing.integrity import is_whole, note_hash
from pipeline.plumbing.run_folder import StageResult
from pipeline.recipe.plan import GroupPlan, Plan
from pipeline.recipe.schema import Recipe

FACTORS = "factors.safetensors"
_ERRORS = "errors.json"
_ERROR_TOKENS = 4096
"""Calibration tokens on which reconstruction errors are reported, the same for every stage."""


@dataclass(frozen=True)
class SavedFactors:
    """The factors of all groups as one stage, or a stage for each group, has saved them.

    ``folders``: by name of the group. ``results``: what a stage that reads them depends on.
    """

    folders: Mapping[str, Path]
    results: tuple[StageResult, ...]

    @classmethod
    def of_groups(cls, results: Mapping[str, StageResult]) -> "SavedFactors":
        """The factors that a stage of its own has saved for each group, by the group's name."""
        return cls({name: result.folder for name, result in results.items()}, tuple(results.values()))

    @classmethod
    def of_stage(cls, result: StageResult, plan: Plan) -> "SavedFactors":
        """The factors of all groups of ``plan`` that one stage has saved."""
        return cls({group.name: result.folder / group.name for group in plan.groups}, (result,))

    def restore_group(self, model: nn.Module, plan: Plan, group: GroupPlan) -> list[FactorizedMLP]:
        """The MLPs of a group with these (unquantized) factors; the rest of them is that of ``model``."""
        masked = plan.recipes[group.name].compression.is_masked
        return restore_group(model, group, self.folders[group.name] / FACTORS, masked=masked)

    def restore(self, model: nn.Module, plan: Plan) -> list[FactorizedMLP]:
        """The MLPs of all groups of ``plan``, as :meth:`restore_group` gives them."""
        return [mlp for group in plan.groups for mlp in self.restore_group(model, plan, group)]

    def errors(self) -> dict[str, float]:
        """Relative reconstruction errors by block."""
        errors: dict[str, float] = {}
        for folder in self.folders.values():
            errors |= read_json(folder / _ERRORS)
        return errors


def save_group(
    folder: Path, recipe: Recipe, dense: nn.Module, mlps: Sequence[FactorizedMLP], calibration: Path
) -> None:
    """Write the factors of one group, and their reconstruction errors on the calibration data, into ``folder``."""
    errors = reconstruction_errors(local_targets(dense, mlps, calibration), _ERROR_TOKENS, recipe.seed)
    write_json(folder / _ERRORS, errors)
    save_factors(mlps, folder / FACTORS)


def note_group(folder: Path) -> None:
    """Note that the group in ``folder`` is complete, for an attempt that comes after a killed one."""
    for name in (_ERRORS, FACTORS):
        note_hash(folder / name)


def is_group_whole(folder: Path) -> bool:
    """Whether ``folder`` holds a group as it was when :func:`note_group` noted it."""
    return all(is_whole(folder / name) for name in (_ERRORS, FACTORS))


def save_groups(
    folder: Path, plan: Plan, dense: nn.Module, mlps: Sequence[FactorizedMLP], calibration: Path
) -> None:
    """Write the factors of all groups of ``plan`` into folders of their names, as :func:`save_group` does."""
    for group in plan.groups:
        members = [mlp for mlp in mlps if mlp.group == group.name]
        save_group(folder / group.name, plan.recipes[group.name], dense, members, calibration)
