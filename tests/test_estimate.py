"""``fips plan``: what it promises is what a run makes."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from causal_lm_samples import tiny_language_model
from finished_run import FinishedRun
from language_samples import byte_level_tokenizer
from run_samples import TINY, language_recipe, tiny_recipe

from fips_ort.manifest import read_manifest
from pipeline.estimate import PROCESS_BYTES, estimate, print_estimate, shortages
from pipeline.plumbing.errors import InputError
from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import LocalTextData, Recipe


def test_plan_is_what_the_run_made(finished_run: FinishedRun) -> None:
    estimated = estimate(tiny_recipe())
    report = json.loads((finished_run.folder / "report.json").read_text(encoding="utf-8"))
    assert estimated.parameters == report["model"]["parameters"]
    assert estimated.mlp_parameters == report["bytes"]["mlp_dense_float16"] // 2
    made = {group["name"]: (group["blocks"], group["rank"], group["columns"]) for group in report["groups"]}
    assert made == {
        group.name: ([site.block for site in group.sites], group.rank, group.columns) for group in estimated.plan.groups
    }


def test_bytes_are_what_the_run_stored(finished_run: FinishedRun) -> None:
    estimated = estimate(tiny_recipe())
    manifest = read_manifest(finished_run.folder / "artifact")
    assert estimated.mlp_bytes == pytest.approx(sum(weight.bytes for weight in manifest.weights), rel=0.01)
    stored = sum(tensor.bytes for tensor in manifest.tensors)
    # Shapes and scalars of the graph, and biases in float32, come on top.
    assert estimated.artifact_bytes == pytest.approx(stored, rel=0.05)


def test_activations_are_what_calibration_wrote(finished_run: FinishedRun) -> None:
    files = sorted((finished_run.folder / "work" / "calibrate").glob("*.npy"))
    assert len(files) == 2 * 3
    written = sum(np.load(file, mmap_mode="r").nbytes for file in files)
    assert 128 * estimate(tiny_recipe()).activation_bytes_per_sample == written


def test_memory_of_training() -> None:
    estimated = estimate(tiny_recipe())
    largest = estimated.plan.groups[0]
    assert estimated.factor_bytes == 16 * (largest.rank * 32 + largest.rank * 2 * 2 * 64)


def test_memory_counts_every_stage() -> None:
    memory = estimate(tiny_recipe()).memory
    assert list(memory) == [
        "factorize the largest group", "train the largest group", "validate the artefact", "train end to end"
    ]  # fmt: skip
    assert min(memory.values()) > PROCESS_BYTES
    without = copy.deepcopy(TINY["quantization"])
    without["training"] = []
    assert "train end to end" not in estimate(tiny_recipe(quantization=without)).memory


def test_more_bits_take_more_bytes() -> None:
    sizes = [estimate(tiny_recipe(quantization=scheme(bits))).mlp_bytes for bits in (2, 3, 4)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


@pytest.mark.parametrize(
    ("rest", "bits_each"), [({"weights": "float32"}, 32), ({"weights": "float16"}, 16)]
)
def test_rest_of_the_model(rest: dict[str, Any], bits_each: int) -> None:
    estimated = estimate(tiny_recipe(quantization=TINY["quantization"] | {"rest": rest}))
    assert 8 * estimated.rest_bytes == bits_each * (estimated.parameters - estimated.mlp_parameters)


def test_rest_with_quantized_linears() -> None:
    rest = {"weights": "float16", "linear_bits": 4, "block_size": 16}
    estimated = estimate(tiny_recipe(quantization=TINY["quantization"] | {"rest": rest}))
    attention = 3 * 4 * 32 * 32
    others = estimated.parameters - estimated.mlp_parameters - attention
    assert estimated.rest_bytes == 2 * others + attention // 2 + 2 * attention // 16  # scales in float16


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/train: no such folder"):
        estimate(tiny_recipe(data={"source": "image_folder", "path": str(tmp_path / "nowhere")}))


# --- language models -------------------------------------------------------------------------------------------


@pytest.fixture
def language(tmp_path: Path) -> Recipe:
    model = tmp_path / "model"
    tiny_language_model("gemma3", num_hidden_layers=4, layer_types=["full_attention"] * 4).save_pretrained(model)
    byte_level_tokenizer().save_pretrained(model)
    (tmp_path / "train.txt").write_text("the dog waits\n" * 200, encoding="utf-8")
    (tmp_path / "test.jsonl").write_text('{"text": "the cat sleeps"}\n' * 40, encoding="utf-8")
    return language_recipe(model, tmp_path)


def test_language_model_needs_no_weights(language: Recipe) -> None:
    """Also, windows are counted without text: it is not even read."""
    assert isinstance(language.data, LocalTextData)
    Path(language.data.test or "").write_text("", encoding="utf-8")
    (Path(language.data.train).parent / "model" / "model.safetensors").unlink()
    estimated = estimate(language)
    assert estimated.mlp_parameters == 4 * 3 * 32 * 64
    # Inputs and outputs of width 32 in float32, of each of four blocks for each of 32 tokens.
    assert estimated.activation_bytes_per_sample == 2 * 4 * 32 * 4 * 32
    assert [group.rank for group in estimated.plan.groups] == [16, 16]
    assert set(estimated.memory) == {
        "factorize the largest group",
        "train the largest group",
        "validate the artefact",
        "find starting codes",
        "find starting codes outside the MLPs",
        "train end to end",
    }


def test_rest_of_a_language_model(language: Recipe) -> None:
    estimated = estimate(language)
    table, attention = 265 * 32, 4 * (2 * 32 * 32 + 2 * 16 * 32)
    others = estimated.parameters - estimated.mlp_parameters - table - attention  # norms
    # The table is tied: stored once. Four bits, and a scale of 16 bits for 16 weights.
    assert estimated.rest_bytes == 2 * others + 5 * (table + attention) // 8


def test_training_the_rest_takes_memory(language: Recipe) -> None:
    content = language.model_dump(mode="json")
    assert content["quantization"]["training"][-1].pop("train_rest") is True
    without = estimate(parse_recipe(content, "r.yaml")).memory["train end to end"]
    assert estimate(language).memory["train end to end"] - without == 9 * 4 * (2 * 32 * 32 + 2 * 16 * 32)


def test_blocks_that_do_not_divide_what_lies_outside_the_mlps(language: Recipe) -> None:
    content = language.model_dump(mode="json")
    content["quantization"]["rest"]["block_size"] = 64
    with pytest.raises(InputError, match=r"rest\.block_size: 64 does not .*layers\.0\.self_attn\.q_proj: 32, .* and"):
        estimate(parse_recipe(content, "r.yaml"))
    content["quantization"]["rest"]["linear_bits"] = None
    with pytest.raises(InputError, match=r"rest\.block_size: 64 does not divide the inputs of token table: 32; take"):
        estimate(parse_recipe(content, "r.yaml"))
    content["quantization"]["rest"]["embedding_bits"] = None
    assert estimate(parse_recipe(content, "r.yaml")).rest_bytes > 0


def test_missing_text_is_named(language: Recipe, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"data\.test: .*test\.jsonl: no such file"):
        estimate(language)


def test_weights_in_float32_are_mapped(language: Recipe, tmp_path: Path) -> None:
    estimated = estimate(language)
    assert estimated.mapped_bytes == 4 * estimated.parameters
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"float32"', '"bfloat16"'), encoding="utf-8")
    assert estimate(language).mapped_bytes == 0


def test_plan_of_a_language_model(language: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    estimated = estimate(language)
    print_estimate(language, estimated)
    out = " ".join(capsys.readouterr().out.split())
    assert "disk for calibration 32,768 bytes per window of 32 tokens, 786,432 in all" in out
    when, peak = estimated.peak_memory
    assert f"about {peak:,} bytes, most of it to {when}: {4 * estimated.parameters:,} for the dense model" in out
    assert f"so {peak - estimated.mapped_bytes:,} can do" in out
    assert "warning" not in out


def test_plan_warns_where_the_machine_is_too_small(
    language: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    estimated = estimate(language)
    _, peak = estimated.peak_memory
    for total, warned in ((peak - estimated.mapped_bytes, False), (peak - estimated.mapped_bytes - 1, True)):
        monkeypatch.setattr("psutil.virtual_memory", lambda total=total: SimpleNamespace(total=total))
        assert bool(shortages(estimated, 24)) == warned
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=786_431))
    print_estimate(language, estimated)
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: this machine has" in out
    assert "warning: 786,431 bytes are free on the disk of this folder, and calibration takes 786,432" in out


def scheme(bits: int) -> dict[str, Any]:
    factor = {"bits": bits, "block_size": 16}
    return {"basis": factor, "projections": factor}
