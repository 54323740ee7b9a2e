"""``fips plan`` and the start of a run find what is missing or unfit in model and data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import yaml
from causal_lm_samples import tiny_language_model
from language_samples import byte_level_tokenizer
from PIL import Image
from run_samples import TINY, language_recipe, tiny_recipe, write_recipe
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from typer.testing import CliRunner

from pipeline import cli
from pipeline.estimate import estimate
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.progress import Progress
from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import Recipe
from pipeline.run import run
from pipeline.sweep.definition import load_sweep

LABELS = ("tabby cat", "golden retriever")


# --- images ----------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for number, label in enumerate(("tabby_cat", "golden_retriever")):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for copy in range(3):
                image = Image.fromarray(np.full((8, 8, 3), 40 * number + copy, np.uint8))
                image.save(tmp_path / "images" / split / label / f"{copy}.png")
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    ViTForImageClassification(ViTConfig(**TINY["model"]["config"], **names)).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def image_recipe(model_path: str | Path, images_path: str | Path, **changes: Any) -> Recipe:
    content = {
        "model": {"source": "pretrained", "path": str(model_path)},
        "data": {"source": "image_folder", "path": str(images_path)},
        "calibration": {},
        "evaluation": {},
    }
    return tiny_recipe(**{**content, **changes})


def test_images_that_fit(model: Path, images: Path) -> None:
    assert estimate(image_recipe(model, images)).notes == ()
    (images / "val" / "tabby_cat" / "notes.txt").write_text("of cats")
    (note,) = estimate(image_recipe(model, images)).notes
    assert "1 files skipped, which are no images by their suffix: tabby_cat/notes.txt" in note


def spoil_label(model: Path, images: Path) -> dict[str, Any]:
    (images / "train" / "tabby_cat").rename(images / "train" / "siamese")
    return {}


def spoil_image(model: Path, images: Path) -> dict[str, Any]:
    path = images / "val" / "tabby_cat" / "1.png"
    path.write_bytes(path.read_bytes()[:50])
    return {}


def spoil_processor(model: Path, images: Path) -> dict[str, Any]:
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(model)
    return {}


def many_calibration_samples(model: Path, images: Path) -> dict[str, Any]:
    return {"calibration": {"samples": 7}}


def many_evaluation_samples(model: Path, images: Path) -> dict[str, Any]:
    return {"evaluation": {"samples": 7}}


def many_samples_of_allocation(model: Path, images: Path) -> dict[str, Any]:
    return {"allocate": {"target": 3.0, "bits": [3, 2], "samples": 16}}


def revision_of_a_folder(model: Path, images: Path) -> dict[str, Any]:
    return {"model": {"source": "pretrained", "path": str(model), "revision": "v1"}}


def file_for_a_folder(model: Path, images: Path) -> dict[str, Any]:
    return {"model": {"source": "pretrained", "path": str(model / "model.safetensors")}}


def same_splits(model: Path, images: Path) -> dict[str, Any]:
    return {"data": {"source": "image_folder", "path": str(images), "train": "val", "test": "val"}}


def patches_larger_than_images(model: Path, images: Path) -> dict[str, Any]:
    scratch = {**TINY["model"], "config": {**TINY["model"]["config"], "patch_size": 16}}
    return {"model": scratch}


def unknown_activation(model: Path, images: Path) -> dict[str, Any]:
    scratch = {**TINY["model"], "config": {**TINY["model"]["config"], "hidden_act": "gleu"}}
    return {"model": scratch}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_label, r"unknown to the model: 'siamese'; .*'golden_retriever', 'siamese'.*'tabby cat', 'golden ret"),
        (spoil_image, r"val/tabby_cat/1\.png: not a readable image"),
        (spoil_processor, "makes images of 12x12"),
        (many_calibration_samples, r"calibration\.samples: 7 samples asked for, the train split has 6"),
        (many_evaluation_samples, r"evaluation\.samples: 7 samples asked for, the test split has 6"),
        (many_samples_of_allocation, r"allocate\.samples: 16 samples asked for, the train split has 6"),
        (revision_of_a_folder, r"model\.revision: v1: .*model is a local folder, which has no revisions; leave it out"),
        (file_for_a_folder, r"model\.path: .*model\.safetensors: a file; give the folder"),
        (same_splits, "6 images are in both train and test"),
        (patches_larger_than_images, "model: its configuration does not fit together, .*Kernel size"),
        (unknown_activation, "model: its configuration does not fit together, .*gleu"),
    ],
)
def test_images_that_do_not_fit(
    spoil: Callable[[Path, Path], dict[str, Any]], message: str, model: Path, images: Path, tmp_path: Path
) -> None:
    recipe = image_recipe(model, images, **spoil(model, images))
    with pytest.raises(InputError, match=message):
        estimate(recipe)
    with pytest.raises(InputError, match=message):
        run(recipe, tmp_path / "run", Progress())
    assert not (tmp_path / "run").exists()


def test_digits_have_as_many_samples() -> None:
    with pytest.raises(InputError, match=r"calibration\.samples: 1204 samples asked for, the train split has 1203"):
        estimate(tiny_recipe(calibration={"samples": 1204}))


# --- text ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language") / "model"
    tiny_language_model("llama", num_hidden_layers=2).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text("the dog waits\n" * 200, encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("".join(f'{{"text": "cat {n} sleeps"}}\n' for n in range(60)), "utf-8")
    return tmp_path


def with_added_token(folder: Path, model: Path) -> Path:
    """A copy of ``model`` whose tokenizer has a token with the id of the vocabulary's size."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(folder)
    return folder


