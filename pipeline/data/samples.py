"""What every kind of data has in common: samples are asked for by index, and drawn in an order that a seed gives."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import Allocate, Recipe

Indices = Sequence[int] | NDArray[np.integer[Any]]
"""Numbers of the samples of a batch, from 0."""


def shuffled_order(count: int, seed: int) -> NDArray[np.int64]:
    """The numbers 0 to ``count`` - 1 in an order drawn from ``seed``: int64 [count]."""
    return np.random.default_rng(seed).permutation(count)


def check_samples_asked(section: str, samples: int | None, split: str, there: int) -> None:
    """Raise InputError where ``samples`` of a recipe's ``section`` are more than are ``there``, in the split
    ``split``."""
    if samples is not None and samples > there:
        raise InputError(
            f"{section}.samples: {samples} samples asked for, the {split} split has {there}; ask for at most that "
            "many, or leave the key out for all"
        )


def check_train_samples(recipe: Recipe, there: int) -> None:
    """Raise InputError where a recipe asks for more training samples than are ``there``."""
    check_samples_asked("calibration", recipe.calibration.samples, "train", there)
    allocate = recipe.allocate
    if allocate is not None and allocate.samples != Allocate.model_fields["samples"].default:
        check_samples_asked("allocate", allocate.samples, "train", there)
