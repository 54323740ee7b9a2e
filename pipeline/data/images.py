"""Labelled images for calibration, training and evaluation.

``ImageData.hash`` is the SHA-256 of everything the splits can return: the bytes of every image used, in order,
its label, and the preprocessing. Nothing is inferred from names, sizes or times of files; for a large folder give
``train_samples`` and ``test_samples``, and only the images drawn are read.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.data.decoding import decode_image
from pipeline.data.hub import (
    check_splits_apart,
    check_splits_differ,
    load_split,
    reading_split,
    split_name,
)
from pipeline.data.image_folders import ImageListing, list_images
from pipeline.data.labels import check_distinct, match_labels, match_test_labels
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.samples import Indices, check_samples_asked, shuffled_order
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import DigitsData, HubImageData, ImageDataSection, ImageFolderData

CHECKED_IMAGES = 256
"""Images of a split that a plan decodes; a run decodes all that it uses before it computes anything."""


class ImageSplit(Protocol):
    """Labelled images by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Pixel values, float32 [B, 3, H, W], and labels, int64 [B]."""
        ...


@dataclass(frozen=True)
class ImageData:
    """The images of a recipe. ``labels``: names by class index. ``hash``: SHA-256 of all that the splits can return.
    ``notes``: what the user should know of what was found beside the images."""

    train: ImageSplit
    test: ImageSplit
    labels: list[str]
    hash: str
    notes: tuple[str, ...] = ()


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


class ImageSource(Protocol):
    """Images by index, of which any may be asked for; ``name`` is for error messages."""

    def name(self, index: int) -> str: ...

    def content(self, index: int) -> bytes:
        """What the image is decoded from."""
        ...

    def decode(self, content: bytes, index: int) -> Image.Image:
        """The image in mode RGB. Raises InputError where it cannot be read."""
        ...


@dataclass(frozen=True)
class EncodedSplit:
    """Images decoded and preprocessed when asked for: those of ``source`` at the numbers ``chosen``, int64 [n], with
    ``labels``, int64 [n]."""

    source: ImageSource
    chosen: NDArray[np.int64]
    labels: NDArray[np.int64]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        places = [int(index) for index in indices]
        decoded = [self.source.decode(self.source.content(index), index) for index in self.chosen[places].tolist()]
        return self.preprocessing(decoded), torch.from_numpy(self.labels[places])


def load_data(
    section: ImageDataSection,
    preprocessing: Preprocessing,
    seed: int,
    train_samples: int | None = None,
    test_samples: int | None = None,
) -> ImageData:
    """The train (calibration) and test splits of a recipe's data, which never overlap.

    Both are in an order drawn from ``seed``, so that the first images of either are a random sample;
    ``train_samples`` and ``test_samples`` keep only that many. Every image that is kept is read and decoded once, for
    the hash, and to find out now whether it can be. Raises InputError for an empty split or one with fewer images,
    labels the model does not know, a missing column, an unreadable file.
    """
    opened = _open(section, preprocessing, seed)
    check_samples_asked("calibration", train_samples, "train", len(opened.train.order))
    check_samples_asked("evaluation", test_samples, "test", len(opened.test.order))
    digest = _Digest(preprocessing)

    def split(part: _Part, limit: int | None) -> ImageSplit:
        chosen = part.order[:limit]
        labels = part.labels[chosen]
        digest.add_split()
        for index, label in zip(chosen.tolist(), labels.tolist(), strict=True):
            content = part.source.content(index)
            part.source.decode(content, index)
            digest.add_image(content, label)
        encoded = EncodedSplit(part.source, chosen, labels, preprocessing)
        # Small enough to be prepared once.
        return TensorSplit(*encoded.batch(range(len(encoded)))) if isinstance(section, DigitsData) else encoded

    train, test = split(opened.train, train_samples), split(opened.test, test_samples)
    return ImageData(train, test, opened.labels, digest.hex(), tuple(opened.notes))


@dataclass(frozen=True)
class CheckedData:
    """What :func:`check_data` has found: how many training images there are, and the notes of :class:`ImageData`."""

    train_samples: int
    notes: tuple[str, ...]


def check_data(
    section: ImageDataSection, preprocessing: Preprocessing, seed: int, test_samples: int | None = None
) -> CheckedData | None:
    """Raise InputError for whatever :func:`load_data` does, but decode only the first few hundred images of each split.
    None for data of the hub, which would be downloaded: they are not opened."""
    if isinstance(section, HubImageData):
        check_splits_differ(section)
        if not Path(section.path).exists():
            return None
    opened = _open(section, preprocessing, seed)
    check_samples_asked("evaluation", test_samples, "test", len(opened.test.order))
    for part in (opened.train, opened.test):
        for index in part.order[:CHECKED_IMAGES].tolist():
            part.source.decode(part.source.content(index), index)
    return CheckedData(len(opened.train.order), tuple(opened.notes))


@dataclass(frozen=True)
class _Part:
    """A whole split: its images, the labels of all, int64, and the order in which they are used."""

    source: ImageSource
    labels: NDArray[np.int64]
    order: NDArray[np.int64]


@dataclass(frozen=True)
class _Opened:
    """Both splits of a recipe's data, no image read yet. ``labels``: names by the model's class index."""

    train: _Part
    test: _Part
    labels: list[str]
    notes: Sequence[str] = ()


def _open(section: ImageDataSection, preprocessing: Preprocessing, seed: int) -> _Opened:
    if isinstance(section, DigitsData):
        return _open_digits(section, preprocessing, seed)
    if isinstance(section, ImageFolderData):
        return _open_image_folder(section, preprocessing, seed)
    return _open_hub(section, preprocessing, seed)


# --- digits ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arrays:
    """Grey images, uint8 [n, height, width]."""

    pixels: NDArray[np.uint8]

    def name(self, index: int) -> str:
        return f"data: digits, image {index}"

    def content(self, index: int) -> bytes:
        return self.pixels[index].tobytes()

    def decode(self, content: bytes, index: int) -> Image.Image:
        return Image.frombytes("L", self.pixels.shape[:0:-1], content).convert("RGB")


def _open_digits(section: DigitsData, preprocessing: Preprocessing, seed: int) -> _Opened:
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
    source = _Arrays(np.round(digits.images * (255 / 16)).astype(np.uint8))
    return _Opened(_Part(source, labels, train), _Part(source, labels, test), _label_names(preprocessing, names))


# --- image folders ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    paths: list[Path]

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise InputError(f"{self.paths[index]}: cannot read the image: {error.strerror}") from None

    def decode(self, content: bytes, index: int) -> Image.Image:
        return decode_image(content, self.name(index))


def _open_image_folder(section: ImageFolderData, preprocessing: Preprocessing, seed: int) -> _Opened:
    where = f"data: {section.path}"
    train, test = (list_images(Path(section.path) / name) for name in (section.train, section.test))
    tested = {image.identity for image in test.images}
    both = [image.path for image in train.images if image.identity in tested]
    if both:
        raise InputError(f"{where}: {len(both)} images are in both train and test, {both[0]} for one")
    train_names, test_names = (sorted({image.label for image in listing.images}) for listing in (train, test))
    if preprocessing.labels is None:
        check_distinct(train_names, where)
        names = train_names
        indices = dict(zip(train_names, range(len(train_names)), strict=True))
        indices |= zip(test_names, match_test_labels(test_names, train_names, where), strict=True)
    else:
        names = sorted({*train_names, *test_names})
        indices = dict(zip(names, match_labels(names, preprocessing.labels, where), strict=True))

    def part(listing: ImageListing) -> _Part:
        labels = np.array([indices[image.label] for image in listing.images], dtype=np.int64)
        return _Part(_Files([image.path for image in listing.images]), labels, shuffled_order(len(labels), seed))

    return _Opened(part(train), part(test), _label_names(preprocessing, names), [*train.notes, *test.notes])


# --- hub -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The image column of a data set, undecoded. ``mode``: the column's own, see :func:`decode_image`."""

    rows: Any
    column: str
    mode: str | None
    where: str

    def name(self, index: int) -> str:
        return f"{self.where}, row {index}"

    def content(self, index: int) -> bytes:
        image = self.rows[index][self.column]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise InputError(f"{self.name(index)}: the image is missing")
        try:
            return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        except OSError as error:
            raise InputError(f"{image['path']}: cannot read the image: {error.strerror}") from None

    def decode(self, content: bytes, index: int) -> Image.Image:
        return decode_image(content, self.name(index), self.mode)


