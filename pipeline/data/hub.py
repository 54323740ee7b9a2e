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


def check_splits_apart(section: HubImageData, table: Any) -> None:
    """Raise InputError where the splits of ``section``, of which ``table`` is one, have rows in common, as
    ``train[:80%]`` and ``train[70%:]`` have."""
    from datasets import ReadInstruction

    if _is_saved_to_disk(section):  # whose splits are names
        return
    lengths = {name: split.num_examples for name, split in (table.info.splits or {}).items()}
    with reading_split(section, section.test):
        train, test = (
            ReadInstruction.from_spec(split).to_absolute(lengths) for split in (section.train, section.test)
        )
    for one in train:
        for other in test:
            common = min(one.to, other.to) - max(one.from_, other.from_)
            if one.splitname == other.splitname and common > 0:
                raise InputError(
                    f"data: {section.path}: train: {section.train} and test: {section.test} have {common} rows of "
                    f"{one.splitname} in common"
                )


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
    if _is_saved_to_disk(section):
        if section.config is not None:
            raise InputError(
                f"data.config: {section.config}: {section.path} was saved by datasets and has no configurations; leave "
                "it out"
            )
        return datasets.load_from_disk(section.path)[split]
    return datasets.load_dataset(section.path, section.config, split=split, streaming=streaming)


def _is_saved_to_disk(section: HubImageData | HubTextData) -> bool:
    return (Path(section.path) / "dataset_dict.json").is_file()


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
