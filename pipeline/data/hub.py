"""Data sets of the Hugging Face hub, or saved in a folder, opened with the optional library ``datasets``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import HubImageData, HubTextData


def check_splits_differ(section: HubImageData | HubTextData) -> None:
    """Raise InputError where training and test samples would be the same."""
    if section.train == section.test:
        raise InputError(f"data: {section.path}: train and test are the same split, {section.train!r}")


def load_split(section: HubImageData | HubTextData, split: str, *, streaming: bool = False) -> Any:
    """The rows of a split, a data set of the library ``datasets``; with ``streaming`` they are loaded as they are read.

    Raises InputError where the library is not installed, and whatever the library raises: see
    :func:`reading_split`.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"data: source {section.source} needs the datasets library: pip install 'fips-onnx[hub]'"
        ) from None
    if (Path(section.path) / "dataset_dict.json").is_file():
        return datasets.load_from_disk(section.path)[split]
    return datasets.load_dataset(section.path, section.config, split=split, streaming=streaming)


@contextmanager
def reading_split(section: HubImageData | HubTextData, split: str) -> Iterator[None]:
    """Turn errors of the library ``datasets`` while a split is loaded or read into InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{split_name(section, split)}: cannot load it (missing or empty?): {type(error).__name__}: {reason}"
        ) from None


def split_name(section: HubImageData | HubTextData, split: str) -> str:
    """What a split is called in errors."""
    return f"data: {section.path}, split {split}"
