"""Splits that never overlap, labels as the model knows them, and a hash that covers what is used."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from sklearn.datasets import load_digits
from transformers import ViTImageProcessorPil

import pipeline.data.images
from pipeline.data.images import CHECKED_IMAGES, EncodedSplit, ImageData, check_data, load_data
from pipeline.data.preprocessing import Preprocessing
from pipeline.models.classifier_training import random_affine
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import DigitsData, HubImageData, ImageFolderData


def preprocessing(labels: tuple[str, ...] | None = None, size: int = 8) -> Preprocessing:
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Preprocessing(processor, size, labels)


def digits(seed: int = 0, **limits: int) -> ImageData:
    return load_data(DigitsData(source="digits", image_size=8), preprocessing(), seed, **limits)


# --- digits ----------------------------------------------------------------------------------------------------


def test_digits_are_all_there_once_and_stratified() -> None:
    data = digits()
    assert (len(data.train), len(data.test)) == (1203, 594)
    assert data.labels == list("0123456789")
    train, test = (split.batch(range(len(split))) for split in (data.train, data.test))
    counts = torch.bincount(train[1]) + torch.bincount(test[1])
    assert counts.tolist() == np.bincount(load_digits().target).tolist()
    assert (torch.bincount(test[1]) / counts - 0.33).abs().max() < 0.01
    found = ((torch.cat([train[0], test[0]])[:, 0] + 1) * 127.5).round().numpy().astype(np.uint8)
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in expected)


def test_digits_are_grey_and_resized() -> None:
    data = load_data(DigitsData(source="digits", image_size=12), preprocessing(size=12), 0)
    pixel_values, labels = data.test.batch([3, 5])
    assert (pixel_values.shape, pixel_values.dtype, labels.dtype) == ((2, 3, 12, 12), torch.float32, torch.int64)
    assert torch.equal(pixel_values[:, 0], pixel_values[:, 2])
    assert pixel_values.min() >= -1.0
    assert pixel_values.max() <= 1.0


def test_seed_decides_split_and_hash() -> None:
    assert digits(0).hash == digits(0).hash
    assert digits(0).hash != digits(1).hash
    assert not torch.equal(digits(0).test.batch([0, 1])[0], digits(1).test.batch([0, 1])[0])


def test_limits_keep_the_first_and_change_the_hash() -> None:
    few, all_ = digits(train_samples=10, test_samples=7), digits()
    assert (len(few.train), len(few.test)) == (10, 7)
    assert torch.equal(few.train.batch(range(10))[0], all_.train.batch(range(10))[0])
    assert few.hash != all_.hash


def test_hash_covers_the_preprocessing() -> None:
    section = DigitsData(source="digits", image_size=8)
    darker = Preprocessing(ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.4] * 3), 8)
    assert load_data(section, darker, 0).hash != digits().hash


@given(seed=st.integers(0, 1000), size=st.integers(8, 40))
def test_random_affine_keeps_levels_and_moves_little(seed: int, size: int) -> None:
    """The images' three channels hold the row, the column and a constant, in units of the image size."""
    axis = (torch.arange(size) + 0.5) / size
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    images = torch.stack([row, column, torch.full_like(row, 0.3)]).repeat(4, 1, 1, 1)
    warped = random_affine(images, torch.Generator().manual_seed(seed))
    assert torch.equal(warped, random_affine(images, torch.Generator().manual_seed(seed)))
    assert not torch.allclose(warped[0], warped[1], atol=1e-4)
    torch.testing.assert_close(warped[:, 2], images[:, 2])
    # 8 % of translation; rotation and scaling move the corners, 0.71 from the centre, by at most a quarter of that.
    moved = (warped[:, :2] - images[:, :2]).abs()
    assert moved.max() < 0.08 + 0.25 * 0.71
    centre = slice(size // 2 - 1, size // 2 + 1)
    assert moved[:, :, centre, centre].max() < 0.08 + 0.25 / size + 1e-4


# --- image folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; the grey level of an image is its number, the class of an image is its number's parity."""
    for split, numbers in (("train", range(12)), ("val", range(12, 18))):
        for number in numbers:
            path = tmp_path / split / ("odd" if number % 2 else "even") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((10, 6), 10 * number, np.uint8)).save(path)
    (tmp_path / "val" / "odd" / "notes.txt").write_text("not an image")
    return tmp_path


