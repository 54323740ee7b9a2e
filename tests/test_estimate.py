"""``fips plan``: what it promises is what a run makes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FinishedRun
from run_samples import TINY, tiny_recipe

from fips_ort.manifest import read_manifest
from pipeline.errors import InputError
from pipeline.estimate import estimate


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


def scheme(bits: int) -> dict[str, Any]:
    factor = {"bits": bits, "block_size": 16}
    return {"basis": factor, "projections": factor}
