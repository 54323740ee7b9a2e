"""Imports go one way: from what a user calls down to what an edge device runs, between packages and between rooms."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

ROOMS = (
    "benchmarks",
    "pipeline.cli",
    "pipeline.evaluate_artifact pipeline.generate pipeline.run pipeline.sweep",
    "pipeline.estimate pipeline.report",
    "pipeline.stages",
    "pipeline.tasks",
    "pipeline.evaluation pipeline.quantization",
    "pipeline.compression pipeline.vocabulary",
    "pipeline.models",
    "pipeline.data",
    "pipeline.recipe",
    "pipeline.plumbing",
    "exporters qat",
    "fips_ort",
)
"""Packages and modules from top to bottom: each imports only from lines below its own, and from itself."""
LINES = {room: line for line, rooms in enumerate(ROOMS) for room in rooms.split()}


def modules() -> dict[str, Path]:
    """All modules of the project but the tests, by their name."""
    roots = {"pipeline": ROOT, "exporters": ROOT, "qat": ROOT, "benchmarks": ROOT, "fips_ort": ROOT / "runtime"}
    found = {}
    for package, root in roots.items():
        for path in sorted((root / package).rglob("*.py")):
            found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Everything that a module imports, wherever in it: ``module`` and ``module.name``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = modules()
IMPORTS = {name: set(imported(ast.parse(path.read_text(encoding="utf-8")))) for name, path in MODULES.items()}


def room(module: str) -> str | None:
    """The room of :data:`ROOMS` that a module is in; None for other packages, and for ``pipeline`` itself."""
    return next((name for name in LINES if module == name or module.startswith(f"{name}.")), None)


def test_every_module_has_a_room() -> None:
    assert [name for name in MODULES if room(name) is None] == ["pipeline"]
    assert {room(name) for name in MODULES} - {None} == LINES.keys()


def test_no_import_runs_up() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others)
        if (own := room(name)) is not None
        and (target := room(other)) is not None
        and target != own
        and LINES[target] <= LINES[own]
    ]
    assert not upward


def test_no_circle_of_modules() -> None:
    graph = {name: others & MODULES.keys() - {name} for name, others in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_runtime_needs_numpy_and_onnxruntime_only() -> None:
    allowed = {*sys.stdlib_module_names, "fips_ort", "numpy", "onnxruntime"}
    foreign = {
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        if room(name) == "fips_ort"
        for other in others
        if other.partition(".")[0] not in allowed
    }
    assert not foreign
