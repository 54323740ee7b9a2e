"""Every key of a recipe has an effect that a test sees. The table is compared with the schema, so a new key needs one.

Effects are seen in the results of the stage that reads the key: a tiny run up to it, with one value and with another.
"""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest.mock import MagicMock

import pytest
import torch
from causal_lm_samples import tiny_language_model
from language_samples import byte_level_tokenizer
from places import ROOT
from run_samples import TINY, TINY_LANGUAGE, StopRun, hashes

from pipeline.data.images import EncodedSplit, TensorSplit
from pipeline.estimate.inputs import check_inputs
from pipeline.models import causal_lm, image_classifier
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import digest, read_json
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.run_folder import RunFolder, StageResult
from pipeline.recipe.reading import parse_recipe, set_key
from pipeline.recipe.schema import CausalLanguageModel, PackagedOnnxModel, PretrainedModel, Recipe, Section, Training
from pipeline.run import run

GRADES = [{"bits": 4, "fraction": 0.5}, {"bits": 2, "fraction": 0.5}]
OTHER_GRADES = [{"bits": 3, "fraction": 0.5}, {"bits": 2, "fraction": 0.5}]
OTHER_FRACTIONS = [{"bits": 4, "fraction": 0.25}, {"bits": 2, "fraction": 0.75}]


@dataclass(frozen=True)
class Changes:
    """The stage ``seen_in`` leaves other files with ``value`` than without. ``beside``: keys that both runs have, on
    top of the tiny recipe; ``key``: where the value is put, if not at the leaf; ``text``: in the language model's."""

    value: Any
    seen_in: str
    beside: dict[str, Any] = field(default_factory=dict)
    key: str | None = None
    text: bool = False


@dataclass(frozen=True)
class TestedBy:
    """A test elsewhere sees the effect: ``file`` below ``tests``, ``name`` of the test."""

    __test__ = False
    file: str
    name: str


@dataclass(frozen=True)
class Batches:
    """The largest batch that the stage ``seen_in`` asks for is ``value``; nothing else may change with it."""

    value: int
    seen_in: str


FIT, START, LOCAL, TOGETHER = "fit/group_0", "qat/0-start", "qat/1-local", "qat/2-distill"
IMAGES, TEXT = "pipeline/data/test_images.py", "pipeline/data/test_text.py"
LOADING, HUB = "pipeline/models/test_causal_lm_loading.py", "test_hub_recipes.py"
ALLOCATE = {"allocate": {"target": 3.0, "bits": [4, 2]}}
WIDE = {"compression.budget": 1.5}  # a rank of 64, of which a quarter is a block of 16
GRADED_BASIS = {"quantization.basis.bits": GRADES, **WIDE}
GRADED = {"quantization.projections.bits": GRADES, **WIDE}
ALLOCATE_GRADES = {"allocate": {"target": 16.0, "bits": [GRADES]}, **WIDE}
FINETUNE = {"finetune": {"objective": "distill", "steps": 2, "batch_size": 8}}
ALLOCATED_BITS = {"quantization.projections.bits": "allocate", "quantization.target_stored_bits": 9.0, **WIDE}
RIGL = {"compression.sparsifier": {"algorithm": "rigl", "update_every": 1}}
LOCAL_KEY, TOGETHER_KEY = "quantization.training.0.", "quantization.training.1."
REST = {"quantization.rest": {"linear_bits": 4, "embedding_bits": 4, "block_size": 16}}
TIERS = {"quantization.rest": {"embedding_bits": [{"bits": 8, "tokens": 30}, {"bits": 3}], "block_size": 16}}
MEASURED = "sensitivities"
ALLOCATE_WHOLE = {
    "allocate": {
        "target": "20MB", "linear_bits": [4, 3], "embedding_bits": [[{"bits": 8, "tokens": 30}, {"bits": 3}]]
    },
    **REST,
}

