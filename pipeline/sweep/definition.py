"""The file of a sweep: a base recipe and axes; every combination of their values is a point with a recipe of its own.

Errors of the file and of any point's recipe are found when the file is read, before anything runs.
"""

import copy
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from pipeline.plumbing.errors import InputError
from pipeline.recipe.reading import parse_recipe, parse_section, read_yaml, set_key
from pipeline.recipe.schema import AtKeyError, Positive, Recipe, Section, UserPath

_LONGEST_NAME = 150
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{name}{digit}" for name in ("COM", "LPT") for digit in range(1, 10))}
Overrides = dict[str, Any]
"""Dotted key of a recipe → value."""


class SweepFile(Section):
    """A sweep's file. ``recipe``: path of the base recipe, relative to the sweep's file. ``set``: overrides for every
    point.

    ``axes``: name → values, each a label with overrides; or, where the name is itself a key of recipes, a plain list of
    its values. Later axes override earlier ones. ``threads``: of each point; all cores, shared by the points that run
    side by side, if not given. Numbers may differ in their last digits between numbers of threads.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    recipe: UserPath
    set: Overrides = Field(default_factory=dict)
    axes: Annotated[dict[str, Annotated[dict[str, Overrides], Field(min_length=1)]], Field(min_length=1)]
    threads: Positive | None = None

    @field_validator("axes", mode="before")
    @classmethod
    def _values_have_labels(cls, axes: Any) -> Any:
        """A list of values becomes labels with one override each; labels that YAML reads as numbers become text."""
        if not isinstance(axes, dict):
            return axes
        labelled = {}
        for name, values in axes.items():
            pairs: list[tuple[Any, Any]] | None = None
            if isinstance(values, list) and isinstance(name, str):
                pairs = [(_label(name, value), {name: value}) for value in values]
            elif isinstance(values, dict):
                pairs = [(str(label), overrides) for label, overrides in values.items()]
            if pairs is not None:
                values = dict(pairs)
                if len(values) < len(pairs):
                    raise AtKeyError(str(name), "two of its values have one label; leave one out, or give labels")
            labelled[name] = values
        return labelled


@dataclass(frozen=True)
class Point:
    """One combination of the axes' values. ``name`` serves as a folder's name; ``labels``: axis → label; ``overrides``:
    what its recipe has in place of the base recipe's values; ``content``: the recipe as nested mappings, ``recipe`` the
    same validated."""

    name: str
    labels: dict[str, str]
    overrides: Overrides
    content: dict[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A sweep read from its file."""

    name: str
    axes: dict[str, list[str]]
    points: tuple[Point, ...]
    threads: int | None


def load_sweep(path: Path) -> Sweep:
    """Read a sweep's file and derive its points. Raises InputError naming the file, key, value and remedy."""
    file = parse_section(SweepFile, read_yaml(path, "sweep"), str(path))
    base = read_yaml(path.parent / file.recipe, "recipe")
    parse_recipe(base, str(path.parent / file.recipe))
    points: dict[str, Point] = {}
    taken: dict[str, str] = {}
    for combination in itertools.product(*(values.items() for values in file.axes.values())):
        labels = dict(zip(file.axes, (label for label, _ in combination), strict=True))
        overrides = {**file.set}
        for _, more in combination:
            overrides.update(more)
        name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", label) for label in labels.values())
        where = f"{path}: point {name}"
        _check_name(name, f"{path}: axes")
        if other := taken.get(name.lower()):
            which = f"called {name}" if other == name else f"called {other} and {name}, which some disks take for one"
            raise InputError(f"{path}: axes: two points would be {which}; give their values other labels")
        taken[name.lower()] = name
        content = copy.deepcopy(base)
        for key, value in overrides.items():
            set_key(content, key, copy.deepcopy(value), where)
        content["name"] = f"{file.name}-{name}"
        points[name] = Point(name, labels, overrides, content, parse_recipe(content, where))
    axes = {name: list(values) for name, values in file.axes.items()}
    return Sweep(file.name, axes, tuple(points.values()), file.threads)


def _check_name(name: str, where: str) -> None:
    """Raise InputError, which ``where`` begins, unless a point's name can be that of a folder, on any system."""
    begin, _, _ = name.partition(".")
    if not re.search("[A-Za-z0-9]", begin):
        said = "begins with no letter or digit"
    elif name.endswith("."):
        said = "ends in a full stop"
    elif len(name) > _LONGEST_NAME:
        said = f"has {len(name)} characters, and {_LONGEST_NAME} at most can be in the name of a folder"
    elif begin.upper() in _RESERVED:
        said = "is a device on Windows"
    else:
        return
    raise InputError(f"{where}: a point would be called {name[:80]!r}, which {said}; give its values other labels")


def _label(key: str, value: Any) -> str:
    """Label of a value that has none, with the last part of its key, so that labels of several axes can be told
    apart."""
    text = value if isinstance(value, str | int | float) else "+".join(map(str, _leaves(value)))
    return f"{key.rpartition('.')[2]} {text}"


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list) else [value]
