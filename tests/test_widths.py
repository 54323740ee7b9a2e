"""Widths that no block size divides, or only a small one: the whole chain, at every boundary and in whole runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lm_samples import tiny_language_model
from factored_samples import dense_recipe, recipe, start_quantization
from language_samples import byte_level_tokenizer
from rest_samples import with_packed_linears
from run_samples import TINY, language_recipe, no_bench, quantization_of_language, tiny_recipe
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification

from exporters.artifact import Golden, Provenance, write_artifact
from exporters.audit import audit
from exporters.image_classifier import export_image_classifier
from exporters.modules import install_packed
from exporters.packed_model import load_packed_model, save_packed_model
from exporters.parity import check_parity
from exporters.rest import packed_rest, round_to_float16
from fips_ort.layout import PATTERNS, Pattern
from fips_ort.validate import validate
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import factorize_group, install, kept_values
from pipeline.compression.sparsify import mask_schedule
from pipeline.estimate import estimate
from pipeline.estimate.printing import print_estimate
from pipeline.evaluation import text_speed
from pipeline.evaluation.genai_load import GenaiLoad
from pipeline.models.adapters import find_mlps
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.progress import Progress
from pipeline.quantization.freeze import freeze
from pipeline.recipe.plan import GroupPlan, fitted_rows, group_size, make_plan
from pipeline.recipe.schema import Recipe
from pipeline.report.schema import Report
from pipeline.run import run
from pipeline.tasks import image_classification

PIXELS = (3, 16, 16)
WIDTHS = [(64, 172), (72, 200), (100, 260), (96, 208)]


def classifier(width: int, hidden: int, *, gated: bool = False, seed: int = 0) -> Any:
    """A random classifier of two blocks with biases that are not zero; ``gated``: 8/3 of the width, whatever ``hidden``
    is, rounded up to a multiple of 8."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    if gated:
        model: Any = Dinov2ForImageClassification(
            Dinov2Config(mlp_ratio=4, use_swiglu_ffn=True, layerscale_value=0.5, **common)
        )
    else:
        model = ViTForImageClassification(ViTConfig(intermediate_size=hidden, **common))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def scheme(bits: Any, block_size: int, levels: str) -> dict[str, Any]:
    return {"bits": bits, "block_size": block_size, "levels": levels}


def compressed(wanted: Recipe, model: nn.Module) -> tuple[GroupPlan, list[FactorizedMLP], int]:
    """The only group of a recipe, factorized, pruned and quantized, and the bytes that its factors are promised."""
    (group,) = make_plan(wanted, find_mlps(model)).groups
    masked = wanted.compression.is_masked
    mlps, _ = factorize_group(model, group, calibration=None, masked=masked, seed=0)
    if masked:
        schedule = mask_schedule(mlps, wanted.compression, 4)
        for step in range(4):
            schedule.before_step(step)
    segments = start_quantization(wanted, group, mlps)
    return group, mlps, group_size(wanted, group, *segments).stored


