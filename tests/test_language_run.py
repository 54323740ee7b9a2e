"""Whole runs of tiny language models: what the report says is what the artefact does, in every way to run it."""

import json
import math
import random
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lm_samples import KINDS, WINDOW, tiny_language_model
from language_samples import SPECIAL, byte_level_tokenizer
from manifest_samples import mlp_weights
from run_samples import (
    KillAt,
    artifact_hashes,
    language_recipe,
    quantization_of_language,
    run_in_process,
    stages_run_for,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    SiglipVisionConfig,
)

from exporters.packed_model import load_packed_model
from fips_ort.manifest import read_manifest
from fips_ort.packed import dequantize
from fips_ort.validate import validate
from pipeline import cli
from pipeline.compression.factors import install, named_factors
from pipeline.evaluate_artifact import evaluate_artifact
from pipeline.evaluation import text_speed
from pipeline.evaluation.genai_load import GenaiLoad
from pipeline.evaluation.measurements import NATIVE
from pipeline.generate import greedy_tokens
from pipeline.plumbing.files import read_json
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.records import read_record
from pipeline.recipe.plan import make_plan
from pipeline.recipe.schema import Recipe
from pipeline.report.schema import Report
from pipeline.run import run
from pipeline.stages.quantize import QuantizationInputs, open_base, restore_quantized
from pipeline.stages.results import SavedFactors
from pipeline.tasks import make_task

STAGES = (
    "model",
    "evaluate/dense",
    "calibrate",
    "factorize/group_0",
    "factorize/group_1",
    "evaluate/factorized",
    "fit/group_0",
    "fit/group_1",
    "evaluate/fitted",
    "qat/rest",
    "qat/0-start",
    "evaluate/rounded",
    "qat/1-local",
    "qat/2-distill",
    "evaluate/qat",
    "pack",
    "export",
    "validate",
)


@pytest.fixture(autouse=True, scope="module")
def short_bench() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_speed, "GENERATED_TOKENS", 3)
        patch.setattr(text_speed, "ROUNDS", 1)
        patch.setattr(text_speed, "LOADS", 1)
        patch.setattr("pipeline.tasks.causal_lm.PROMPT_TOKENS", 8)
        yield


# --- a model that has learned something, and its text ----------------------------------------------------------


