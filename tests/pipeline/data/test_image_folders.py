"""Image folders: whatever looks like an image is read or refused, and what is skipped is said."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.image_folders import list_images
from pipeline.plumbing.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A split with two labels of two images each."""
    for label in ("cat", "dog"):
        for number in range(2):
            write(tmp_path / "train" / label / f"{number}.png")
    return tmp_path / "train"


def write(path: Path, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, kind)


def found(folder: Path) -> list[tuple[str, str]]:
    return [(image.label, str(image.path.relative_to(folder))) for image in list_images(folder).images]


PLAIN = [("cat", "cat/0.png"), ("cat", "cat/1.png"), ("dog", "dog/0.png"), ("dog", "dog/1.png")]


def test_labels_and_files_in_order(folder: Path) -> None:
    assert found(folder) == PLAIN
    assert list_images(folder).notes == []
    assert found(Path(f"{folder}/")) == PLAIN


def test_images_in_sub_folders_have_the_label_of_the_top_one(folder: Path) -> None:
    write(folder / "cat" / "persian" / "old" / "2.png")
    write(folder / "dog" / "images.jpg" / "3.PNG")
    assert found(folder) == [
        *PLAIN[:2], ("cat", "cat/persian/old/2.png"), *PLAIN[2:], ("dog", "dog/images.jpg/3.PNG")
    ]  # fmt: skip
    (note,) = list_images(folder).notes
    assert "2 images lie deeper than LABEL/image.*: cat/persian/old/2.png, dog/images.jpg/3.PNG" in note


def test_what_systems_leave_behind_is_skipped_without_a_word(folder: Path) -> None:
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg"):
        (folder / "cat" / name).write_bytes(b"\0\5\x16\7")
        (folder / name).write_bytes(b"\0\5\x16\7")
    for name in (".ipynb_checkpoints", "__MACOSX", ".git"):
        write(folder / name / "x.png")
        write(folder / "dog" / name / "x.png")
    assert found(folder) == PLAIN
    assert list_images(folder).notes == []


def test_files_that_are_no_images_are_skipped_and_said(folder: Path) -> None:
    (folder / "README.md").write_text("cats and dogs")
    (folder / "cat" / "labels.txt").write_text("not an image")
    (folder / "cat" / "LICENCE").write_text("not an image")
    (folder / "dog" / "paper.pdf").write_bytes(b"%PDF-1.7")
    assert found(folder) == PLAIN
    (note,) = list_images(folder).notes
    assert note == (
        f"data: {folder}: 4 files skipped, which are no images by their suffix: README.md, cat/LICENCE, "
        "cat/labels.txt, …"
    )


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".jfif", ".webp", ".tif", ".bmp", ".gif", ".mpo", ".avif"])
def test_suffixes_of_images(folder: Path, suffix: str) -> None:
    name = f"cat/2{suffix}"
    (folder / name).write_bytes((folder / "cat" / "0.png").read_bytes())
    assert ("cat", name) in found(folder)


def make_beside_labels(folder: Path) -> None:
    write(folder / "7.png")


def make_unreadable(folder: Path) -> None:
    (folder / "cat" / "phone.HEIC").write_bytes(b"ftypheic")
    (folder / "dog" / "drawing.svg").write_text("<svg/>")


def make_empty_file(folder: Path) -> None:
    (folder / "cat" / "zero.png").touch()


def make_empty_label(folder: Path) -> None:
    (folder / "emu").mkdir()


def make_label_of_other_files(folder: Path) -> None:
    (folder / "emu").mkdir()
    (folder / "emu" / "notes.txt").write_text("soon")


def make_broken_link(folder: Path) -> None:
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere.png")


def make_circle_of_links(folder: Path) -> None:
    (folder / "cat" / "again").symlink_to(folder / "cat", target_is_directory=True)


def make_link_to_itself(folder: Path) -> None:
    (folder / "cat" / "self.png").symlink_to(folder / "cat" / "self.png")


def make_pipe(folder: Path) -> None:
    os.mkfifo(folder / "cat" / "pipe.png")


def make_two_labels(folder: Path) -> None:
    (folder / "dog" / "cat.png").hardlink_to(folder / "cat" / "0.png")


def make_metadata(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,label\n")


def make_other_encoding(folder: Path) -> None:
    os.mkdir(os.fsencode(folder) + b"/gr\xfc\xdfe")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_beside_labels, r"train: 1 images are in no label's folder: 7\.png; move them"),
        (make_unreadable, r"2 images have formats that Pillow cannot read: cat/phone\.HEIC, dog/drawing\.svg; convert"),
        (make_empty_file, r"1 images are empty: cat/zero\.png"),
        (make_empty_label, r"1 labels have no images: emu; remove"),
        (make_label_of_other_files, r"1 labels have no images: emu"),
        (make_broken_link, r"cat/gone\.png: cannot read the image: No such file"),
        (make_circle_of_links, r"cat/again: a link to a folder that it is in"),
        (make_link_to_itself, r"cat/self\.png: cannot read the image: Too many levels of symbolic links"),
        (make_pipe, r"cat/pipe\.png: cannot read the image: not a file"),
        (make_two_labels, r"cat/0\.png and .*dog/cat\.png are one file with two labels"),
        (make_metadata, r"metadata\.csv: labels here are the folders' names; .*source: hub"),
        (make_other_encoding, r"gr\\udcfc\\udcdfe': the label's name is not UTF-8"),
    ],
)
def test_what_is_refused(folder: Path, make: Callable[[Path], None], message: str) -> None:
    make(folder)
    with pytest.raises(InputError, match=message):
        list_images(folder)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("")
    with pytest.raises(InputError, match=r"train: not a folder; expected"):
        list_images(tmp_path / "train")
    with pytest.raises(InputError, match=r"val: no such folder"):
        list_images(tmp_path / "val")


def test_links_to_labels_and_images_are_followed(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "emu" / "5.png")
    (folder / "emu").symlink_to(tmp_path / "elsewhere" / "emu", target_is_directory=True)
    (folder / "dog" / "6.png").symlink_to(tmp_path / "elsewhere" / "emu" / ".." / "6.png")
    write(tmp_path / "elsewhere" / "6.png")
    assert found(folder) == [*PLAIN, ("dog", "dog/6.png"), ("emu", "emu/5.png")]