def assert_parity(model: Any, mlps: list[FactorizedMLP], folder: Path, promised: int, slack: int) -> None:
    """Fake-quantized, codes, bytes, functions and kernels are one model; bytes are the promised ones."""
    save_packed_model(freeze(mlps), folder / "packed.safetensors")
    packed = load_packed_model(folder / "packed.safetensors")
    stored_bytes = sum(weight.nbytes for weight in packed.weights().values())
    assert abs(stored_bytes - promised) <= slack
    base = round_to_float16(with_packed_linears(model, 4, 64, ["classifier", *mlp_linears(model)]))
    fake_quantized = install(base, mlps).eval()
    stored: Any = install_packed(base, packed).eval()
    x = torch.randn(4, *PIXELS, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, actual = (module(pixel_values=x).logits for module in (fake_quantized, stored))
    assert float((expected - actual).abs().max()) <= 1e-5 * float(expected.abs().max())
    graph = export_image_classifier(stored, PIXELS)
    audit(graph, packed, "float16")
    golden = Golden({"pixel_values": x.numpy()}, {"logits": actual.numpy()})
    provenance = Provenance("widths", "Random weights.", {"name": "widths"}, {"torch": torch.__version__})
    weights = packed.weights() | packed_rest(stored).weights()
    write_artifact(folder / "artifact", graph, weights, golden, provenance, model.config.save_pretrained, 1 << 30)
    parity = check_parity(folder / "artifact", stored, list(x.split(2)))
    assert max(parity.native_vs_torch.relative, parity.portable_vs_torch.relative) < 2e-5


def mlp_linears(model: nn.Module) -> list[str]:
    return [path for site in find_mlps(model) for path in site.linear_paths]


CASES = [
    # widths, gated, pattern, bits, block size, levels
    ((64, 172), False, "dense", 2, 64, "midrise"),
    ((64, 172), False, "1:8", 4, 64, "midtread"),
    ((72, 200), False, "bitmap", [{"bits": 4, "fraction": 0.5}, {"bits": 2, "fraction": 0.5}], 64, "midrise"),
    ((72, 200), False, "1:4", 3, 128, "midrise"),
    ((36, 90), False, "2:8", [{"bits": 8, "fraction": 0.5}, {"bits": 3, "fraction": 0.5}], 32, "midrise"),
    ((36, 90), False, "2:4", 2, 16, "midtread"),
    ((100, 272), True, "1:4", 3, 64, "midrise"),
    ((100, 272), True, "bitmap", 4, 128, "midrise"),
]


@pytest.mark.parametrize(("widths", "gated", "pattern", "bits", "block_size", "levels"), CASES)
def test_every_boundary(
    widths: tuple[int, int], gated: bool, pattern: str, bits: Any, block_size: int, levels: str, tmp_path: Path
) -> None:
    model = classifier(*widths, gated=gated)
    wanted = recipe(
        compression__pattern=pattern,
        compression__sparsity=0.5 if pattern == "bitmap" else None,
        compression__budget=2.0,
        quantization__basis=scheme(4, block_size, levels),
        quantization__projections=scheme(bits, block_size, levels),
    )
    group, mlps, promised = compressed(wanted, model)
    assert fitted_rows(make_plan(wanted, list(group.sites)))
    # The kept values of a bitmap are spread unevenly over the segments, of which each ends in a whole byte.
    slack = 8 * len(mlps) * 3 + promised // 100 if pattern == "bitmap" else 0
    assert_parity(model, mlps, tmp_path, promised, slack)
    if pattern != "bitmap" and widths[1] % 8 == 0:
        sparsity = wanted.compression.target_sparsity
        assert kept_values(mlps) == group.rank * (group.width + (1 - sparsity) * group.columns)


@pytest.mark.parametrize(("widths", "bits"), [((72, 200), 3), ((100, 260), 2)])
def test_whole_matrices(widths: tuple[int, int], bits: int, tmp_path: Path) -> None:
    model = classifier(*widths)
    wanted = dense_recipe(quantization__projections=scheme(bits, 64, "midrise"))
    plan = make_plan(wanted, find_mlps(model))
    promised, everything = 0, []
    for group in plan.groups:
        mlps, _ = factorize_group(model, group, calibration=None, masked=False, seed=0)
        promised += group_size(wanted, group, *start_quantization(wanted, group, mlps)).stored
        everything += mlps
    assert_parity(model, everything, tmp_path, promised, 0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_block_sizes_that_divide_change_nothing(widths: tuple[int, int], pattern: str) -> None:
    """Where the recipe's block size divides, it is the one that is used, and nothing is filled up."""
    parsed = Pattern.parse(pattern)
    block_size = max(16, 8 * parsed.of // parsed.keep) if parsed.is_n_of_m else 16
    wanted = recipe(
        compression__pattern=pattern,
        compression__sparsity=0.5 if pattern == "bitmap" else None,
        quantization__projections__block_size=block_size,
    )
    even = classifier(64, 2 * block_size)
    assert not fitted_rows(make_plan(wanted, find_mlps(even)))
    uneven = fitted_rows(make_plan(wanted, find_mlps(classifier(*widths))))
    lengths = {row.length for row in uneven}
    assert lengths == {length for length, size in zip(widths, (16, block_size), strict=True) if length % size}


# --- what is said ----------------------------------------------------------------------------------------------


def tiny_of(width: int, hidden: int, **changes: Any) -> Recipe:
    model = {**TINY["model"], "config": {**TINY["model"]["config"], "hidden_size": width, "intermediate_size": hidden}}
    return tiny_recipe(**{"model": model, **changes})


def test_plan_says_what_is_stored(capsys: pytest.CaptureFixture[str]) -> None:
    rest = {"linear_bits": 8, "block_size": 64}
    quantization = {
        "basis": {"bits": 4, "block_size": 64},
        "projections": {"bits": 3, "block_size": 32},
        "rest": rest,
        "training": [],
    }
    wanted = tiny_of(72, 200, quantization=quantization)
    estimated = estimate(wanted)
    print_estimate(wanted, estimated)
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "quantization.basis.block_size: 64 does not divide the model dimension 72; its rows are stored filled up to "
        "80, in blocks of 16"
    ) in out
    assert (
        "quantization.projections.block_size: 32 does not divide the MLP width 200; its rows are stored filled up to "
        "224, in blocks of 32"
    ) in out
    assert (
        "quantization.rest.block_size: 64 does not divide the input features 72; its rows are stored filled up to 80, "
        "in blocks of 16"
    ) in out
    group = estimated.plan.groups[1]  # one block
    size, rank = estimated.sizes["group_1"], group.rank
    # Half of the 72 x rank and 2 x 200 x rank values is kept; filling has no codes in a bitmap, but a bit.
    assert size.codes == rank * 80 // 2 + 2 * (rank * 200 // 2 * 3 // 8)
    assert size.pattern == 2 * rank * 224 // 8
    assert size.scales == 2 * (rank * 80 // 16 + 224 * rank // 32 + rank * 224 // 32)
    assert size.value_bits == rank * (72 * 4 + 2 * 200 / 2 * 3)


def test_what_fills_up_must_not_count() -> None:
    """Behind an activation that is not zero at zero, midrise levels in the filled part of a row would."""
    quantization = {
        "basis": {"bits": 4, "block_size": 16},
        "projections": {"bits": 3, "block_size": 32, "levels": "midrise"},
        "training": [],
    }
    compression = {"groups": 3, "budget": 0.9, "pattern": "1:4", "sparsifier": {"algorithm": "static"}}
    model = {**TINY["model"], "config": {**TINY["model"]["config"], "intermediate_size": 72, "hidden_act": "sigmoid"}}
    wanted = tiny_recipe(model=model, quantization=quantization, compression=compression)
    with pytest.raises(InputError, match=r"projections\.levels: midrise .* rows of 72 values .*Sigmoid.*take midtread"):
        estimate(wanted)
    quantization["projections"]["levels"] = "midtread"  # type: ignore[index]
    assert estimate(tiny_recipe(model=model, quantization=quantization, compression=compression)).fitted


# --- whole runs ------------------------------------------------------------------------------------------------


def assert_sound(report: Report, folder: Path) -> None:
    assert [check.passed for check in validate(folder / "artifact")].count(False) == 0
    assert report.parity.native_vs_torch.relative <= 1e-3
    assert report.parity.same_predictions
    quality = report.quality.by_stage
    assert quality["onnx_native"] == pytest.approx(quality["qat"], rel=1e-3)


def test_run_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_classification.ImageClassificationTask, "bench", no_bench)
    compression = {"groups": [[0, 1], [2]], "budget": 0.9, "pattern": "1:4", "sparsifier": {"algorithm": "rigl"}}
    quantization = {
        **TINY["quantization"],
        "start": "gptq",
        "basis": {"bits": 4, "block_size": 64},
        "projections": {"bits": 3, "block_size": 64, "levels": "midrise"},
        "rest": {"linear_bits": 8, "block_size": 64},
    }
    report = run(tiny_of(72, 172, compression=compression, quantization=quantization), tmp_path, Progress())
    assert_sound(report, tmp_path)
    said = "MLP width 172; its rows are stored filled up to 192, in blocks of 64"
    assert any(said in line for line in report.warnings)
    assert report.quality.by_stage["onnx_native"] > 0.5
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count("filled up to") == 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = [f"the cat number {number} sleeps near the river in the barn." for number in range(120)]
    (folder / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    tests = [json.dumps({"text": f"a dog hunts {number} owls near the hill by the barn."}) for number in range(30)]
    (folder / "test.jsonl").write_text("\n".join(tests), encoding="utf-8")
    return folder


def language_run(kind: str, width: int, hidden: int, text: Path, folder: Path, **changes: Any) -> Report:
    model = tiny_language_model(kind, hidden_size=width, intermediate_size=hidden, initializer_range=0.1)
    model.save_pretrained(folder / "model")
    byte_level_tokenizer().save_pretrained(folder / "model")
    return run(language_recipe(folder / "model", text, **changes), folder / "run", Progress())


@pytest.fixture
def short_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_speed, "GENERATED_TOKENS", 3)
    monkeypatch.setattr(text_speed, "ROUNDS", 1)
    monkeypatch.setattr("pipeline.tasks.causal_lm.PROMPT_TOKENS", 8)
    monkeypatch.setattr(text_speed, "measure_load", lambda _: GenaiLoad(10**8, 10**6, 2 * 10**6, 0.5))
    monkeypatch.setattr("pipeline.tasks.causal_lm.measure_memory", lambda _: {"load_rss_bytes": 1, "peak_rss_bytes": 1})


@pytest.mark.usefixtures("short_bench")
@pytest.mark.parametrize(("kind", "widths"), [("llama", (96, 208)), ("gemma3", (72, 200))])
def test_run_of_text(kind: str, widths: tuple[int, int], text: Path, tmp_path: Path) -> None:
    """The token table is tied in one of them, and its rows, as those of the basis, are filled up there."""
    quantization = quantization_of_language(
        basis={"bits": 4, "block_size": 64},
        projections={"bits": 3, "block_size": 64, "levels": "midrise"},
        rest={"linear_bits": 4, "embedding_bits": 4, "block_size": 64},
    )
    compression = {"groups": 2, "budget": 1.0, "pattern": "dense"}
    report = language_run(kind, *widths, text, tmp_path, quantization=quantization, compression=compression)
    assert_sound(report, tmp_path / "run")
    assert report.speed.left_out == {}
    assert report.speed.ratio_to_dense is not None
    assert any(f"MLP width {widths[1]}" in line for line in report.warnings)


@pytest.mark.usefixtures("short_bench")
def test_run_of_whole_matrices_of_text(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a baseline that cannot be made, whatever the reason, does not cost the report."""

    def fail(*_: Any) -> None:
        raise ValueError("no such thing\nin a second line")

    monkeypatch.setattr(text_speed, "export_int4", fail)
    quantization = quantization_of_language(
        basis=None, projections={"bits": 2, "block_size": 64}, rest={"linear_bits": 8, "block_size": 64}, training=None
    )
    compression = {"method": "dense", "pattern": "dense"}
    report = language_run(
        "qwen2", 72, 200, text, tmp_path, quantization=quantization, compression=compression, fit=None
    )
    assert_sound(report, tmp_path / "run")
    assert report.speed.left_out == dict.fromkeys(text_speed.INT4_BLOCKS, "ValueError: no such thing")
    assert report.speed.ratio_to_dense is None
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert f"Left out of the measurements: {text_speed.INT4} (ValueError: no such thing)." in page