EFFECTS: dict[str, Changes | TestedBy | Batches] = {
    "name": Changes("other", "export"),
    "seed": Changes(1, "model"),
    "model.source": TestedBy(HUB, "test_local_folder_gives_the_saved_model"),
    "model(scratch).model_type": Changes("deit", "model"),
    "model(scratch).config": Changes(48, "model", key="model.config.intermediate_size"),
    "model(scratch).augmentation": Changes("affine", "model"),
    "model(scratch).training.steps": Changes(4, "model"),
    "model(scratch).training.batch_size": Changes(9, "model"),
    "model(scratch).training.learning_rate": Changes(1e-2, "model"),
    "model(scratch).training.weight_decay": Changes(0.9, "model"),
    "model(pretrained).path": TestedBy(HUB, "test_local_folder_gives_the_saved_model"),
    "model(pretrained).revision": TestedBy("pipeline/recipe/test_every_key.py", "test_a_revision_is_passed_to_the_hub"),
    "model(packaged_onnx).package": TestedBy("pipeline/data/test_packages.py", "test_file_of_a_package"),
    "model(packaged_onnx).file": TestedBy("pipeline/data/test_packages.py", "test_file_of_a_package"),
    "model(packaged_onnx).image_size": TestedBy(
        "pipeline/models/test_dinov2_package.py", "test_image_size_must_fit_patches_and_data"
    ),
    **{
        f"model(packaged_onnx).head.{key}": TestedBy(
            "pipeline/recipe/test_every_key.py", "test_a_head_is_trained_as_its_section_says"
        )
        for key in ("steps", "batch_size", "learning_rate", "weight_decay")
    },
    "model(causal_lm).path": TestedBy(LOADING, "test_local_folder"),
    "model(causal_lm).revision": TestedBy("pipeline/recipe/test_every_key.py", "test_a_revision_is_passed_to_the_hub"),
    "model(causal_lm).gguf_file": TestedBy(LOADING, "test_gguf_gives_the_model_that_was_written"),
    "model(packaged_gguf).package": TestedBy(LOADING, "test_whole_file_in_the_package_is_used_where_it_is"),
    "model(packaged_gguf).file": TestedBy(LOADING, "test_whole_file_in_the_package_is_used_where_it_is"),
    "data.source": TestedBy(IMAGES, "test_hub_dataset_by_name"),
    "data(digits).image_size": TestedBy(IMAGES, "test_digits_are_grey_and_resized"),
    "data(digits).test_fraction": Changes(0.5, "model"),
    "data(image_folder).path": TestedBy(IMAGES, "test_folder_images_keep_their_labels"),
    "data(image_folder).train": TestedBy(IMAGES, "test_same_folder_for_train_and_test"),
    "data(image_folder).test": TestedBy(IMAGES, "test_same_folder_for_train_and_test"),
    **{f"data(hub).{key}": TestedBy(IMAGES, "test_hub_dataset_by_name") for key in ("path", "config")},
    **{f"data(hub).{key}": TestedBy(IMAGES, "test_empty_and_unknown_hub_dataset") for key in ("train", "test")},
    **{f"data(hub).{key}": TestedBy(IMAGES, "test_bad_hub_sections") for key in ("image_column", "label_column")},
    **{f"data(packaged_text).{key}": TestedBy(TEXT, "test_packaged_text_that_is_not_there")
       for key in ("package", "file", "field")},
    "data(packaged_text).test_fraction": TestedBy(TEXT, "test_packaged_records"),
    "data(packaged_text).context": TestedBy(TEXT, "test_too_little_text_for_a_window"),
    "data(text).train": TestedBy(TEXT, "test_documents_are_split_shuffled_and_joined"),
    "data(text).test": TestedBy(TEXT, "test_train_leaves_out_what_a_given_test_file_has"),
    "data(text).field": TestedBy(TEXT, "test_jsonl_errors_name_file_and_line"),
    "data(text).test_fraction": TestedBy(TEXT, "test_documents_are_split_shuffled_and_joined"),
    "data(text).context": Changes(24, "calibrate", text=True),
    **{f"data(hub_text).{key}": TestedBy(TEXT, "test_hub_dataset_saved_to_disk") for key in ("path", "test", "field")},
    **{f"data(hub_text).{key}": TestedBy(TEXT, "test_hub_errors") for key in ("config", "train")},
    "data(hub_text).documents": TestedBy(TEXT, "test_hub_documents_are_limited"),
    "data(hub_text).context": TestedBy(TEXT, "test_hub_text_is_streamed_in_its_own_order"),
    "vocabulary.scripts": Changes(["Cyrillic"], "calibrate", {"vocabulary": {"scripts": ["Latin"]}}, text=True),
    "vocabulary.keep": Changes(262, "calibrate", {"vocabulary": {"keep": 264}}, text=True),
    "calibration.samples": Changes(24, "calibrate"),
    "calibration.batch_size": Batches(7, "calibrate"),
    "compression.method": TestedBy("pipeline/sweep/test_sweep.py", "test_results_are_those_of_the_points_reports"),
    "compression.groups": Changes(2, "factorize/group_0"),
    "compression.budget": Changes(0.9, "factorize/group_0"),
    "compression.pattern": Changes("2:4", FIT, {"compression.sparsity": 0.5}),
    "compression.sparsity": Changes(0.25, FIT),
    "compression.initialization": Changes("svd", "factorize/group_0"),
    "compression.sparsifier.algorithm": Changes("static", FIT, {"compression.sparsifier": {}}),
    "compression.sparsifier.ranking": Changes("group", FIT),
    "compression.sparsifier.saliency": Changes("activation", FIT),
    "compression.sparsifier.update_every": Changes(3, FIT),
    "compression.sparsifier.end": Changes(0.3, FIT),
    "compression.sparsifier.initial_sparsity": Changes(0.4, FIT),
    "compression.sparsifier.drop_fraction": Changes(0.9, FIT, RIGL),
    "fit.steps": Changes(5, FIT),
    "fit.batch_tokens": Changes(17, FIT),
    "fit.learning_rate": Changes(1e-2, FIT),
    "fit.weight_decay": Changes(0.9, FIT),
    "finetune.objective": Changes("task", "finetune", FINETUNE),
    "finetune.steps": Changes(3, "finetune", FINETUNE),
    "finetune.batch_size": Changes(5, "finetune", FINETUNE),
    "finetune.learning_rate": Changes(1e-2, "finetune", FINETUNE),
    "finetune.weight_decay": Changes(0.9, "finetune", FINETUNE),
    "finetune.precision": Changes("bfloat16", "finetune", FINETUNE),
    "quantization.basis.bits": Changes(2, START),
    "quantization.basis.bits.bits": Changes(OTHER_GRADES, START, GRADED_BASIS, "quantization.basis.bits"),
    "quantization.basis.bits.fraction": Changes(OTHER_FRACTIONS, START, GRADED_BASIS, "quantization.basis.bits"),
    "quantization.basis.block_size": Changes(32, START),
    "quantization.basis.levels": Changes("midrise", START),
    "quantization.projections.bits": Changes(2, START),
    "quantization.projections.bits.bits": Changes(OTHER_GRADES, START, GRADED, "quantization.projections.bits"),
    "quantization.projections.bits.fraction": Changes(OTHER_FRACTIONS, START, GRADED, "quantization.projections.bits"),
    "quantization.projections.block_size": Changes(32, START, WIDE),
    "quantization.projections.levels": Changes("midrise", START),
    "quantization.target_stored_bits": Changes(12.0, START, ALLOCATED_BITS),
    "quantization.start": Changes("gptq", START),
    "quantization.learned_scales": Changes(False, LOCAL),
    "quantization.training(local).steps": Changes(3, LOCAL, {}, LOCAL_KEY + "steps"),
    "quantization.training(local).batch_tokens": Changes(17, LOCAL, {}, LOCAL_KEY + "batch_tokens"),
    "quantization.training(local).learning_rate": Changes(1e-2, LOCAL, {}, LOCAL_KEY + "learning_rate"),
    "quantization.training(local).weight_decay": Changes(0.9, LOCAL, {}, LOCAL_KEY + "weight_decay"),
    "quantization.training.objective": Changes("task", "qat/2-task", {}, TOGETHER_KEY + "objective"),
    "quantization.training(task).steps": Changes(3, TOGETHER, {}, TOGETHER_KEY + "steps"),
    "quantization.training(task).batch_size": Changes(5, TOGETHER, {}, TOGETHER_KEY + "batch_size"),
    "quantization.training(task).learning_rate": Changes(1e-2, TOGETHER, {}, TOGETHER_KEY + "learning_rate"),
    "quantization.training(task).weight_decay": Changes(0.9, TOGETHER, {}, TOGETHER_KEY + "weight_decay"),
    "quantization.training(task).precision": Changes("bfloat16", TOGETHER, {}, TOGETHER_KEY + "precision"),
    "quantization.training(task).train_rest": Changes(True, TOGETHER, {}, TOGETHER_KEY + "train_rest"),
    "quantization.rest.weights": Changes("float32", "export"),
    "quantization.rest.linear_bits": Changes(8, "qat/rest", REST, text=True),
    "quantization.rest.embedding_bits": Changes(8, "qat/rest", {"quantization.start": "gptq", **REST}, text=True),
    "quantization.rest.embedding_bits.bits": Changes(
        [{"bits": 8, "tokens": 30}, {"bits": 2}], "qat/rest", TIERS, "quantization.rest.embedding_bits", text=True
    ),
    "quantization.rest.embedding_bits.tokens": Changes(
        [{"bits": 8, "tokens": 31}, {"bits": 3}], "qat/rest", TIERS, "quantization.rest.embedding_bits", text=True
    ),
    "quantization.rest.block_size": Changes(32, "qat/rest", {"quantization.start": "gptq", **REST}, text=True),
    "allocate.target": Changes(2.3, "allocate", ALLOCATE),
    "allocate.budgets": Changes([0.6, 0.9], MEASURED, ALLOCATE),
    "allocate.sparsities": Changes([0.5, 0.75], MEASURED, ALLOCATE),
    "allocate.bits": Changes([4, 3], MEASURED, ALLOCATE),
    "allocate.bits.bits": Changes([OTHER_GRADES], MEASURED, ALLOCATE_GRADES, "allocate.bits"),
    "allocate.bits.fraction": Changes([OTHER_FRACTIONS], MEASURED, ALLOCATE_GRADES, "allocate.bits"),
    "allocate.linear_bits": Changes([4, 2], MEASURED, ALLOCATE_WHOLE, text=True),
    "allocate.embedding_bits": Changes([8], MEASURED, ALLOCATE_WHOLE, text=True),
    "allocate.embedding_bits.bits": Changes(
        [[{"bits": 8, "tokens": 30}, {"bits": 2}]], MEASURED, ALLOCATE_WHOLE, "allocate.embedding_bits", text=True
    ),
    "allocate.embedding_bits.tokens": Changes(
        [[{"bits": 8, "tokens": 31}, {"bits": 3}]], MEASURED, ALLOCATE_WHOLE, "allocate.embedding_bits", text=True
    ),
    "allocate.samples": Changes(3, MEASURED, ALLOCATE),
    "export.accuracy_level": Changes(4, "export"),
    "export.max_shard_size": Changes(4096, "export"),
    "evaluation.samples": Changes(30, "evaluate/dense"),
    "evaluation.batch_size": Batches(7, "evaluate/dense"),
    "evaluation.stride": Changes(16, "evaluate/dense", text=True),
}  # fmt: skip