def sentences(count: int, seed: int) -> list[str]:
    """Plain sentences of few words, in which what follows is mostly given."""
    draw = random.Random(seed)
    animals, places, doings = ["the cat", "a dog", "the owl"], ["hill", "river", "barn"], ["sleeps", "hunts", "waits"]
    return [
        f"{draw.choice(animals)} {draw.choice(doings)} near the {draw.choice(places)} in the {draw.choice(places)}."
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.txt`` and ``test.jsonl``."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("\n".join(sentences(120, 0)), encoding="utf-8")
    lines = (json.dumps({"text": sentence}) for sentence in sentences(30, 1))
    (folder / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of four layers, three of which look back 16 tokens only, trained on sentences for a few seconds."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_language_model(
        "gemma3", num_hidden_layers=4, layer_types=kinds, initializer_range=0.1, hidden_size=32, intermediate_size=64
    )
    tokenizer = byte_level_tokenizer()
    stream = torch.tensor(tokenizer("\n".join(sentences(120, 0)))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        starts = torch.randint(len(stream) - 48, (8, 1), generator=generator)
        batch = stream[starts + torch.arange(48)]
        batch[:, 0] = tokenizer.bos_token_id
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
    return save(model.eval(), tmp_path_factory.mktemp("gemma"))


@pytest.fixture
def no_load_rss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of loading is measured in new processes, seconds each: once, in the first run, is enough."""
    monkeypatch.setattr(text_speed, "measure_load", lambda _: GenaiLoad(10**8, 10**6, 2 * 10**6, 0.5))
    monkeypatch.setattr("pipeline.tasks.causal_lm.measure_memory", lambda _: {"load_rss_bytes": 1, "peak_rss_bytes": 1})


# --- FiPS ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageRun:
    """A finished run; not to be changed (copy it)."""

    recipe: Recipe
    folder: Path
    report: dict[str, Any]

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"


def finish(recipe: Recipe, folder: Path) -> LanguageRun:
    run(recipe, folder, Progress())
    read_record(Report, folder / "report.json")  # raises if it contradicts itself
    return LanguageRun(recipe, folder, read_json(folder / "report.json"))


@pytest.fixture(scope="module")
def finished(gemma: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageRun:
    """Bitmap, GPTQ, local training and distillation in bfloat16."""
    return finish(language_recipe(gemma, text), tmp_path_factory.mktemp("finished"))


def fake_quantized(done: LanguageRun) -> tuple[nn.Module, list[Any]]:
    """The fake-quantized model that the artefact was made from, and its MLPs."""
    task = make_task(done.recipe)
    work = done.folder / "work"
    task.open_dense(work / "model")
    plan = make_plan(done.recipe, task.sites)
    base = task.open_rest(work / "qat" / "rest")
    inputs = QuantizationInputs(task, base, plan, SavedFactors({}, ()), work / "calibrate")
    last = max((work / "qat").glob("[0-9]-*"))
    mlps = restore_quantized(inputs, work / "qat" / "0-start", last)
    return install(open_base(inputs, last), mlps).eval(), mlps


def test_report_agrees_with_artefact(finished: LanguageRun) -> None:
    report = finished.report
    manifest = read_manifest(finished.artifact)
    size = sum(path.stat().st_size for path in finished.artifact.rglob("*") if path.is_file())
    assert report["bytes"]["artifact"] == size == sum(report["bytes"]["by_part"].values())
    assert report["bytes"]["mlp_stored"] == sum(weight.bytes for weight in mlp_weights(manifest))
    assert [group["blocks"] for group in report["groups"]] == [[0, 1], [2, 3]]
    mlp = 3 * 32 * 64
    assert report["bytes"]["mlp_dense_float16"] == 2 * 4 * mlp
    assert report["bits_per_weight"]["stored"] == 8 * report["bytes"]["mlp_stored"] / (4 * mlp)
    assert [check.passed for check in validate(finished.artifact)] == [True] * 4
    rows = read_json(finished.folder / "work" / "export" / "audit.json")
    assert rows
    assert all(row["bytes"] == row["promised"] for row in rows)
    assert sorted(report["seconds"]) == sorted((*STAGES, "bench"))


def test_perplexity_of_the_artefact_is_that_of_the_fake_quantized_model(finished: LanguageRun) -> None:
    quality, parity = finished.report["quality"], finished.report["parity"]
    assert quality["dense"] < 20  # of 265 tokens: it has learned something
    assert quality["qat"] < 2 * quality["dense"]
    assert quality["onnx_native"] == pytest.approx(quality["qat"], rel=1e-4)
    assert (quality["windows"], quality["context"], quality["tokens"]) == (10, 32, 10 * 31)
    assert parity["same_predictions"] is True
    for pair in ("native_vs_torch", "portable_vs_torch", "native_vs_portable"):
        assert parity[pair]["relative"] <= parity["tolerance"] == 1e-3
    divergence = finished.report["divergence"]
    assert 0 < divergence["kl_mean"] <= divergence["kl_p99"]
    assert divergence["same_top1"] > 0.5


def test_training_brings_back_what_rounding_cost(finished: LanguageRun) -> None:
    quality, errors = finished.report["quality"], finished.report["reconstruction_error"]
    assert quality["qat"] < quality["rounded"]
    for stage in ("factorized", "fitted", "rounded", "qat"):
        assert sorted(errors[stage]) == ["0", "1", "2", "3"]
    for block in ("0", "1", "2", "3"):
        assert errors["rounded"][block] > errors["fitted"][block]


def test_codes_are_the_fake_quantized_numbers(finished: LanguageRun) -> None:
    _, mlps = fake_quantized(finished)
    packed = load_packed_model(finished.folder / "work" / "pack" / "packed.safetensors")
    stored = {f"{group}.basis": weight for group, weight in packed.bases.items()}
    for mlp in packed.mlps:
        stored |= {f"block_{mlp.block}.{name}": linear.weight for name, linear in mlp.linears.items()}
    factors = named_factors(mlps)
    assert stored.keys() == factors.keys()
    for name, factor in factors.items():
        with torch.no_grad():
            assert torch.equal(torch.from_numpy(dequantize(stored[name])), factor()), name


@pytest.mark.parametrize("length", [1, 7, WINDOW, WINDOW + 5, 3 * WINDOW])
def test_greedy_tokens_are_those_of_pytorch(finished: LanguageRun, length: int) -> None:
    """Prompts within and past the sliding window; most go past it while tokens are generated."""
    model, _ = fake_quantized(finished)
    tokenizer = byte_level_tokenizer()
    for seed in (2, 3, 4):
        prompt = tokenizer(" ".join(sentences(6, seed)))["input_ids"][:length]
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(2 * WINDOW):
                tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert SPECIAL.index("<eos>") not in tokens
        assert greedy_tokens(finished.artifact, prompt, 2 * WINDOW) == tokens[length:]


def test_artefact_evaluates_to_the_same_number(finished: LanguageRun) -> None:
    quality = finished.report["quality"]
    value, error = quality["onnx_native"], quality["standard_error"]["onnx_native"]
    line = evaluate_artifact(finished.artifact, Progress())
    bits = quality["bits_per_byte"]["onnx_native"]
    expected = f"perplexity {value:.3f} ± {error:.3f}, {bits:.4f} bits per byte (310 tokens, context 32, "
    assert line.startswith(expected)


def test_generate_prints_text(
    finished: LanguageRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(finished.artifact), "--prompt", "the cat sl", "--max-new-tokens", "20"]
    monkeypatch.setattr(sys, "argv", ["fips", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out, err = capfd.readouterr()
    assert err == ""
    tokenizer = byte_level_tokenizer()
    expected = greedy_tokens(finished.artifact, tokenizer("the cat sl")["input_ids"], 20)
    assert out == tokenizer.decode(expected) + "\n"
    assert re.search("[a-z]{3}", out)


@pytest.mark.usefixtures("no_load_rss")
def test_bench_measures_other_folders_in_the_same_run(
    finished: LanguageRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(finished.artifact), "--threads", "1", "--beside"]
    other = tmp_path / "other"
    monkeypatch.setattr(sys, "argv", ["fips", *arguments, str(other)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert str(other) in capfd.readouterr().err

    monkeypatch.setattr(sys, "argv", ["fips", *arguments, str(other), "--batch", "1", "--seconds", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert f"--batch, --seconds: {finished.artifact} is a language model" in capfd.readouterr().err.replace("\n", " ")

    monkeypatch.setattr(sys, "argv", ["fips", *arguments, str(other)])
    shutil.copytree(finished.artifact, other)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    lines = capfd.readouterr().out.splitlines()
    for name in (NATIVE, *text_speed.INT4_BLOCKS, str(other)):
        figures = [float(figure) for figure in next(line for line in lines if name in line).split()[-8:]]
        assert figures[3:6] == [0.5, 1.0, 2.0]
        assert all(figure > 0 for figure in figures[:3])
    assert any("100.0 MB of a process that has imported" in line for line in lines)


def test_killed_and_resumed_gives_the_same(finished: LanguageRun, tmp_path: Path) -> None:
    points = [
        KillAt(line="qat/rest"),
        KillAt(task="starting codes", step=1),
        KillAt(line="evaluate/rounded"),
        KillAt(task="fit group_1", step=9),
        KillAt(task="QAT 1, local, group_0", step=3),
        KillAt(task="QAT 2, distill", step=4),
        KillAt(line="export"),
    ]
    for point in sorted(points, key=lambda point: point.line != "qat/rest"):
        run_in_process(finished.recipe, tmp_path, point)
    assert run_in_process(finished.recipe, tmp_path, KillAt()) == 0
    assert artifact_hashes(tmp_path) == artifact_hashes(finished.folder)


def test_finished_run_is_reused(finished: LanguageRun) -> None:
    assert stages_run_for(finished.recipe, finished.folder) == []


# --- other patterns, bits and methods --------------------------------------------------------------------------


def assert_sound(done: LanguageRun) -> None:
    """The artefact is whole and does what the fake-quantized model does."""
    quality, parity = done.report["quality"], done.report["parity"]
    assert [check.passed for check in validate(done.artifact)] == [True] * 4
    assert quality["onnx_native"] == pytest.approx(quality["qat"], rel=1e-3)
    assert parity["same_predictions"] is True
    assert parity["native_vs_torch"]["relative"] <= 1e-3
    line = evaluate_artifact(done.artifact, Progress())
    assert line.startswith(f"perplexity {quality['onnx_native']:.3f} ± ")


@pytest.mark.usefixtures("no_load_rss")
def test_cut_vocabulary(gemma: Path, text: Path, tmp_path: Path) -> None:
    """Four tokens of the tokenizer are more than single bytes; two stay, and what the others spelled is learned."""
    done = finish(
        language_recipe(
            gemma,
            text,
            vocabulary={"scripts": ["Latin"], "keep": 263},
            fit=None,
            compression={"groups": 2, "budget": 1.0, "pattern": "dense"},
            quantization=quantization_of_language(training=[distillation("float32", steps=40)]),
        ),
        tmp_path,
    )
    quality, artifact = done.report["quality"], done.artifact
    assert [check.passed for check in validate(artifact)] == [True] * 4
    assert quality["onnx_native"] == pytest.approx(quality["qat"], rel=1e-3)
    assert quality["qat"] < 0.95 * quality["rounded"]
    # Per token of the whole vocabulary and per byte, every stage says the same of the same text.
    for stage, bits in quality["bits_per_byte"].items():
        assert bits * quality["bytes"] == pytest.approx(math.log2(quality[stage]) * quality["tokens"], rel=1e-6)
    assert done.report["divergence"]["tokens"] < quality["tokens"]
    cut = done.report["data"]["vocabulary"]
    assert (cut["tokens"], cut["kept"]) == (265, 263)
    expected = load_file(tmp_path / "work" / "vocabulary" / "expected.safetensors")["expected"]
    assert (len(expected), float(expected.sum())) == (265, pytest.approx(1))
    assert 0 < cut["respelled"] < 0.2
    assert 0 < cut["respelled_in_test"] < 0.2
    assert any("tokens 263 are kept;" in warning for warning in done.report["warnings"])
    whole = AutoModelForCausalLM.from_pretrained(gemma)
    assert done.report["model"]["parameters"] == sum(parameter.numel() for parameter in whole.parameters())
    # All files speak of the same tokens.
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    described = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))["model"]
    assert len(tokenizer) == config["vocab_size"] == described["vocab_size"] == 263
    assert described["eos_token_id"] == tokenizer.eos_token_id
    # Its own evaluation knows its own tokens, in windows of its own.
    said = evaluate_artifact(artifact, Progress())
    bits = float(said.split(" bits per byte")[0].split(", ")[1])
    assert bits == pytest.approx(quality["bits_per_byte"]["onnx_native"], rel=0.1)
    assert said.endswith("compare bits per byte, not perplexities")
    # A text in another script works, in more tokens.
    prompt = tokenizer("the cat спит 世界")["input_ids"]
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "the cat спит 世界"
    assert len(greedy_tokens(artifact, prompt, 5)) == 5


def distillation(precision: str, steps: int = 10) -> dict[str, Any]:
    return {"objective": "distill", "steps": steps, "batch_size": 8, "learning_rate": 3e-3, "precision": precision}


@pytest.mark.usefixtures("no_load_rss")
def test_full_basis_with_allocated_bits(gemma: Path, text: Path, tmp_path: Path) -> None:
    """No fit, bits graded along the rank axis, distillation in float32, float16 linears, int8 activations."""
    quantization = quantization_of_language(
        basis={"bits": 4, "block_size": 32},
        projections={"bits": "allocate", "block_size": 16, "levels": "midrise"},
        target_stored_bits=5.0,
        training=[distillation("float32")],
        rest={"embedding_bits": 8, "block_size": 16},
    )
    compression = {"groups": 4, "budget": 1.05, "pattern": "dense"}
    recipe = language_recipe(
        gemma, text, compression=compression, fit=None, quantization=quantization, export={"accuracy_level": 4}
    )
    done = finish(recipe, tmp_path)
    quality, errors = done.report["quality"], done.report["reconstruction_error"]
    assert [check.passed for check in validate(done.artifact)] == [True] * 4
    # Int8 activations move the logits, by far less than the training of ten steps did.
    assert quality["onnx_native"] == pytest.approx(quality["qat"], rel=0.02)
    assert quality["factorized"] == pytest.approx(quality["dense"], rel=1e-4)
    assert max(errors["factorized"].values()) < 1e-6
    assert quality["qat"] < 1.05 * quality["dense"]
    assert done.report["bits_per_weight"]["stored"] <= 5.0
    weights = mlp_weights(read_manifest(done.artifact))
    widths = [tuple(weight.segments) for weight in weights if "shared_bases" not in weight.name]
    assert len(set(widths)) == 1
    assert sum(size > 0 for size in widths[0]) > 1
    assert sum(widths[0]) == 32


@pytest.fixture
def gemma_with_images(gemma: Path, tmp_path: Path) -> Path:
    """The same language model inside one that reads images too, as Gemma 3 from 4B on is published."""
    dense = Gemma3ForCausalLM.from_pretrained(gemma)
    images = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(
        text_config=dense.config.to_dict(), vision_config=images.to_dict(), mm_tokens_per_image=4
    )
    whole = Gemma3ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(dense.model.state_dict())
    return save(whole, tmp_path / "with-images")


@pytest.mark.usefixtures("no_load_rss")
def test_blocks_left_dense_are_stored_with_the_rest(
    gemma: Path, gemma_with_images: Path, text: Path, tmp_path: Path
) -> None:
    """And of a model that reads images too, the language part is taken, and said to be."""
    compression = {"groups": [[1, 3]], "budget": 0.6, "pattern": "dense"}
    done = finish(language_recipe(gemma_with_images, text, compression=compression, fit=None), tmp_path / "out")
    assert_sound(done)
    note = "The model's language part was taken (gemma3_text of gemma3)"
    assert [note in warning for warning in done.report["warnings"]] == [True]
    assert note in (done.folder / "report.md").read_text(encoding="utf-8")
    assert done.report["dense_blocks"] == [0, 2]
    model, _ = fake_quantized(done)
    dense = Gemma3ForCausalLM.from_pretrained(gemma)
    for block in (0, 2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            path = f"model.layers.{block}.mlp.{name}.weight"
            assert torch.equal(model.get_parameter(path), dense.get_parameter(path).half().float())


@pytest.mark.usefixtures("no_load_rss")
@pytest.mark.parametrize(("pattern", "algorithm"), [("1:4", "gmp"), ("2:4", "rigl")])
def test_n_of_m(gemma: Path, text: Path, tmp_path: Path, pattern: str, algorithm: str) -> None:
    block = 32 if pattern == "1:4" else 16
    compression = {
        "groups": [[0, 1], [2, 3]],
        "budget": 0.6 if pattern == "1:4" else 0.8,
        "pattern": pattern,
        "initialization": "output_aware",
        "sparsifier": {"algorithm": algorithm, "saliency": "activation", "update_every": 4},
    }
    quantization = quantization_of_language(
        basis={"bits": 4, "block_size": 16},
        projections={"bits": 3, "block_size": block, "levels": "midrise"},
        training=[distillation("bfloat16", 4)],
        rest={"linear_bits": 8, "block_size": 16},
    )
    done = finish(language_recipe(gemma, text, compression=compression, quantization=quantization), tmp_path)
    assert_sound(done)
    patterns = {weight.name: weight.pattern for weight in mlp_weights(read_manifest(done.artifact))}
    assert set(patterns.values()) == {"dense", pattern}
    assert sum(kind == "dense" for kind in patterns.values()) == 2
    assert max(done.report["reconstruction_error"]["qat"].values()) < 0.6


@pytest.mark.usefixtures("no_load_rss")
def test_dense_method_starts_better_from_gptq(gemma: Path, text: Path, tmp_path: Path) -> None:
    runs = {}
    for start in ("nearest", "gptq"):
        recipe = language_recipe(
            gemma,
            text,
            name=start,
            compression={"method": "dense", "pattern": "dense"},
            fit=None,
            quantization=quantization_of_language(
                start=start,
                basis=None,
                projections={"bits": 2, "block_size": 16, "levels": "midrise"},
                training=[distillation("bfloat16")] if start == "nearest" else [],
            ),
        )
        runs[start] = finish(recipe, tmp_path / start)
        assert_sound(runs[start])
        assert not {"factorized", "fitted"} & runs[start].report["quality"].keys()
        # Every matrix by itself: 2 bits and a scale of 16 bits for 16 values.
        assert runs[start].report["bits_per_weight"] == {"paper": 2.0, "stored": 3.0}
    nearest, gptq = (runs[start].report for start in ("nearest", "gptq"))
    assert nearest["quality"]["dense"] == gptq["quality"]["dense"]
    for block, error in gptq["reconstruction_error"]["qat"].items():
        assert error < 0.5 * nearest["reconstruction_error"]["rounded"][block]
    assert gptq["quality"]["qat"] < nearest["quality"]["qat"] < nearest["quality"]["rounded"]


# --- other architectures ---------------------------------------------------------------------------------------

RECIPES: dict[str, dict[str, Any]] = {
    "gemma2": {"compression": {"groups": 2, "budget": 1.1, "pattern": "dense"}, "fit": None},
    "llama": {
        "compression": {"groups": 1, "budget": 0.8, "pattern": "1:4", "sparsifier": {"algorithm": "static"}},
        "quantization": {"projections": {"bits": 4, "block_size": 32}},
    },
    "qwen2": {"compression": {"groups": 2, "budget": 0.8, "pattern": "2:4", "sparsifier": {"algorithm": "static"}}},
    "qwen3": {
        "compression": {"method": "dense", "pattern": "dense"},
        "fit": None,
        "quantization": {"basis": None, "start": "nearest"},
    },
    "mistral": {},
}


def test_every_architecture_has_a_run() -> None:
    assert {"gemma3", *RECIPES} == set(KINDS)  # Gemma 3 in the runs above


@pytest.mark.usefixtures("no_load_rss")
@pytest.mark.parametrize("kind", RECIPES)
def test_every_architecture(kind: str, text: Path, tmp_path: Path) -> None:
    """From random weights, with soft caps, biases, tied and untied tables, each its own kind of attention."""
    changes = dict(RECIPES[kind])
    changes["quantization"] = quantization_of_language(
        **{
            "projections": {"bits": 4, "block_size": 16},
            "training": [distillation("bfloat16", 3)],
            **changes.get("quantization", {}),
        }
    )
    model = save(tiny_language_model(kind, initializer_range=0.2), tmp_path / "model")
    done = finish(language_recipe(model, text, **changes), tmp_path / "run")
    assert_sound(done)
    assert max(done.report["reconstruction_error"]["qat"].values()) < 0.9
    torch_model, _ = fake_quantized(done)
    prompt = byte_level_tokenizer()("the owl waits near the barn")["input_ids"]
    with torch.inference_mode():
        expected = int(torch_model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    assert greedy_tokens(done.artifact, prompt, 1) == [expected]
