"""The kernels' benchmark on a tiny shape: its command, and what its figures mean."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from places import ROOT

BASELINES = {"float32", "int4 block 32", "int4 block 128", "int2 block 32", "int2 block 128"}
VARIANTS = {
    "mlp": BASELINES | {"fips 1:4", "fips graded", "fips dense 3-bit"},
    "product": BASELINES
    | {"fips 4-bit", "fips 3-bit", "fips 2-bit", "fips 3-bit 1:4", "fips 3-bit 2:4", "fips 3-bit bitmap 75 %"},
    "basis": BASELINES | {"fips 4-bit, transB 0"},
}


def run_benchmark(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command on the tiny shape, five rounds a case; it fails if an output is not finite."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--shapes", "tiny", "--seconds", "0", *options]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything at one row and one thread."""
    folder = tmp_path_factory.mktemp("benchmark")
    child = run_benchmark("--threads", "1", "--rows", "1", "--cold-bytes", "600000", "--out", str(folder))
    assert child.returncode == 0, child.stderr
    assert "tiny basis, warm weights: ms of a layer, × speed of int4 block 128" in child.stdout
    assert (folder / "kernels.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "kernels.json").read_text(encoding="utf-8"))


def test_every_case_is_measured_once(result: dict[str, Any]) -> None:
    found = [(item["comparison"], item["weights"], item["variant"]) for item in result["measurements"]]
    expected = [
        (comparison, weights, variant)
        for comparison, variants in VARIANTS.items()
        for weights in ("cold", "warm")
        for variant in variants
    ]
    assert sorted(found) == sorted(expected)
    assert {(item["shape"], item["threads"], item["rows"]) for item in result["measurements"]} == {("tiny", 1, 1)}


def test_ratios_are_medians_of_paired_times(result: dict[str, Any]) -> None:
    cases = {(item["comparison"], item["weights"], item["variant"]): item for item in result["measurements"]}
    for (comparison, weights, _), item in cases.items():
        times = item["milliseconds"]
        assert len(times) == 5
        assert (item["min_ms"], item["median_ms"], item["max_ms"]) == (min(times), median(times), max(times))
        assert set(item["ratios"]) == BASELINES
        for baseline, ratio in item["ratios"].items():
            theirs = cases[comparison, weights, baseline]["milliseconds"]
            assert ratio == pytest.approx(median(a / b for a, b in zip(theirs, times, strict=True)))


def test_bytes_are_those_of_the_files(result: dict[str, Any]) -> None:
    weights = {"mlp": 3 * 256 * 512, "product": 256 * 512, "basis": 384 * 256}
    for item in result["measurements"]:
        assert item["dense_weights"] == weights[item["comparison"]]
        assert item["stored_bits"] == pytest.approx(8 * item["stored_bytes"] / item["dense_weights"])
        if item["weights"] == "cold":  # whole groups, so that a basis is stored once for every four layers
            assert item["layers"] % 4 == 0
            # Beside weights there are the graph and the gaps between aligned tensors.
            rest = item["file_bytes"] - item["layers"] * item["stored_bytes"]
            assert 0 < rest < 4000 * item["layers"]
    bits = {(item["comparison"], item["variant"]): item["stored_bits"] for item in result["measurements"]}
    assert bits["mlp", "float32"] == 32
    assert bits["mlp", "int4 block 128"] == 4.25
    assert bits["mlp", "fips dense 3-bit"] == bits["product", "fips 3-bit"] == 3.125
    assert bits["product", "fips 3-bit 1:4"] == 5 / 4 + 0.125


def test_cold_weights_of_a_model_fill_the_cache(result: dict[str, Any]) -> None:
    assert result["cold_bytes"] == 600_000
    for item in result["measurements"]:
        whole = item["layers"] * item["stored_bytes"]
        if item["weights"] == "cold":
            assert whole >= 600_000 > whole - 4 * item["stored_bytes"]
        else:
            assert item["layers"] == 1
    assert {item["layers"] for item in result["measurements"] if item["variant"] == "float32"} == {1, 4}


def test_speeds_are_fractions_of_the_read_bandwidth(result: dict[str, Any]) -> None:
    bandwidth = result["read_bandwidth"]["bytes_per_second"]["1"]
    assert bandwidth > 1e8
    for item in result["measurements"]:
        for prefix, size in (("", item["bytes_read"]), ("stored_", item["stored_bytes"])):
            assert item[f"{prefix}bytes_per_second"] == pytest.approx(1e3 * size / item["median_ms"])
            assert item[f"{prefix}bandwidth_fraction"] == pytest.approx(
                1e3 * size / item["median_ms"] / bandwidth
            )


LEVELS_OF_QUANTIZED_OPS = """
import json, sys
from pathlib import Path
import onnx
from benchmarks.measurement import KINDS
from benchmarks.shapes import SHAPES

found = []
for kind, variants in KINDS.items():
    for level in (0, 4):
        for variant in variants(SHAPES["tiny"], level):
            variant.graph(1).save(Path(sys.argv[1]) / "model.onnx")
            nodes = onnx.load(sys.argv[1] + "/model.onnx", load_external_data=False).graph.node
            attributes = [{item.name: item.i for item in node.attribute} for node in nodes if node.domain]
            found.append((kind, level, variant.name, [each["accuracy_level"] for each in attributes]))
print(json.dumps(found))
"""
"""Run where the benchmark is, which is not installed."""


def test_all_quantized_ops_have_the_accuracy_level_that_is_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEVELS_OF_QUANTIZED_OPS, str(tmp_path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(child.stdout)
    assert [(kind, name) for kind, level, name, _ in found if level == 0] == [
        (kind, name) for kind, level, name, _ in found if level == 4
    ]
    assert {kind: {name for each, _, name, _ in found if each == kind} for kind in VARIANTS} == VARIANTS
    for _, level, name, levels in found:
        assert levels == [level] * len(levels)
        assert bool(levels) == (name != "float32")


def test_memory_counts_a_shared_basis(result: dict[str, Any]) -> None:
    memory = result["memory"]
    assert memory["basis_nodes"] == 12
    total = memory["file_bytes"] + memory["activation_bytes"]
    assert memory["ratio"] == pytest.approx(memory["rss_growth_bytes"] / total)


def test_some_cases_with_other_kernels(tmp_path: Path) -> None:
    """More rows and threads, one case only, kernels asked for by the environment."""
    options = ("--only", "mlp cold", "--threads", "1", "2", "--rows", "1", "40", "--cold-bytes", "2000000")
    options += ("--accuracy-level", "0")
    child = run_benchmark(*options, "--out", str(tmp_path), FIPS_ORT_ISA="generic")
    assert child.returncode == 0, child.stderr
    result = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert result["machine"]["FIPS_ORT_ISA"] == "generic"
    assert (result["memory"], result["accuracy_level"]) == (None, 0)
    assert len(result["measurements"]) == len(VARIANTS["mlp"]) * 4
    by_rows = {
        rows: {item["variant"]: item for item in result["measurements"] if item["rows"] == rows} for rows in (1, 40)
    }
    assert all(item["layers"] * item["stored_bytes"] >= 2_000_000 for item in by_rows[1].values())
    assert sum(item["layers"] * item["stored_bytes"] for item in by_rows[40].values()) >= 2_000_000
    assert {item["layers"] for item in by_rows[40].values()} == {4}
    assert all(("bytes_per_second" in item) == (item["rows"] == 1) for item in result["measurements"])


def test_unknown_case_is_refused(tmp_path: Path) -> None:
    child = run_benchmark("--only", "nothing", "--threads", "1", "--out", str(tmp_path))
    assert child.returncode == 2
    assert child.stderr == "--only 'nothing': no case has this in its name\n"


CPU_FAULTS = "cpuid_fault" in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "")


@pytest.mark.skipif(not CPU_FAULTS, reason="needs a CPU whose CPUID instruction can be made to fault")
def test_avx512_can_be_hidden(tmp_path: Path) -> None:
    options = ("--without-avx512", "--only", "product cold", "--threads", "1", "--rows", "1", "--cold-bytes", "1")
    child = run_benchmark(*options, "--out", str(tmp_path))
    assert child.returncode == 0, child.stderr
    flags = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["machine"]["instruction_sets"]
    assert "avx2" in flags
    assert not [flag for flag in flags if flag.startswith(("avx512", "amx"))]
    child = run_benchmark(*options, "--out", str(tmp_path), FIPS_ORT_ISA="avx512")
    assert child.returncode != 0
    assert "FIPS_ORT_ISA=avx512: unknown, or this CPU lacks it" in child.stderr


def test_what_cannot_be_hidden_is_told(tmp_path: Path) -> None:
    child = run_benchmark("--without-avx512", "--only", "product cold", "--out", str(tmp_path), CC="no-such-compiler")
    assert child.returncode == 2
    assert "--without-avx512: hide_avx512.c cannot be built" in child.stderr