def _open_hub(section: HubImageData, preprocessing: Preprocessing, seed: int) -> _Opened:
    check_splits_differ(section)
    splits = (section.train, section.test)
    tables = [_open_table(section, split) for split in splits]
    check_splits_apart(section, tables[0])
    columns = [
        _label_column(table, section.label_column, split_name(section, split))
        for table, split in zip(tables, splits, strict=True)
    ]
    names = columns[0].names
    if columns[1].names != names:
        raise InputError(f"data: {section.path}: {section.train} and {section.test} have different label names")
    if names is None:
        count = len(preprocessing.labels) if preprocessing.labels else 1 + max(int(c.values.max()) for c in columns)
        names = list(preprocessing.labels) if preprocessing.labels else [str(index) for index in range(count)]
        indices = np.arange(count)
    else:
        matched = match_labels(names, preprocessing.labels, f"data: {section.path}", has_own_order=True)
        indices = np.asarray(matched, dtype=np.int64)

    import datasets

    def part(table: Any, values: NDArray[np.int64], split: str) -> _Part:
        where = split_name(section, split)
        outside = (values < 0) | (values >= len(indices))
        if outside.any():
            row = int(np.argmax(outside))
            raise InputError(
                f"{where}: label {values[row]} in row {row} is out of range: there are {len(indices)} labels"
            )
        undecoded = table.cast_column(section.image_column, datasets.Image(decode=False))
        mode = table.features[section.image_column].mode
        source = _Rows(undecoded.select_columns(section.image_column), section.image_column, mode, where)
        return _Part(source, indices[values], shuffled_order(len(values), seed))

    train, test = (
        part(table, column.values, split) for table, column, split in zip(tables, columns, splits, strict=True)
    )
    return _Opened(train, test, _label_names(preprocessing, names))