def test_text_that_fits(language_model: Path, text: Path) -> None:
    assert estimate(language_recipe(language_model, text)).notes == ()


@pytest.mark.parametrize("place", ["train.txt", "test.jsonl"])
def test_a_token_beyond_the_table_in_the_text(place: str, language_model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    recipe = language_recipe(with_added_token(tmp_path / "model", language_model), text)
    (note,) = estimate(recipe).notes
    assert "'<extra>' (id 265)" in note
    assert "with 265 rows" in note
    content = (text / place).read_text(encoding="utf-8")
    (text / place).write_text(content.replace("dog", "<extra>").replace("cat", "<extra>"), encoding="utf-8")
    with pytest.raises(InputError, match=r"text holds '<extra>' \(id 265\), .* 265 rows"):
        estimate(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": {"samples": 200}}, r"calibration\.samples: 200 samples asked for, the train split has \d+"),
        ({"evaluation": {"samples": 200}}, r"evaluation\.samples: 200 samples asked for, the test split has \d+"),
        ({"evaluation": {"samples": 1}}, "1 windows are too few for a standard error"),
        ({"evaluation": {"stride": 40}}, r"evaluation\.stride: got 40"),
    ],
)
def test_windows_that_are_not_there(changes: dict[str, Any], message: str, language_model: Path, text: Path) -> None:
    with pytest.raises(InputError, match=message):
        estimate(language_recipe(language_model, text, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "less than one window"),
        ('{"text": "a"}\n{"body": "b"}\n', r"test\.jsonl: line 2: no field 'text'"),
        ("the cat sleeps\n", r"test\.jsonl: line 1: not valid JSON"),
    ],
)
def test_text_that_cannot_be_read(content: str, message: str, language_model: Path, text: Path) -> None:
    (text / "test.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        estimate(language_recipe(language_model, text))


@pytest.mark.parametrize(
    ("path", "message"), [("missing.txt", r"data\.train: .*: no such file"), ("", r"data\.train: .*: not a file")]
)
def test_text_that_is_no_file(path: str, message: str, language_model: Path, text: Path) -> None:
    data = {"source": "text", "train": str(text / path), "context": 32}
    with pytest.raises(InputError, match=message):
        estimate(language_recipe(language_model, text, data=data))


def test_local_hub_text_is_read(language_model: Path, text: Path) -> None:
    (text / "train.txt").unlink()
    (text / "train.jsonl").write_bytes((text / "test.jsonl").read_bytes())
    data = {"source": "hub_text", "path": str(text), "context": 32, "field": "body"}
    with pytest.raises(InputError, match=r"split test: row 0: no field 'body'"):
        estimate(language_recipe(language_model, text, data=data))


# --- paths -----------------------------------------------------------------------------------------------------


def test_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    images = image_recipe("~/model", "~/images/")
    assert (images.model.path, images.data.path) == (f"{tmp_path}/model", f"{tmp_path}/images/")  # type: ignore[union-attr]
    text = language_recipe(Path("~/model"), Path("~"))
    assert text.model.path == f"{tmp_path}/model"  # type: ignore[union-attr]
    assert (text.data.train, text.data.test) == (f"{tmp_path}/train.txt", f"{tmp_path}/test.jsonl")  # type: ignore[union-attr]
    for source in ("hub", "hub_text"):
        content = (images if source == "hub" else text).model_dump(mode="json")
        content["data"] = {"source": source, "path": "~/set"}
        assert parse_recipe(content, "r.yaml").data.path == f"{tmp_path}/set"  # type: ignore[union-attr]
    hub = tiny_recipe(model={"source": "pretrained", "path": "google/vit-base"}, data={"source": "hub", "path": "a/b"})
    assert (hub.model.path, hub.data.path) == ("google/vit-base", "a/b")  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["~nobody-of-that-name/model", "", "a\0b", "\ud800"])
def test_paths_that_cannot_be(path: str) -> None:
    with pytest.raises(InputError, match=r"r\.yaml: model\.path: got .*(home folder|not a path)"):
        parse_recipe({**TINY, "model": {"source": "pretrained", "path": path}}, "r.yaml")


def test_home_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave the ``~`` of ``--out=~/runs`` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {}
    monkeypatch.setattr(cli, "load_recipe", lambda path, _: given.setdefault("recipe", path) and tiny_recipe())
    monkeypatch.setattr("pipeline.run.run", lambda _, folder, *rest, **options: given.update(out=folder, **options))
    monkeypatch.setattr("pipeline.report.sections.verdict", lambda _: "")
    monkeypatch.setattr("pipeline.report.sections.verdict_detail", lambda _: "")
    result = CliRunner().invoke(cli.app, ["run", "~/r.yaml", "--out=~/runs", "--shared=~/shared"])
    assert result.exit_code == 0, result.output
    assert given["recipe"] == tmp_path / "r.yaml"
    assert (given["out"], given["shared"]) == (tmp_path / "runs", tmp_path / "shared")
    assert CliRunner().invoke(cli.app, ["plan", "~nobody-of-that-name/r.yaml"]).exit_code == 2


def test_every_path_of_the_command_knows_home() -> None:
    paths = 0
    for command in cli.app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if "Path" in str(hint):
                (given,) = next(part.__metadata__ for part in (hint, *get_args(hint)) if hasattr(part, "__metadata__"))
                assert given.parser is cli._path, (command.callback, name)
                paths += 1
    assert paths > 10


def test_home_in_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_recipe(tmp_path)
    sweep = {"name": "s", "recipe": "~/tiny.yaml", "axes": {"seed": [0, 1]}}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    assert len(load_sweep(tmp_path / "elsewhere" / "sweep.yaml").points) == 2