# --- the table is complete -------------------------------------------------------------------------------------


def sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for argument in get_args(annotation) for found in sections_in(argument)]


def leaves(section: type[Section], path: str = "") -> Iterator[str]:
    """Dotted keys that hold values, also those that may hold a value or a section. Of several sections that a key may
    hold, the one is in brackets; what tells them apart is a key without."""
    for key, found in section.model_fields.items():
        here, inner = f"{path}{key}", sections_in(found.annotation)
        tags = ["source", "objective"]
        tag = next((name for name in tags if inner and name in inner[0].model_fields), None) if len(inner) > 1 else None
        if not inner or here.endswith("bits"):
            yield here
        for one in inner:
            if tag is None:
                yield from leaves(one, f"{here}.")
            else:
                value = get_args(one.model_fields[tag].annotation)[0]
                yield f"{here}.{tag}"
                yield from (leaf for leaf in leaves(one, f"{here}({value}).") if not leaf.endswith(f").{tag}"))


def test_every_key_of_the_schema_is_in_the_table() -> None:
    assert {*leaves(Recipe)} == {*EFFECTS}


ELSEWHERE = list(dict.fromkeys(effect for effect in EFFECTS.values() if isinstance(effect, TestedBy)))


@pytest.mark.parametrize("effect", ELSEWHERE, ids=str)
def test_tests_elsewhere_are_there(effect: TestedBy) -> None:
    module = ast.parse((ROOT / "tests" / effect.file).read_text(encoding="utf-8"))
    assert effect.name in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}


