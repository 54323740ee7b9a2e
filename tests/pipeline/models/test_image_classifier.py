"""Classifiers that images cannot go through are refused before their weights are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from pipeline.models.image_classifier import load_preprocessing
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import DigitsData, ImageFolderData, PretrainedModel, ScratchModel, Training

IMAGES = ImageFolderData(source="image_folder", path="nowhere")
SIZE = 16


def saved(folder: Path, processor: Any = None, **config: Any) -> PretrainedModel:
    """A tiny ViT with ``config``, and its image processor."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    settings = ViTConfig(**{"image_size": SIZE, "patch_size": 8, **small, **names, **config})
    ViTForImageClassification(settings).save_pretrained(folder)
    (processor or ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})).save_pretrained(folder)
    return PretrainedModel(source="pretrained", path=str(folder))


def change(folder: Path, file: str, **values: Any) -> None:
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**content, **values}), encoding="utf-8")


def test_what_fits_is_accepted(tmp_path: Path) -> None:
    preprocessing = load_preprocessing(saved(tmp_path), IMAGES)
    assert (preprocessing.image_size, preprocessing.labels) == (SIZE, ("cat", "dog"))
    cropping = BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": SIZE, "width": SIZE})
    assert load_preprocessing(saved(tmp_path / "cropped", cropping), IMAGES).image_size == SIZE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_channels": 1}, "num_channels: 1: images are read as RGB.* only models of 3 channels"),
        ({"num_channels": 4}, "num_channels: 4: images are read as RGB"),
        ({"image_size": [16, 24]}, r"image_size: \[16, 24\] is not square"),
    ],
)
def test_models_of_other_images(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"model\.path: {tmp_path}: {message}"):
        load_preprocessing(saved(tmp_path, **config), IMAGES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 24, "width": 24}}, "makes images of 24x24, the model takes 16x16"),
        ({"size": {"height": 16, "width": 24}}, "makes images of 16x24"),
        ({"size": {"shortest_edge": 16}}, "makes images of 24x16"),
        ({"do_resize": False}, r"makes images of 48x32, .*; mend preprocessor_config\.json \(do_resize"),
        ({"image_std": [0.5, 0.0, 0.5]}, "makes values that are not finite"),
        ({"image_mean": [0.5]}, "cannot prepare an image: ValueError"),
    ],
)
def test_processors_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    section = saved(tmp_path)
    change(tmp_path, "preprocessor_config.json", **settings)
    with pytest.raises(InputError, match=rf"model\.path: {tmp_path}: .*{message}"):
        load_preprocessing(section, IMAGES)


def test_a_folder_without_a_processor(tmp_path: Path) -> None:
    section = saved(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"it has no preprocessor_config\.json, .* save its image processor there"):
        load_preprocessing(section, IMAGES)


@pytest.mark.parametrize(
    ("names", "expected"),
    [({"0": "a", "1": "b"}, ("a", "b")), ({"1": "b", "0": "a"}, ("a", "b"))],
)
def test_label_names_of_a_model(names: dict[str, Any], expected: tuple[str, ...], tmp_path: Path) -> None:
    section = saved(tmp_path)
    change(tmp_path, "config.json", id2label=names)
    assert load_preprocessing(section, IMAGES).labels == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"0": "a", "2": "b"}, r"id2label names the classes \[0, 2\], which are not all from 0 to 1"),
        ({"1": "a", "2": "b"}, r"id2label names the classes \[1, 2\]"),
        ({"a": "a", "b": "b"}, "cannot load it"),
    ],
)
def test_label_names_with_gaps(names: dict[str, Any], message: str, tmp_path: Path) -> None:
    section = saved(tmp_path)
    change(tmp_path, "config.json", id2label=names)
    with pytest.raises(InputError, match=message):
        load_preprocessing(section, IMAGES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_channels": 1}, r"model\.config\.num_channels: 1: images are read as RGB"),
        ({"image_size": [8, 12]}, r"model\.config\.image_size: \[8, 12\] is not square"),
        ({"image_size": 0}, r"model\.config\.image_size: 0 is no size of an image"),
        ({"image_size": [8, 8, 8]}, r"model\.config"),
    ],
)
def test_models_of_the_run_of_other_images(config: dict[str, Any], message: str) -> None:
    section = ScratchModel(
        source="scratch", model_type="vit", config={"image_size": 8, **config}, training=Training(steps=1)
    )
    with pytest.raises(InputError, match=message):
        load_preprocessing(section, DigitsData(source="digits", image_size=8))


def test_pixel_values_are_the_processors(tmp_path: Path) -> None:
    preprocessing = load_preprocessing(saved(tmp_path), IMAGES)
    grey = Image.new("RGB", (5, 9), (51, 51, 51))
    assert torch.allclose(preprocessing([grey]), torch.full((1, 3, SIZE, SIZE), 51 / 127.5 - 1), atol=1e-6)
