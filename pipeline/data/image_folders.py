"""Image files in folders as ImageNet has them, ``SPLIT/LABEL/image.*``.

An image's label is the folder right below the split, however deep the image lies. Whatever looks like an image is read
or refused; other files are skipped, and :attr:`ImageListing.notes` says so. What operating systems and notebooks leave
behind (``.DS_Store``, ``._image.jpg``, ``.ipynb_checkpoints``, ``Thumbs.db``) is skipped without a word.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pipeline.plumbing.errors import InputError

_SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "ehthumbs.db", "__macosx", "@eadir", "$recycle.bin", "icon\r"}
_UNREADABLE = {
    ".3fr", ".arw", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".hdr", ".heic", ".heics", ".heif", ".hif", ".jls", ".jxl",
    ".jxr", ".nef", ".nii", ".orf", ".raf", ".raw", ".rw2", ".svg", ".svgz", ".xcf",
}  # fmt: skip
"""Suffixes of images that Pillow has no reader for, unless a plug-in of it registers one."""
_CONTAINERS = {".h5", ".hdf", ".mpg", ".mpeg"}
"""Suffixes that Pillow registers, of files that hold no image or many."""
_METADATA = {f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet")}
_NAMED = 3


@dataclass(frozen=True)
class ImageFile:
    """An image file. ``identity``: device and number on it, the same for all names of a file."""

    label: str
    path: Path
    identity: tuple[int, int]


@dataclass
class ImageListing:
    """The images of a split, sorted by label and path, and ``notes`` on what was found beside them."""

    images: list[ImageFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def list_images(folder: Path) -> ImageListing:
    """List the images below ``folder``, which holds a folder for every label.

    Raises InputError where there are none, in all or for a label; for images beside the labels' folders, or of formats
    that cannot be read; for empty files, what is no file at all, a file with two labels, links that lead nowhere or in
    a circle.
    """
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise InputError(f"data: {folder}: {problem}; expected {folder}/LABEL/image.*")
    readable = _readable_suffixes()
    listing = ImageListing()
    skipped: list[Path] = []
    unreadable: list[Path] = []
    empty: list[Path] = []
    without_label: list[Path] = []
    labels_without_images = []
    for entry in _entries(folder):
        path = Path(entry.path)
        if not _is_folder(entry):
            if entry.name.lower() in _METADATA:
                raise InputError(
                    f"data: {path}: labels here are the folders' names; where such a file gives them, read the folder "
                    "with source: hub"
                )
            (without_label if path.suffix.lower() in readable | _UNREADABLE else skipped).append(path)
            continue
        _check_name(entry.name, path)
        images = []
        for file in _files(path, (_identity(path),)):
            if file.suffix.lower() in readable:
                status = _status(file)
                images.append(ImageFile(entry.name, file, (status.st_dev, status.st_ino)))
                if not status.st_size:
                    empty.append(file)
            else:
                (unreadable if file.suffix.lower() in _UNREADABLE else skipped).append(file)
        listing.images += images
        if not images:
            labels_without_images.append(path)
    _refuse(folder, without_label, "are in no label's folder", "move them into one")
    _refuse(folder, unreadable, "have formats that Pillow cannot read", "convert them to PNG or JPEG, or remove them")
    if not listing.images:
        raise InputError(f"data: {folder}: no images; expected {folder}/LABEL/image.*")
    _refuse(folder, empty, "are empty", "remove them")
    _refuse(folder, labels_without_images, "have no images", "remove them, or put images into them", "labels")
    _check_one_label(listing.images)
    nested = [image.path for image in listing.images if image.path.parent.parent != folder]
    if nested:
        listing.notes.append(
            f"data: {folder}: {len(nested)} images lie deeper than LABEL/image.*: {_named(folder, nested)}; their "
            f"label is the folder right below {folder.name}"
        )
    if skipped:
        listing.notes.append(
            f"data: {folder}: {len(skipped)} files skipped, which are no images by their suffix: "
            f"{_named(folder, skipped)}"
        )
    return listing


def _readable_suffixes() -> set[str]:
    Image.init()
    registered = Image.registered_extensions()
    readable = {suffix for suffix, kind in registered.items() if kind in Image.OPEN}
    return (readable | {".mpo"}) - _CONTAINERS  # .mpo is opened as the JPEG that it begins with


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in ``folder``, sorted, without what systems leave behind."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"data: {folder}: cannot read the folder: {error.strerror}") from None
    return [entry for entry in found if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_NAMES]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Every file below ``folder``; ``above``: identities of the folders on the way to it, itself included."""
    for entry in _entries(folder):
        path = Path(entry.path)
        if not _is_folder(entry):
            yield path
            continue
        identity = _identity(path)
        if identity in above:
            raise InputError(f"data: {path}: a link to a folder that it is in; remove it")
        yield from _files(path, (*above, identity))


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"data: {path}: cannot read the folder: {error.strerror}") from None
    return status.st_dev, status.st_ino


def _status(file: Path) -> os.stat_result:
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"data: {file}: cannot read the image: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"data: {file}: cannot read the image: not a file; remove it")
    return status


def _check_name(name: str, path: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"data: {str(path)!a}: the label's name is not UTF-8; rename the folder") from None


def _check_one_label(images: list[ImageFile]) -> None:
    seen: dict[tuple[int, int], ImageFile] = {}
    for image in images:
        other = seen.setdefault(image.identity, image)
        if other.label != image.label:
            raise InputError(f"data: {other.path} and {image.path} are one file with two labels; keep one of them")


def _refuse(folder: Path, paths: list[Path], problem: str, remedy: str, kind: str = "images") -> None:
    if paths:
        raise InputError(f"data: {folder}: {len(paths)} {kind} {problem}: {_named(folder, paths)}; {remedy}")


def _named(folder: Path, paths: list[Path]) -> str:
    shown = ", ".join(str(path.relative_to(folder)) for path in paths[:_NAMED])
    return f"{shown}, …" if len(paths) > _NAMED else shown