def load_folder(path: Path, labels: tuple[str, ...] | None = None, **limits: int) -> ImageData:
    return load_data(ImageFolderData(source="image_folder", path=str(path)), preprocessing(labels), 0, **limits)


def numbers(split: Any) -> tuple[list[int], list[int]]:
    pixel_values, labels = split.batch(range(len(split)))
    return [round(float(image.mean() + 1) * 127.5 / 10) for image in pixel_values], labels.tolist()


def test_folder_images_keep_their_labels(folder: Path) -> None:
    data = load_folder(folder)
    for split, expected in ((data.train, range(12)), (data.test, range(12, 18))):
        found, labels = numbers(split)
        assert sorted(found) == list(expected)
        assert labels == [number % 2 for number in found]
    assert data.labels == ["even", "odd"]


def test_folder_labels_follow_the_model(folder: Path) -> None:
    data = load_folder(folder, labels=("odd", "x", "even"))
    found, labels = numbers(data.train)
    assert labels == [0 if number % 2 else 2 for number in found]
    assert data.labels == ["odd", "x", "even"]


def test_folder_order_is_mixed_and_limits_keep_the_first(folder: Path) -> None:
    assert numbers(load_folder(folder).train)[0] != sorted(numbers(load_folder(folder).train)[0])
    assert numbers(load_folder(folder, train_samples=4).train)[0] == numbers(load_folder(folder).train)[0][:4]


def test_folder_hash_is_of_contents_only(folder: Path) -> None:
    before = load_folder(folder).hash
    image = folder / "train" / "even" / "0.png"
    times = image.stat().st_mtime_ns
    os.utime(image, (0, 0))
    assert load_folder(folder).hash == before
    Image.fromarray(np.full((10, 6), 1, np.uint8)).save(image)
    os.utime(image, ns=(times, times))
    assert load_folder(folder).hash != before


def spoil_missing(folder: Path) -> None:
    for path in (folder / "val").rglob("*.png"):
        path.unlink()


def spoil_image(folder: Path) -> None:
    for path in (folder / "val" / "odd").glob("*.png"):
        path.write_bytes(path.read_bytes()[:40])


def spoil_overlap(folder: Path) -> None:
    (folder / "val" / "even" / "again.png").symlink_to(folder / "train" / "even" / "2.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, "val: no images"),
        (spoil_image, r"val/odd/1[357]\.png: not a readable image"),
        (spoil_overlap, r"1 images are in both train and test, .*train/even/2\.png"),
    ],
)
def test_bad_folders(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=message):
        numbers(load_folder(folder).test)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train: no such folder"):
        load_folder(tmp_path)


def test_same_folder_for_train_and_test(folder: Path) -> None:
    section = ImageFolderData(source="image_folder", path=str(folder), train="val", test="val")
    with pytest.raises(InputError, match="6 images are in both train and test"):
        load_data(section, preprocessing(), 0)


def test_the_issues_labels_are_not_swapped(tmp_path: Path) -> None:
    """``golden_retriever`` comes before ``tabby_cat``, and the model has them the other way round."""
    for split, start in (("train", 0), ("val", 4)):
        for number, label in enumerate(("tabby_cat", "golden_retriever")):
            path = tmp_path / split / label / "image.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((10, 6), 10 * (start + number), np.uint8)).save(path)
    data = load_folder(tmp_path, ("tabby cat", "golden retriever"))
    for split, start in ((data.train, 0), (data.test, 4)):
        found, labels = numbers(split)
        assert sorted(zip(found, labels, strict=True)) == [(start, 0), (start + 1, 1)]
    assert data.labels == ["tabby cat", "golden retriever"]


def test_a_model_trained_here_has_the_labels_of_train(folder: Path) -> None:
    """Written in another way, they are the same; others cannot be learned."""
    (folder / "val" / "odd").rename(folder / "val" / "ODD")
    data = load_folder(folder)
    found, labels = numbers(data.test)
    assert (data.labels, labels) == (["even", "odd"], [number % 2 for number in found])
    (folder / "val" / "ODD").rename(folder / "val" / "prime")
    with pytest.raises(InputError, match=r"test split has labels .* train split one to one: 'prime'"):
        load_folder(folder)


