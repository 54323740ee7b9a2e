"""Installed packages that are read as files; their code is never imported."""

import importlib.util
from pathlib import Path

from pipeline.plumbing.errors import InputError


def package_folder(package: str, key: str) -> Path:
    """Folder of an installed package; ``key`` names the recipe's key in errors. Raises InputError."""
    # find_spec would import the parents of a dotted name.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise InputError(
            f"{key}: {package} is not installed; for the packages of our recipes: pip install 'fips-onnx[samples]'"
        )
    return Path(folders[0]).resolve()
