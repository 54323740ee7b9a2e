"""``fips plan``: what it promises is what a run makes."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from causal_lm_samples import tiny_language_model
from finished_run import FinishedRun
from language_samples import byte_level_tokenizer
from manifest_samples import mlp_weights
from run_samples import TINY, language_recipe, tiny_recipe

from fips_ort.manifest import read_manifest
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.estimate import estimate
from pipeline.estimate.memory import PROCESS_BYTES
from pipeline.estimate.printing import describe, print_estimate, shortages
from pipeline.estimate.time import MOST_TOKENS, Duration, duration, sample_mlp, seconds_of_step
from pipeline.estimate.work import MLPTraining, evaluations, expectations
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
    assert estimated.mlp_bytes == pytest.approx(sum(weight.bytes for weight in mlp_weights(manifest)), rel=0.01)
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
    # Weight, gradient, AdamW's two moments and two forms for the backward pass, in float32, and a mask.
    assert estimated.group_training_bytes == (6 * 4 + 1) * (largest.rank * 32 + largest.rank * 2 * 2 * 64)


def test_memory_to_factorize_and_to_train_by_hand() -> None:
    estimated = estimate(tiny_recipe())
    dense = PROCESS_BYTES + 4 * estimated.parameters
    # Two blocks of two matrices [32, 64]: twelve numbers of 4 bytes for each entry.
    assert estimated.memory["factorize the largest group"] == dense + 48 * 4 * 32 * 64
    entries = 16 * (32 + 4 * 64) + 16 * (32 + 2 * 64)
    rest = 4 * (estimated.parameters - estimated.mlp_parameters) + estimated.rest_bytes
    tokens = 128 * 2 * 4 * (4 * 32 + 6 * 64)
    assert estimated.memory["train the largest group"] == (
        dense + rest + 5 * entries + estimated.group_training_bytes + tokens
    )


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


# --- work and time -----------------------------------------------------------------------------------------------

FORWARD = 3 * (5 * (4 * 2 * 32 * 32 + 2 * 2 * 32 * 64) + 2 * 2 * 5 * 5 * 32) + 4 * 2 * 3 * 16 * 32 + 2 * 32 * 10
"""Operations of the tiny classifier for an image of four patches, five tokens with the class: attention's matrices,
MLPs and products of five with five tokens in three blocks, then the patches, then the classifier."""


def test_work_by_hand() -> None:
    work = estimate(tiny_recipe()).work
    assert work.dense_training == 3 * FORWARD * 60 * 64
    assert work.passes == (128 + 7 * 200) * FORWARD  # calibration, and seven forms on the test samples
    # Rank 16: x U and V'U of two blocks and of one, and the projections of 4 and of 2 matrices.
    per_token = 3 * 2 * 16 * ((2 * 2 * 32 + 4 * 64) + (2 * 32 + 2 * 64))
    dense_per_token = 2 * 3 * 2 * 32 * 64
    local = {"others": 0, "tokens": 128, "mlps": 128 * per_token, "precision": "float32"}
    assert work.training == (
        MLPTraining(key="fit", steps=20, quantized=False, **local),
        MLPTraining(key="quantization.training.0", steps=10, quantized=True, **local),
        MLPTraining(
            key="quantization.training.1",
            steps=5,
            tokens=32 * 5,
            mlps=32 * 5 * per_token,
            others=3 * 32 * (FORWARD - 5 * dense_per_token) + 32 * FORWARD,
            quantized=True,
            precision="float32",
        ),
    )


def test_images_are_trained_in_the_precision_of_the_recipe() -> None:
    finetune = {"objective": "task", "steps": 5, "precision": "bfloat16"}
    precisions = {part.key: part.precision for part in estimate(tiny_recipe(finetune=finetune)).work.training}
    assert precisions["finetune"] == "bfloat16"
    assert precisions["quantization.training.1"] == "float32"


def test_evaluations_are_those_of_a_run(finished_run: FinishedRun) -> None:
    work = finished_run.folder / "work"
    forms = [path for folder in ("evaluate", "validate") for path in (work / folder).iterdir() if path.is_dir()]
    assert evaluations(tiny_recipe()) == len(forms) == 7


def test_allocation_passes_over_samples_with_every_choice() -> None:
    allocate = {"target": 3.0, "budgets": [0.6, 0.5], "sparsities": [0.5, 0.6, 0.7], "samples": 4}
    with_choices, without = (estimate(tiny_recipe(**more)).work for more in ({"allocate": allocate}, {}))
    assert with_choices.passes - without.passes == 6 * 2 * 4 * FORWARD


def test_time_is_work_by_what_a_step_takes() -> None:
    recipe = tiny_recipe()
    estimated = estimate(recipe)
    timed: list[tuple[bool, bool, int, torch.dtype]] = []

    def seconds(mlp: FactorizedMLP, tokens: int, dtype: torch.dtype) -> float:
        quantized = mlp.projection("fc1").quantizer is not None
        timed.append((mlp.basis is not None, quantized, tokens, dtype))
        return 1e-3 * (3 if quantized else 2 if mlp.basis is not None else 1)

    lasts = duration(recipe, estimated.plan, estimated.work, seconds)
    assert timed == [
        (False, False, MOST_TOKENS, torch.float32),
        (True, False, 128, torch.float32),
        (True, True, 128, torch.float32),
        (True, True, 160, torch.float32),
        (False, False, 160, torch.float32),
    ]
    dense_step, step = 3 * 2 * 2 * 32 * 64, 3 * 2 * 16 * (2 * 32 + 2 * 64)
    fit, local, distill = estimated.work.training
    assert lasts.dense_training == pytest.approx(1e-3 * estimated.work.dense_training / (MOST_TOKENS * dense_step))
    assert lasts.passes == pytest.approx(1e-3 * estimated.work.passes / (MOST_TOKENS * dense_step))
    assert lasts.training == {
        "fit": pytest.approx(20 * 2e-3 * fit.mlps / (128 * step)),
        "quantization.training.0": pytest.approx(10 * 3e-3 * local.mlps / (128 * step)),
        "quantization.training.1": pytest.approx(
            5 * (3e-3 * distill.mlps / (160 * step) + 1e-3 * distill.others / (160 * dense_step))
        ),
    }
    assert lasts.least == lasts.dense_training + lasts.passes + sum(lasts.training.values()) + lasts.delivery


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_timed_step_trains_an_mlp_of_the_recipe(quantized: bool, dtype: torch.dtype) -> None:
    recipe = tiny_recipe()
    mlp = sample_mlp(recipe, estimate(recipe).plan.groups[0], quantized=quantized)
    shapes = {name: tuple(factor.weight.shape) for name, factor in mlp.projections.items()}
    assert shapes == {"fc1": (64, 16), "fc2": (16, 64)}
    assert mlp.basis is not None
    before = [factor.weight.detach().clone() for factor in (mlp.basis, *mlp.projections.values())]
    assert 0 < seconds_of_step(mlp, 8, dtype) < 10
    for factor, weight in zip((mlp.basis, *mlp.projections.values()), before, strict=True):
        assert not torch.equal(factor.weight, weight)
    gains = mlp.basis.quantizer.log_gain.abs().max() if mlp.basis.quantizer else None
    assert (gains is not None and float(gains.detach()) > 0) == quantized


def test_time_is_told_by_what_takes_it() -> None:
    lasts = Duration(dense_training=60.0, passes=0.0, training={"fit": 30.0}, delivery=30.0)
    assert describe(lasts) == (
        "at least 2.0 minutes here, by steps that were timed (the dense model's training 1.0, fit 0.5, delivery 0.5); "
        "expect up to 3.0"
    )


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
    lines = "".join(f'{{"text": "the cat sleeps {number}"}}\n' for number in range(40))
    (tmp_path / "test.jsonl").write_text(lines, encoding="utf-8")
    return language_recipe(model, tmp_path)


def test_language_model_needs_no_weights(language: Recipe) -> None:
    assert isinstance(language.data, LocalTextData)
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


def test_work_of_a_language_model(language: Recipe) -> None:
    work = estimate(language).work
    distill = work.training[-1]
    assert (distill.tokens, distill.precision) == (8 * 32, "bfloat16")
    # Two groups of two blocks of rank 16, three projections of 64 columns each.
    assert distill.mlps == 2 * 3 * 2 * 8 * 32 * 16 * (2 * 2 * 32 + 2 * 3 * 64)
    logits = 2 * 32 * 265  # of a token
    body, remainder = divmod(work.passes - 6 * 10 * 32 * logits, 24 + 6 * 10)
    assert remainder == 0
    outside = body - 32 * 2 * 4 * 3 * 32 * 64
    assert distill.others == 8 * (3 * outside + body + 5 * 32 * logits)
    quantization = language.quantization.model_dump(mode="json")
    quantization["training"][-1]["objective"] = "task"
    by_text = estimate(parse_recipe(language.model_dump(mode="json") | {"quantization": quantization}, "")).work
    assert by_text.training[-1].others == 8 * (3 * outside + 3 * 31 * logits)
    content = language.model_dump(mode="json")
    content["evaluation"]["stride"] = 10
    overlapping = estimate(parse_recipe(content, "r.yaml")).work
    assert overlapping.passes - work.passes == 3 * 6 * 10 * (body + 32 * logits)
    # Tiers, and a size of the vocabulary, ask the model what it expects, on 16,384 tokens each.
    content = language.model_dump(mode="json")
    content["quantization"]["rest"]["embedding_bits"] = [{"bits": 4, "tokens": 9}, {"bits": 2}]
    tiers = estimate(parse_recipe(content, "r.yaml")).work
    assert tiers.passes - work.passes == 512 * (body + 32 * logits)
    assert expectations(parse_recipe(content, "r.yaml")) == 1
    assert expectations(parse_recipe(content | {"vocabulary": {"keep": 265}}, "r.yaml")) == 2
    assert expectations(parse_recipe(content | {"vocabulary": {"scripts": ["Latin"]}}, "r.yaml")) == 1


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
    estimated = estimate(parse_recipe(content, "r.yaml"))
    key = "quantization.rest.block_size"
    assert [str(row) for row in estimated.fitted] == [
        f"{key}: 64 does not divide the input features 32; its rows are stored in blocks of 32"
    ]
    table, attention = 265 * 32, 4 * (2 * 32 * 32 + 2 * 16 * 32)
    others = estimated.parameters - estimated.mlp_parameters - table - attention
    assert 16 * estimated.rest_bytes == 16 * 2 * others + 9 * (table + attention)  # 4.5 bits each
    content["quantization"]["rest"] |= {"linear_bits": None, "embedding_bits": None}
    assert estimate(parse_recipe(content, "r.yaml")).fitted == ()


def change_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 20}, r"model\.path: .*: config\.json: head_dim: 20: cannot be exported to ONNX"),
        (
            {"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            r"model\.path: .*: config\.json: rope_parameters\.full_attention\.rope_type: 'dynamic' cannot be exported",
        ),
        ({"intermediate_size": -4}, r"its configuration does not fit together, .* negative dimension -4"),
        ({"vocab_size": 200}, r"the model's table of tokens has 200 rows"),
        ({"max_position_embeddings": 31}, r"config\.json: max_position_embeddings: 31: too short"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: gptq: the weights are already"),
    ],
)
def test_models_that_would_not_come_out_are_refused(
    language: Recipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(tmp_path / "model", **changes)
    with pytest.raises(InputError, match=message):
        estimate(language)


def test_texts_longer_than_the_model_takes_are_refused(language: Recipe, tmp_path: Path) -> None:
    change_config(tmp_path / "model", max_position_embeddings=40)
    estimate(language)
    content = language.model_dump(mode="json")
    content["data"]["context"] = 41
    with pytest.raises(InputError, match=r"data\.context: 41 is more than the 40 tokens .*max_position_embeddings: 40"):
        estimate(parse_recipe(content, "r.yaml"))
    change_config(tmp_path / "model", max_position_embeddings=100_000)
    content["data"]["context"] = 8193
    content["calibration"]["samples"] = content["evaluation"]["samples"] = 4
    for file in ("train.txt", "test.jsonl"):
        lines = (f'{{"text": "the cat of {file} sleeps {number}"}}\n' for number in range(3000))
        (tmp_path / file).write_text("".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.context: 8193 is more than the 8192 tokens .*no model is exported"):
        estimate(parse_recipe(content, "r.yaml"))


def test_model_without_a_tokenizer_is_refused(language: Recipe, tmp_path: Path) -> None:
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"model\.path: .*: cannot load its tokenizer: there is none; put tok"):
        estimate(language)


def test_what_was_taken_of_a_model_is_printed(
    language: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert estimate(language).notes == ()
    content = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    whole = {"model_type": "gemma3", "text_config": content, "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    estimated = estimate(language)
    assert estimated.mlp_parameters == 4 * 3 * 32 * 64
    print_estimate(language, estimated)
    assert "note: The model's language part was taken (gemma3_text of gemma3)" in " ".join(
        capsys.readouterr().out.split()
    )


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


@pytest.mark.parametrize(
    ("vocabulary", "kept", "dropped"), [({"scripts": ["Latin"]}, 265, 0), ({"keep": 261}, 261, 4)]
)
def test_plan_with_a_cut_vocabulary(
    language: Recipe, capsys: pytest.CaptureFixture[str], vocabulary: dict[str, Any], kept: int, dropped: int
) -> None:
    whole = estimate(language)
    recipe = parse_recipe({**language.model_dump(mode="json"), "vocabulary": vocabulary}, "r.yaml")
    estimated = estimate(recipe)
    print_estimate(recipe, estimated)
    out = " ".join(capsys.readouterr().out.split())
    cut = estimated.vocabulary
    assert cut is not None
    assert cut.tokens == kept
    # One of the twelve tokens of a line is "the", which does not fit together with "th".
    assert cut.respelled is not None
    assert cut.respelled[0] == pytest.approx(1 / 12 if dropped else 0.0, abs=1e-3)
    assert f"vocabulary {kept} tokens, tokenizer.json {cut.tokenizer_bytes:,} bytes; " in out
    train, test = (f"{100 * part:.2f} %" for part in cut.respelled)
    assert f"{train} of the training text's tokens and {test} of the test text's are spelled in others" in out
    assert estimated.parameters == whole.parameters - 32 * dropped
    assert estimated.dense_parameters == whole.parameters
    assert f"% of {2 * whole.parameters:,} in float16" in out
    assert estimated.memory["validate the artefact"] > whole.memory["validate the artefact"]


def test_a_vocabulary_that_cannot_be_cut_is_refused_early(language: Recipe) -> None:
    for vocabulary, said in (
        ({"keep": 200}, "vocabulary.keep: 200: 260 tokens stay in any case: single bytes, special and added tokens"),
        ({"scripts": ["Han"], "keep": 100}, "give at least 260"),
    ):
        recipe = parse_recipe({**language.model_dump(mode="json"), "vocabulary": vocabulary}, "r.yaml")
        with pytest.raises(InputError, match=re.escape(said)):
            estimate(recipe)


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