def test_images_are_turned_before_they_are_resized(folder: Path) -> None:
    """A wide image, black on the left, is stored on its side: EXIF orientation 6 says turn by 90 degrees."""
    upright = np.zeros((8, 8), np.uint8)
    upright[:, 4:] = 200
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in (folder / "train" / "odd").glob("*.png"):
        Image.fromarray(np.rot90(upright)).save(path, exif=exif)
    pixel_values, labels = load_folder(folder).train.batch(range(12))
    expected = torch.from_numpy(upright).float() / 127.5 - 1
    for image, label in zip(pixel_values, labels, strict=True):
        assert not label or (image - expected).abs().max() < 0.02


def test_damage_is_found_when_data_are_loaded(folder: Path) -> None:
    """Before anything is computed on the images that are whole."""
    spoil_image(folder)
    for read in (load_data, check_data):
        with pytest.raises(InputError, match=r"val/odd/1[357]\.png: not a readable image"):
            read(ImageFolderData(source="image_folder", path=str(folder)), preprocessing(), 0)


def test_a_plan_decodes_a_few_images_of_each_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(pipeline.data.images, "CHECKED_IMAGES", 2)
    monkeypatch.setattr(pipeline.data.images, "decode_image", lambda _, name: decoded.append(name))
    checked = check_data(ImageFolderData(source="image_folder", path=str(folder)), preprocessing(), 0)
    assert checked is not None
    assert checked.train_samples == 12
    assert ["train" in name for name in decoded] == [True, True, False, False]
    # Of which a run would take the same first.
    monkeypatch.undo()
    first = load_folder(folder, train_samples=2).train
    assert isinstance(first, EncodedSplit)
    assert decoded[:2] == [first.source.name(index) for index in first.chosen.tolist()]
    assert CHECKED_IMAGES > 64


def test_more_samples_than_there_are(folder: Path) -> None:
    assert len(load_folder(folder, train_samples=12, test_samples=6).train) == 12
    with pytest.raises(InputError, match=r"calibration\.samples: 13 samples asked for, the train split has 12;"):
        load_folder(folder, train_samples=13)
    with pytest.raises(InputError, match=r"evaluation\.samples: 7 samples asked for, the test split has 6;"):
        load_folder(folder, test_samples=7)


def test_notes_on_what_is_beside_the_images(folder: Path) -> None:
    (note,) = load_folder(folder).notes
    assert note.startswith(f"data: {folder / 'val'}: 1 files skipped")
    assert note.endswith("odd/notes.txt")


def test_test_images_inside_the_training_folder(folder: Path) -> None:
    section = ImageFolderData(source="image_folder", path=str(folder), train=".", test="val")
    with pytest.raises(InputError, match="6 images are in both train and test"):
        load_data(section, preprocessing(), 0)


def test_one_file_under_two_names_is_in_both_splits(folder: Path) -> None:
    (folder / "val" / "even" / "again.png").hardlink_to(folder / "train" / "even" / "2.png")
    with pytest.raises(InputError, match=r"1 images are in both train and test, .*train/even/2\.png"):
        load_folder(folder)


# --- hub -------------------------------------------------------------------------------------------------------


def table(labels: list[int], names: list[str] | None, first: int = 0) -> datasets.Dataset:
    images = [Image.fromarray(np.full((4, 4), 10 * (first + index), np.uint8)) for index in range(len(labels))]
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def load_hub(path: Path, model_labels: tuple[str, ...] | None = None, **options: str) -> ImageData:
    return load_data(HubImageData(source="hub", path=str(path), **options), preprocessing(model_labels), 0)


@pytest.fixture
def hub(tmp_path: Path) -> Callable[..., Path]:
    def save(train: list[int], validation: list[int], names: list[str] | None = None) -> Path:
        splits = {"train": table(train, names), "validation": table(validation, names, len(train))}
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
        return tmp_path / "set"

    return save


def test_hub_dataset_by_name(hub: Callable[..., Path]) -> None:
    data = load_hub(hub([0, 1, 0, 1], [0, 1], ["even", "odd"]), ("odd", "even"))
    for split, expected in ((data.train, {0, 1, 2, 3}), (data.test, {4, 5})):
        found, labels = numbers(split)
        assert set(found) == expected
        assert labels == [1 - number % 2 for number in found]


