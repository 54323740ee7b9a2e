"""Installed packages that are read as files; their code is never imported."""

import importlib.util
from pathlib import Path

from pipeline.plumbing.errors import InputError


def package_file(package: str, file: str, key: str) -> Path:
    """Path of ``file`` inside an installed ``package``, both as the section ``key`` of a recipe names them.

    Raises InputError where the package is not installed or has no such file.
    """
    path = package_path(package, file, key)
    if not path.is_file():
        raise InputError(f"{key}.file: package {package} has no file {file}")
    return path


def package_path(package: str, file: str, key: str) -> Path:
    """Where ``file`` is in an installed ``package``, or would be if the package had it.

    ``package``: the name to import. ``file``: relative to its folder. ``key``: the section of a recipe that names them,
    for errors. Raises InputError where the package is not installed or the file would be outside it.
    """
    # find_spec would import the parents of a dotted name.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise InputError(
            f"{key}.package: {package} is not installed; for the packages of our recipes: "
            "pip install 'fips-onnx[samples]'"
        )
    roots = [Path(folder).resolve() for folder in folders]
    inside = [path for root in roots if (path := (root / file).resolve()).is_relative_to(root)]
    if not inside:
        raise InputError(f"{key}.file: {file} is not inside package {package}")
    return next((path for path in inside if path.is_file()), inside[0])
