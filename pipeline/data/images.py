"""Labelled images for calibration, training and evaluation.

``ImageData.hash`` is the SHA-256 of everything the splits can return: the bytes of every image used, in order,
its label, and the preprocessing. Nothing is inferred from names, sizes or times of files; for a large folder give
``train_samples`` and ``test_samples``, and only the images drawn are read.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.data.hub import check_splits_differ, load_split, reading_split, split_name
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.samples import Indices, shuffled_order
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import DigitsData, HubImageData, ImageDataSection, ImageFolderData


class ImageSplit(Protocol):
    """Labelled images by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Pixel values, float32 [B, 3, H, W], and labels, int64 [B]."""
        ...


@dataclass(frozen=True)
class ImageData:
    """The images of a recipe. ``labels``: names by class index. ``hash``: SHA-256 of all that the splits can return."""

    train: ImageSplit
    test: ImageSplit
    labels: list[str]
    hash: str


@dataclass(frozen=True)
class TensorSplit:
    """Samples held in memory: ``inputs`` float32 [n, ...], ``labels`` int64 [n]."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        return self.inputs[chosen], self.labels[chosen]


class EncodedImages(Protocol):
    """Image files by index; ``name`` is for error messages."""

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> bytes: ...


@dataclass(frozen=True)
class EncodedSplit:
    """Images decoded and preprocessed when asked for. ``labels`` int64 [n]."""

    images: EncodedImages
    labels: NDArray[np.int64]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        chosen = [int(index) for index in indices]
        decoded = [_decode(self.images.read(index), self.images.name(index)) for index in chosen]
        return self.preprocessing(decoded), torch.from_numpy(self.labels[chosen])


def load_data(
    section: ImageDataSection,
    preprocessing: Preprocessing,
    seed: int,
    train_samples: int | None = None,
    test_samples: int | None = None,
) -> ImageData:
    """The train (calibration) and test splits of a recipe's data, which never overlap.

    Both are in an order drawn from ``seed``, so that the first images of either are a random sample;
    ``train_samples`` and ``test_samples`` keep only that many. Raises InputError for an empty split, labels the
    model does not know, a missing column, an unreadable file.
    """
    limits = (train_samples, test_samples)
    if isinstance(section, DigitsData):
        return _load_digits(section, preprocessing, seed, limits)
    if isinstance(section, ImageFolderData):
        return _load_image_folder(section, preprocessing, seed, limits)
    return _load_hub(section, preprocessing, seed, limits)


def match_labels(names: Sequence[str], model_labels: Sequence[str] | None, where: str) -> list[int]:
    """The model's class index of each label name of a data set; ``where`` names the data set in errors.

    Names that the model knows are matched by name, decimal numbers are class indices. When the names are in
    another language than the model's (WordNet ids, or a model with ``LABEL_0`` names), they are matched by
    position, which needs as many names as the model has labels and none of them known at another position.
    """
    if model_labels is None:
        return list(range(len(names)))
    index = {name: position for position, name in enumerate(model_labels)}
    ambiguous = {name for name in names if list(model_labels).count(name) > 1}
    if all(name in index for name in names) and not ambiguous:
        return [index[name] for name in names]
    if all(name.isdecimal() for name in names):
        indices = [int(name) for name in names]
        if max(indices) >= len(model_labels):
            raise InputError(f"{where}: label {max(indices)} is out of range: the model has {len(model_labels)} labels")
        return indices
    if len(names) == len(model_labels) and all(
        name not in index or name == known for name, known in zip(names, model_labels, strict=True)
    ):
        return list(range(len(names)))
    unknown = [name for name in names if name not in index]
    raise InputError(
        f"{where}: {len(names)} labels do not match the model's {len(model_labels)}; unknown to the model: "
        f"{_shortened(unknown) or 'none'}; the model's labels are {_shortened(model_labels)}"
    )


# --- digits ----------------------------------------------------------------------------------------------------


def _load_digits(
    section: DigitsData, preprocessing: Preprocessing, seed: int, limits: tuple[int | None, int | None]
) -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    names = [str(name) for name in digits.target_names]
    labels = np.asarray(match_labels(names, preprocessing.labels, "data: digits"))[digits.target]
    train, test = train_test_split(
        np.arange(len(labels)), test_size=section.test_fraction, random_state=seed, stratify=digits.target
    )
    assert not set(train) & set(test)
    # The images hold counts 0..16 of ink in 4x4 cells.
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    digest = _Digest(preprocessing)

    def split(order: NDArray[np.int64], limit: int | None) -> TensorSplit:
        chosen = order[:limit]
        digest.add_split()
        for index in chosen:
            digest.add_image(pixels[index].tobytes(), int(labels[index]))
        images = [Image.fromarray(pixels[index]).convert("RGB") for index in chosen]
        return TensorSplit(preprocessing(images), torch.from_numpy(labels[chosen]))

    return ImageData(split(train, limits[0]), split(test, limits[1]), _label_names(preprocessing, names), digest.hex())


# --- image folders ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    paths: list[Path]

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise InputError(f"{self.paths[index]}: cannot read the image: {error.strerror}") from None


