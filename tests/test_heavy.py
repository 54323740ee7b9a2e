"""What the shipped recipes must reach, on real runs: ``pytest -m heavy -n 0`` (about half an hour on 2 cores)."""

from pathlib import Path

import pytest

from pipeline.progress import Progress
from pipeline.recipe import load_recipe
from pipeline.report.schema import Report
from pipeline.run import run

RECIPES = Path(__file__).parent.parent / "recipes"
pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs: what they share is computed once."""
    return tmp_path_factory.mktemp("heavy")


def run_recipe(name: str, folder: Path, *overrides: str) -> Report:
    return run(load_recipe(RECIPES / f"{name}.yaml", list(overrides)), folder / name, Progress())


@pytest.mark.parametrize(
    ("bits", "levels", "points"), [(4, "midtread", 1.0), (3, "midtread", 2.0), (2, "midrise", 5.0)]
)
def test_vit_digits(folder: Path, bits: int, levels: str, points: float) -> None:
    factors = [
        f"quantization.{factor}.{key}"
        for factor in ("basis", "projections")
        for key in (f"bits={bits}", f"levels={levels}")
    ]
    quality = run_recipe("vit-digits", folder, *factors)["quality"]
    assert quality["dense"] >= 0.97
    assert 100 * (quality["dense"] - quality["onnx_native"]) <= points
    assert quality["onnx_native"] == quality["onnx_portable"]


@pytest.mark.parametrize(("rest", "share"), [("null", 0.5), ("4", 0.3)])
def test_dinov2_small_digits(folder: Path, rest: str, share: float) -> None:
    report = run_recipe("dinov2-small-digits", folder, f"quantization.rest.linear_bits={rest}")
    quality, sizes = report["quality"], report["bytes"]
    assert 100 * (quality["dense"] - quality["onnx_native"]) <= 1.0
    assert sizes["artifact"] <= share * sizes["dense_float16"]
    assert report["parity"]["same_predictions"]
