"""What the shipped recipes must reach, on real runs: ``pytest -m heavy -n 0`` (about two hours on 2 cores)."""

import json
from pathlib import Path

import pytest
import torch
from language_samples import byte_level_tokenizer, tiny_config
from places import RECIPES
from run_samples import language_recipe, memory_of_stages
from transformers import Gemma2Config, Gemma2ForCausalLM

from pipeline.estimate import estimate
from pipeline.evaluation.measurements import PerplexityByStage
from pipeline.plumbing.progress import Progress
from pipeline.recipe.reading import load_recipe
from pipeline.report.schema import Report
from pipeline.run import run

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs: what they share is computed once."""
    return tmp_path_factory.mktemp("heavy")


def run_recipe(name: str, folder: Path, *overrides: str) -> Report:
    recipe = load_recipe(RECIPES / f"{name}.yaml", list(overrides))
    return run(recipe, folder / name, Progress(), shared=folder / "shared")


@pytest.mark.parametrize(
    ("bits", "levels", "points"), [(4, "midtread", 1.0), (3, "midtread", 2.0), (2, "midrise", 5.0)]
)
def test_vit_digits(folder: Path, bits: int, levels: str, points: float) -> None:
    factors = [
        f"quantization.{factor}.{key}"
        for factor in ("basis", "projections")
        for key in (f"bits={bits}", f"levels={levels}")
    ]
    quality = run_recipe("vit-digits", folder, *factors).quality
    assert quality.dense >= 0.97
    assert 100 * (quality.dense - quality.onnx_native) <= points
    assert quality.onnx_native == quality.onnx_portable


@pytest.mark.parametrize(("rest", "share"), [("null", 0.5), ("4", 0.3)])
def test_dinov2_small_digits(folder: Path, rest: str, share: float) -> None:
    report = run_recipe("dinov2-small-digits", folder, f"quantization.rest.linear_bits={rest}")
    quality, sizes = report.quality, report.bytes
    assert 100 * (quality.dense - quality.onnx_native) <= 1.0
    assert sizes.artifact <= share * sizes.dense_float16
    assert report.parity.same_predictions


def ratio_to_dense(report: Report) -> float:
    """Perplexity of the artefact relative to the dense model's, paired window by window."""
    assert isinstance(report.quality, PerplexityByStage)
    return report.quality.difference_to_dense["onnx_native"].ratio


@pytest.mark.parametrize(
    ("name", "megabytes", "ratio"), [("150mb", 150, 1.25), ("120mb", 120, 1.19), ("latin", 95, 1.18), ("64k", 75, 1.25)]
)
def test_gemma3_270m_in_its_megabytes(folder: Path, name: str, megabytes: int, ratio: float) -> None:
    report = run_recipe(f"gemma3-270m-{name}", folder)
    assert report.bytes.artifact <= 1e6 * megabytes
    assert ratio_to_dense(report) <= ratio
    assert report.parity.same_predictions
    assert report.memory.pipeline_peak_rss_bytes <= 12 * 2**30


def test_three_bits_shared_beat_two_bits_at_equal_paper_bits(folder: Path) -> None:
    shared, own = run_recipe("gemma3-270m-w3", folder), run_recipe("baselines/gemma3-270m-dense-w2", folder)
    assert shared.bits_per_weight.paper <= own.bits_per_weight.paper + 0.01
    assert ratio_to_dense(shared) < 0.9 * ratio_to_dense(own)
    for report in (shared, own):
        assert report.memory.pipeline_peak_rss_bytes <= 12 * 2**30


def test_memory_of_gemma2_2b_layer_by_layer(folder: Path) -> None:
    """Two blocks of Gemma 2 2B's own shapes, few words: no stage holds more than ``fips plan`` says.

    What is streamed is what a whole model has more of: its activations lie on disk, and of its groups one at a time is
    factorized, fitted and quantized.
    """
    shapes = {
        "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(tiny_config(Gemma2Config, num_hidden_layers=2, **shapes))
    model.save_pretrained(folder / "gemma2")
    byte_level_tokenizer().save_pretrained(folder / "gemma2")
    del model
    words = "the river rises in the hills and flows through three countries before it reaches the sea"
    lines = [f"{number}: {words}." for number in range(120)]
    (folder / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines[:20]), encoding="utf-8")
    shipped = load_recipe(RECIPES / "gemma2-2b-w3.yaml").model_dump(mode="json", exclude_unset=True)
    shipped["quantization"]["training"][0] |= {"steps": 2}
    recipe = language_recipe(
        folder / "gemma2",
        folder,
        calibration={"samples": 64, "batch_size": 4},
        compression=shipped["compression"] | {"groups": 2},
        fit=shipped["fit"] | {"steps": 2},
        quantization=shipped["quantization"],
        evaluation={"samples": 4, "batch_size": 1},
    )
    peaks = memory_of_stages(recipe, folder / "gemma2-run", until="evaluate/qat")
    planned = estimate(recipe).memory
    for stage, peak in peaks.items():
        print(f"{stage}: {peak / 2**20:.0f} MiB")
    steps = (
        ("factorize/group_0", "factorize the largest group"),
        ("fit/group_0", "train the largest group"),
        ("qat/rest", "find starting codes outside the MLPs"),
        ("qat/0-start", "find starting codes"),
        ("qat/1-local", "train the largest group"),
    )
    for stage, when in steps:
        print(f"{stage}: {peaks[stage] / 2**20:.0f} of {planned[when] / 2**20:.0f} MiB planned to {when}")
    for stage, when in steps:
        assert peaks[stage] <= planned[when], stage
    assert max(peaks.values()) <= max(planned.values())