def _load_image_folder(
    section: ImageFolderData, preprocessing: Preprocessing, seed: int, limits: tuple[int | None, int | None]
) -> ImageData:
    folders = [_list_folder(Path(section.path) / name) for name in (section.train, section.test)]
    train_files, test_files = ({path.resolve() for _, path in folder} for folder in folders)
    both = sorted(train_files & test_files)
    if both:
        raise InputError(f"data: {section.path}: {len(both)} images are in both train and test, {both[0]} for one")
    names = sorted({label for folder in folders for label, _ in folder})
    indices = dict(zip(names, match_labels(names, preprocessing.labels, f"data: {section.path}"), strict=True))
    digest = _Digest(preprocessing)

    def split(folder: list[tuple[str, Path]], limit: int | None) -> EncodedSplit:
        chosen = shuffled_order(len(folder), seed)[:limit]
        images = _Files([folder[index][1] for index in chosen])
        labels = np.array([indices[folder[index][0]] for index in chosen], dtype=np.int64)
        digest.add_images(images, labels)
        return EncodedSplit(images, labels, preprocessing)

    train, test = split(folders[0], limits[0]), split(folders[1], limits[1])
    return ImageData(train, test, _label_names(preprocessing, names), digest.hex())


def _list_folder(folder: Path) -> list[tuple[str, Path]]:
    """(label, file) of every image in ``folder/LABEL/``, sorted."""
    if not folder.is_dir():
        raise InputError(f"data: {folder}: no such folder; expected {folder}/LABEL/image.*")
    Image.init()
    suffixes = Image.registered_extensions()
    found = [
        (label.name, file)
        for label in sorted(folder.iterdir())
        if label.is_dir()
        for file in sorted(label.iterdir())
        if file.suffix.lower() in suffixes
    ]
    if not found:
        raise InputError(f"data: {folder}: no images; expected {folder}/LABEL/image.*")
    return found


# --- hub -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The image column of a data set, undecoded."""

    rows: Any
    column: str
    where: str

    def name(self, index: int) -> str:
        return f"{self.where}, row {index} as drawn"

    def read(self, index: int) -> bytes:
        image = self.rows[index][self.column]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise InputError(f"{self.name(index)}: the image is missing")
        try:
            return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        except OSError as error:
            raise InputError(f"{image['path']}: cannot read the image: {error.strerror}") from None


def _load_hub(
    section: HubImageData, preprocessing: Preprocessing, seed: int, limits: tuple[int | None, int | None]
) -> ImageData:
    check_splits_differ(section)
    tables = [_open_table(section, split) for split in (section.train, section.test)]
    columns = [_label_column(table, section.label_column) for table in tables]
    names = columns[0].names
    if columns[1].names != names:
        raise InputError(f"data: {section.path}: {section.train} and {section.test} have different label names")
    wheres = [split_name(section, split) for split in (section.train, section.test)]
    if names is None:
        count = len(preprocessing.labels) if preprocessing.labels else 1 + max(int(c.values.max()) for c in columns)
        names = list(preprocessing.labels) if preprocessing.labels else [str(index) for index in range(count)]
        indices = np.arange(count)
    else:
        indices = np.asarray(match_labels(names, preprocessing.labels, f"data: {section.path}"), dtype=np.int64)
    digest = _Digest(preprocessing)

    def split(table: Any, values: NDArray[np.int64], where: str, limit: int | None) -> EncodedSplit:
        outside = (values < 0) | (values >= len(indices))
        if outside.any():
            row = int(np.argmax(outside))
            raise InputError(
                f"{where}: label {values[row]} in row {row} is out of range: there are {len(indices)} labels"
            )
        chosen = shuffled_order(len(values), seed)[:limit]
        images = _Rows(table.select(chosen), section.image_column, where)
        labels = indices[values[chosen]]
        digest.add_images(images, labels)
        return EncodedSplit(images, labels, preprocessing)

    train, test = (
        split(table, column.values, where, limit)
        for table, column, where, limit in zip(tables, columns, wheres, limits, strict=True)
    )
    return ImageData(train, test, _label_names(preprocessing, names), digest.hex())


def _open_table(section: HubImageData, split: str) -> Any:
    """The rows of a split, images undecoded."""
    with reading_split(section, split):
        table = load_split(section, split)
    import datasets

    where = split_name(section, split)
    for column in (section.image_column, section.label_column):
        if column not in table.column_names:
            raise InputError(f"{where}: no column {column!r}; it has {', '.join(table.column_names)}")
    if not isinstance(table.features[section.image_column], datasets.Image):
        raise InputError(f"{where}: column {section.image_column!r} does not hold images")
    return table.cast_column(section.image_column, datasets.Image(decode=False))


@dataclass(frozen=True)
class _LabelColumn:
    """Class indices of all rows, int64 [n], and the names behind them where the data set has names."""

    values: NDArray[np.int64]
    names: list[str] | None


def _label_column(table: Any, column: str) -> _LabelColumn:
    values = np.asarray(table[column][:])
    names = getattr(table.features[column], "names", None)
    if values.dtype.kind not in "iu":
        raise InputError(f"data: label column {column!r} holds {table.features[column]}, not class indices")
    return _LabelColumn(values.astype(np.int64), names)


# --- shared ----------------------------------------------------------------------------------------------------


class _Digest:
    """SHA-256 over preprocessing, images and labels in order."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._sha256 = hashlib.sha256(preprocessing.key.encode())

    def add_split(self) -> None:
        self._sha256.update(b"split")

    def add_image(self, content: bytes, label: int) -> None:
        self._sha256.update(hashlib.sha256(content).digest() + label.to_bytes(8, "little"))

    def add_images(self, images: EncodedImages, labels: NDArray[np.int64]) -> None:
        self.add_split()
        for index, label in enumerate(labels):
            self.add_image(images.read(index), int(label))

    def hex(self) -> str:
        return self._sha256.hexdigest()


def _decode(content: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: not a readable image: {error}") from None


def _label_names(preprocessing: Preprocessing, data_names: Sequence[str]) -> list[str]:
    return list(data_names if preprocessing.labels is None else preprocessing.labels)


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return f"{shown}, … ({len(names)})" if len(names) > 5 else shown