def _open_table(section: HubImageData, split: str) -> Any:
    """The rows of a split."""
    with reading_split(section, split):
        table = load_split(section, split)
    import datasets

    where = split_name(section, split)
    for column in (section.image_column, section.label_column):
        if column not in table.column_names:
            raise InputError(f"{where}: no column {column!r}; it has {', '.join(table.column_names)}")
    if not isinstance(table.features[section.image_column], datasets.Image):
        raise InputError(f"{where}: column {section.image_column!r} does not hold images")
    return table


@dataclass(frozen=True)
class _LabelColumn:
    """Class indices of all rows, int64 [n], and the names behind them where the data set has names."""

    values: NDArray[np.int64]
    names: list[str] | None


def _label_column(table: Any, column: str, where: str) -> _LabelColumn:
    feature = table.features[column]
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise InputError(f"{where}: label column {column!r} holds {feature}, not class indices")
    labels = table.select_columns(column)[column][:]
    if None in labels:
        raise InputError(f"{where}: row {labels.index(None)} has no label, in column {column!r}; leave such rows out")
    return _LabelColumn(np.array(labels, dtype=np.int64), getattr(feature, "names", None))


# --- shared ----------------------------------------------------------------------------------------------------


class _Digest:
    """SHA-256 over preprocessing, images and labels in order."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._sha256 = hashlib.sha256(preprocessing.key.encode())

    def add_split(self) -> None:
        self._sha256.update(b"split")

    def add_image(self, content: bytes, label: int) -> None:
        self._sha256.update(hashlib.sha256(content).digest() + label.to_bytes(8, "little"))

    def hex(self) -> str:
        return self._sha256.hexdigest()


def _label_names(preprocessing: Preprocessing, data_names: Sequence[str]) -> list[str]:
    return list(data_names if preprocessing.labels is None else preprocessing.labels)