def test_hub_dataset_by_index(hub: Callable[..., Path]) -> None:
    path = hub([0, 1, 2], [0, 1])
    assert load_hub(path).labels == ["0", "1", "2"]
    assert load_hub(path, ("a", "b", "c", "d")).labels == ["a", "b", "c", "d"]
    with pytest.raises(InputError, match="split train: label 2 in row 2 is out of range: there are 2 labels"):
        load_hub(path, ("a", "b"))
    with pytest.raises(InputError, match="split validation: label -1 in row 1 is out of range"):
        load_hub(hub([0, 1], [0, -1]))


def test_hub_hash_is_of_contents(hub: Callable[..., Path]) -> None:
    first = load_hub(hub([0, 1, 0], [0, 1], ["a", "b"])).hash
    assert load_hub(hub([0, 1, 0], [0, 1], ["a", "b"])).hash == first
    assert load_hub(hub([0, 1, 1], [0, 1], ["a", "b"])).hash != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "img"}, "no column 'img'; it has image, label"),
        ({"image_column": "label"}, "column 'label' does not hold images"),
        ({"label_column": "image"}, "label column 'image' holds"),
        ({"test": "train"}, "train and test are the same split"),
        ({"test": "nowhere"}, "split nowhere: cannot load it"),
    ],
)
def test_bad_hub_sections(hub: Callable[..., Path], options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_hub(hub([0, 1], [0, 1], ["a", "b"]), **options)


def test_hub_dataset_in_a_local_image_folder(folder: Path) -> None:
    data = load_hub(folder, ("even", "odd"))
    found, labels = numbers(data.train)
    assert (sorted(found), labels) == (list(range(12)), [number % 2 for number in found])


def test_hub_labels_that_are_not_class_indices(tmp_path: Path) -> None:
    def save(label: Any, values: list[Any]) -> Path:
        rows = table([0] * len(values), None).remove_columns("label")
        rows = rows.add_column("label", values, feature=label)
        datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(tmp_path / str(label)))
        return tmp_path / str(label)

    with pytest.raises(InputError, match=r"split train: label column 'label' holds Value\('string'\)"):
        load_hub(save(datasets.Value("string"), ["a", "b"]))
    with pytest.raises(InputError, match="split train: row 1 has no label, in column 'label'"):
        load_hub(save(datasets.Value("int64"), [0, None]))


def test_hub_column_with_a_mode(tmp_path: Path) -> None:
    """What the column says of its images holds: these are to be read in grey."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(mode="L"), "label": datasets.Value("int64")})
    splits = {}
    for number, split in enumerate(("train", "validation")):
        Image.fromarray(pixels ^ number).save(tmp_path / f"{number}.png")
        rows = {"image": [str(tmp_path / f"{number}.png")], "label": [0]}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    pixel_values, _ = load_hub(tmp_path / "set").train.batch([0])
    expected = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L"))).float() / 127.5 - 1
    torch.testing.assert_close(pixel_values[0], expected.expand(3, 8, 8), atol=1e-5, rtol=0)


def test_hub_splits_that_overlap(folder: Path) -> None:
    (folder / "val" / "odd" / "notes.txt").unlink()
    data = load_hub(folder, train="train[:50%]", test="train[50%:]")
    assert (len(data.train), len(data.test)) == (6, 6)
    with pytest.raises(InputError, match=r"train: train\[:80%\] and test: train\[50%:\] have 4 rows of train in"):
        load_hub(folder, train="train[:80%]", test="train[50%:]")
    with pytest.raises(InputError, match="have 6 rows of validation in common"):
        load_hub(folder, train="train+validation", test="validation")


def test_a_saved_data_set_has_no_configurations(hub: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"data\.config: en: .* has no configurations; leave it out"):
        load_hub(hub([0, 1], [0, 1]), config="en")


def test_empty_and_unknown_hub_dataset(hub: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"split validation\[:0\]: cannot load it .* no data"):
        load_hub(folder, test="validation[:0]")
    with pytest.raises(InputError, match=r"cannot load it \(missing or empty\?\)"):
        load_hub(hub([0, 1], [], ["a", "b"]))
    with pytest.raises(InputError, match="cannot load it"):
        load_hub(tmp_path / "nothing")