# --- the effects -----------------------------------------------------------------------------------------------


def image_content() -> dict[str, Any]:
    content = copy.deepcopy(TINY)
    content["model"]["config"]["num_hidden_layers"] = 2
    content["model"]["training"] |= {"steps": 3, "batch_size": 8}
    content["calibration"] = {"samples": 16}
    content["compression"] |= {"groups": 1, "sparsifier": {"algorithm": "gmp", "update_every": 1}}
    content["fit"] |= {"steps": 4, "batch_tokens": 32}
    steps = {"steps": 2, "learning_rate": 3e-3}
    content["quantization"]["training"] = [
        {"objective": "local", "batch_tokens": 32, **steps},
        {"objective": "distill", "batch_size": 8, **steps},
    ]
    content["evaluation"] = {"samples": 20}
    return content


def text_content(folder: Path) -> dict[str, Any]:
    """A tiny Llama with random weights; the fit is not needed for what is seen here."""
    if not (folder / "model").exists():
        tiny_language_model("llama").save_pretrained(folder / "model")
        byte_level_tokenizer().save_pretrained(folder / "model")
        lines = [f"{number} owls sleep near the {number * 7} rivers in the barn." for number in range(60)]
        (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    content = copy.deepcopy(TINY_LANGUAGE)
    content["model"] = {"source": "causal_lm", "path": str(folder / "model")}
    content["data"] = {"source": "text", "train": str(folder / "text.txt"), "context": 32}
    content["compression"] |= {"groups": 1, "sparsifier": {"algorithm": "static"}}
    content["calibration"], content["evaluation"] = {"samples": 4}, {"samples": 3}
    return content


Results = Callable[[dict[str, Any], str], dict[str, str]]


@pytest.fixture(scope="module")
def results(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """:func:`result_of` in a folder of its own, found once for each recipe and stage."""
    found: dict[str, dict[str, str]] = {}

    def result(content: dict[str, Any], stage: str) -> dict[str, str]:
        key = digest([content, stage])
        if key not in found:
            found[key] = result_of(content, stage, tmp_path_factory.mktemp("result"), shared)
        return found[key]

    return result


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs find the stages that they have in common; the tiny language model is beside it."""
    return tmp_path_factory.mktemp("every_key") / "shared"


def result_of(content: dict[str, Any], stage: str, folder: Path, shared: Path | None) -> dict[str, str]:
    """Run up to ``stage``; the hashes of what it leaves: of the export, the artefact without its recipe."""
    whole = RunFolder.stage

    def stop_after(self: RunFolder, name: str, *arguments: Any, **more: Any) -> StageResult:
        result = whole(self, name, *arguments, **more)
        if name == stage:
            raise StopRun
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "stage", stop_after)
        with pytest.raises(StopRun):
            run(parse_recipe(content, "r.yaml"), folder, Progress(), shared=shared)
    if stage == "export":
        return {path: value for path, value in hashes(folder / "artifact").items() if path != "fips.json"}
    return {path: file["sha256"] for path, file in read_json(folder / "work" / stage / "stage.json")["files"].items()}


@pytest.mark.parametrize("key", [key for key, effect in EFFECTS.items() if isinstance(effect, Changes)])
def test_another_value_leaves_another_result(key: str, shared: Path, results: Results) -> None:
    effect = EFFECTS[key]
    assert isinstance(effect, Changes)
    content = text_content(shared.parent) if effect.text else image_content()
    for path, value in effect.beside.items():
        set_key(content, path, copy.deepcopy(value), "beside")
    changed = copy.deepcopy(content)
    set_key(changed, effect.key or _plain(key), effect.value, "changed")
    stage = effect.seen_in
    before = "qat/2-distill" if stage == "qat/2-task" else stage
    expected = results(content, before)
    assert expected
    assert results(changed, stage) != expected


@pytest.mark.parametrize("key", [key for key, effect in EFFECTS.items() if isinstance(effect, Batches)])
def test_batches_have_the_size_that_is_given(
    key: str, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    effect = EFFECTS[key]
    assert isinstance(effect, Batches)
    sizes: list[int] = []

    def listening(whole: Callable[..., Any]) -> Callable[..., Any]:
        def batch(self: Any, indices: Any) -> Any:
            sizes.append(len(indices))
            return whole(self, indices)

        return batch

    content = image_content()
    result_of(content, effect.seen_in, tmp_path / "before", shared)  # so that the model is there
    set_key(content, key, effect.value, "changed")
    for split in (TensorSplit, EncodedSplit):
        monkeypatch.setattr(split, "batch", listening(split.batch))
    result_of(content, effect.seen_in, tmp_path / "after", shared)
    wanted = content[key.partition(".")[0]]["samples"]
    expected = [effect.value] * (wanted // effect.value) + [wanted % effect.value]
    assert sizes[-len(expected) :] == expected  # after whole splits, which the plan reads


def _plain(key: str) -> str:
    """The key without what tells the sections that it may hold apart."""
    return ".".join(part.partition("(")[0] for part in key.split("."))


# --- keys that are handed on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["pretrained", "causal_lm"])
def test_a_revision_is_passed_to_the_hub(source: str) -> None:
    asked: list[str] = []

    def load(path: str, *, revision: str, **_: Any) -> None:
        asked.append(revision)
        raise OSError("the hub is elsewhere")

    image = PretrainedModel(source="pretrained", path="someone/model", revision="v2")
    language = CausalLanguageModel(source="causal_lm", path="someone/model", revision="v2")
    ask = partial(image_classifier._from_hub, image) if source == "pretrained" else causal_lm._Source.of(language).load
    with pytest.raises(InputError, match="the hub is elsewhere"):
        ask(load)
    assert asked == ["v2"]


@pytest.mark.parametrize("source", ["pretrained", "causal_lm"])
def test_a_revision_of_a_folder_is_refused(source: str, tmp_path: Path) -> None:
    """Nobody would read it."""
    content = text_content(tmp_path) if source == "causal_lm" else image_content()
    if source == "pretrained":
        content["data"] = {"source": "image_folder", "path": str(tmp_path), "train": ".", "test": "."}
    content["model"] = {"source": source, "path": str(tmp_path), "revision": "v2"}
    with pytest.raises(InputError, match=r"model\.revision: v2: .* is a local folder, which has no revisions"):
        check_inputs(parse_recipe(content, "r.yaml"))


def test_a_head_is_trained_as_its_section_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the training of scratch models, whose keys are seen above."""
    head = Training(steps=3, batch_size=5, learning_rate=0.1, weight_decay=0.2)
    section = PackagedOnnxModel(source="packaged_onnx", package="p", file="f", image_size=14, head=head)
    given: list[Training] = []

    class Trained(Exception):  # noqa: N818
        pass

    def train(*arguments: Any, **_: Any) -> None:
        given.append(arguments[3])
        raise Trained

    features = (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    monkeypatch.setattr(image_classifier, "package_file", lambda *_: Path("f"))
    monkeypatch.setattr(image_classifier, "load_classifier", lambda *_: MagicMock())
    monkeypatch.setattr(image_classifier, "_features", lambda *_: features)
    monkeypatch.setattr(image_classifier, "train_classifier", train)
    with pytest.raises(Trained):
        image_classifier._packaged_with_head(section, MagicMock(labels=["a", "b"]), 0, Progress(), None)
    assert given == [head]
