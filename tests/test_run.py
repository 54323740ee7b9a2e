"""Whole runs of a tiny recipe: consistent figures, the same bytes every time, resumed exactly, reused rightly."""

import copy
import fcntl
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from finished_run import FinishedRun
from manifest_samples import mlp_weights
from run_samples import (
    TINY,
    KillAt,
    artifact_hashes,
    no_bench,
    run_in_process,
    stages_run_for,
    tiny_recipe,
)
from safetensors.torch import load_file

from fips_ort.manifest import MANIFEST, read_manifest
from fips_ort.validate import validate
from pipeline.plumbing.errors import InputError, StageError
from pipeline.plumbing.files import read_json
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.records import read_record
from pipeline.recipe.reading import load_recipe
from pipeline.report.schema import Report
from pipeline.run import run
from pipeline.stages import deliver
from pipeline.stages.quantize import TRAINED_REST
from pipeline.tasks import image_classification

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
MEASURED = ("seconds", "speed", "memory", "reused_stages", "disk_bytes")


@pytest.fixture(autouse=True)
def speed_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """:func:`finished_run` has done so."""
    monkeypatch.setattr(image_classification.ImageClassificationTask, "bench", no_bench)


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = read_json(folder / "report.json")
    return report


@pytest.fixture
def copied_run(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A copy of the finished run to change."""
    return Path(shutil.copytree(finished_run.folder, tmp_path / "run"))


# --- one run ---------------------------------------------------------------------------------------------------


def test_report_agrees_with_artefact(finished_run: FinishedRun) -> None:
    report = report_of(finished_run.folder)
    read_record(Report, finished_run.folder / "report.json")  # raises if it contradicts itself
    artifact = finished_run.folder / "artifact"
    manifest = read_manifest(artifact)
    size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    assert report["bytes"]["artifact"] == size == sum(report["bytes"]["by_part"].values())
    assert report["bytes"]["mlp_stored"] == sum(weight.bytes for weight in mlp_weights(manifest))
    assert report["recipe"] == manifest.recipe == tiny_recipe().model_dump(mode="json")
    assert report["dense_blocks"] == []
    assert [group["blocks"] for group in report["groups"]] == [[0, 1], [2]]
    mlp = 2 * 32 * 64
    assert report["model"]["mlp_parameters"] == 3 * mlp
    assert report["bytes"]["mlp_dense_float16"] == 2 * 3 * mlp
    assert report["bits_per_weight"]["stored"] == 8 * report["bytes"]["mlp_stored"] / (3 * mlp)
    # Values only; the budget bounds their number, and no value takes more than 4 bits.
    assert 0 < report["bits_per_weight"]["paper"] <= 0.6 * 4
    assert report["bits_per_weight"]["paper"] < report["bits_per_weight"]["stored"]


def test_report_agrees_with_itself(finished_run: FinishedRun) -> None:
    report = report_of(finished_run.folder)
    quality = report["quality"]
    assert quality["samples"] == report["data"]["test_samples"] == 200
    assert report["data"]["calibration_samples"] == 128
    for stage, accuracy in quality.items():
        if stage in quality["standard_error"]:
            assert accuracy * 200 == pytest.approx(round(accuracy * 200))
            assert quality["standard_error"][stage] == pytest.approx((accuracy * (1 - accuracy) / 200) ** 0.5)
    assert quality["dense"] > 0.3  # ten classes: it has learned something
    assert quality["onnx_native"] == quality["onnx_portable"]
    assert report["parity"]["same_predictions"] is True
    for pair in ("native_vs_torch", "portable_vs_torch", "native_vs_portable"):
        assert report["parity"][pair]["relative"] <= report["parity"]["tolerance"] == 1e-3
    for stage in ("factorized", "fitted", "rounded", "qat"):
        assert sorted(report["reconstruction_error"][stage]) == ["0", "1", "2"]
    assert 0 <= report["divergence"]["kl_mean"] <= report["divergence"]["kl_p99"]
    assert sorted(report["seconds"]) == sorted((*STAGES, "bench"))
    assert report["reused_stages"] == []


def test_artefact_is_sound(finished_run: FinishedRun) -> None:
    assert [check.passed for check in validate(finished_run.folder / "artifact")] == [True] * 4
    rows = read_json(finished_run.folder / "work" / "export" / "audit.json")
    assert rows
    assert all(row["bytes"] == row["promised"] for row in rows)
    bases = [row["name"] for row in rows if row["kind"] == "basis"]
    assert len({name.rsplit(".", 1)[0] for name in bases}) == 2  # one per group, whatever its number of MLPs


def test_second_run_gives_the_same(finished_run: FinishedRun, tmp_path: Path) -> None:
    run(tiny_recipe(), tmp_path / "again", Progress())
    assert artifact_hashes(tmp_path / "again") == artifact_hashes(finished_run.folder)
    first, second = report_of(finished_run.folder), report_of(tmp_path / "again")
    for report in (first, second):
        for key in MEASURED:
            del report[key]
    assert first == second


# --- killed and resumed ----------------------------------------------------------------------------------------


def test_killed_at_the_start_of_every_stage(finished_run: FinishedRun, tmp_path: Path) -> None:
    for stage in STAGES:
        assert run_in_process(tiny_recipe(), tmp_path, KillAt(line=stage)) == -9
    assert run_in_process(tiny_recipe(), tmp_path, KillAt()) == 0
    assert artifact_hashes(tmp_path) == artifact_hashes(finished_run.folder)


def test_killed_in_the_middle_of_every_training(finished_run: FinishedRun, tmp_path: Path) -> None:
    points = [
        ("train the dense model", 20),
        ("train the dense model", 40),
        ("fit group_0", 7),  # between two updates of the masks
        ("fit group_0", 16),
        ("fit group_1", 5),
        ("QAT 1, local, group_0", 3),
        ("QAT 1, local, group_1", 9),
        ("QAT 2, distill", 2),
        ("QAT 2, distill", 5),
    ]
    for task, step in points:
        assert run_in_process(tiny_recipe(), tmp_path, KillAt(task=task, step=step)) == -9
    assert run_in_process(tiny_recipe(), tmp_path, KillAt()) == 0
    assert artifact_hashes(tmp_path) == artifact_hashes(finished_run.folder)


def test_killed_before_files_are_moved_into_place(finished_run: FinishedRun, tmp_path: Path) -> None:
    numbers = random.Random(0)
    kills = 0
    while run_in_process(tiny_recipe(), tmp_path, KillAt(replace=numbers.randint(1, 40))) == -9:
        kills += 1
    assert kills > 2
    assert artifact_hashes(tmp_path) == artifact_hashes(finished_run.folder)


def test_old_artefact_survives_a_kill_between_its_two_moves(copied_run: Path) -> None:
    before = artifact_hashes(copied_run)
    recipe = tiny_recipe(export={"max_shard_size": 8192})
    # started.json; then the old artefact moves away, and the new one should move in.
    assert run_in_process(recipe, copied_run, KillAt(replace=3)) == -9
    assert not (copied_run / "artifact").exists()
    assert run_in_process(tiny_recipe(), copied_run, KillAt()) == 0
    assert artifact_hashes(copied_run) == before


# --- reuse -----------------------------------------------------------------------------------------------------


def test_groups_fitted_on_ray_give_the_same(finished_run: FinishedRun, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    said: list[str] = []

    class Listening(Progress):
        def say(self, message: str) -> None:
            said.append(message)

    ray.init(address="local", num_cpus=2, include_dashboard=False)
    try:
        run(load_recipe(finished_run.recipe), tmp_path / "run", Listening(), engine="ray")
    finally:
        ray.shutdown()
    for group in ("group_0", "group_1"):
        assert f"fit/{group}: unchanged, taken from {tmp_path / 'run/work/fit' / group}" in said
    expected, found = artifact_hashes(finished_run.folder), artifact_hashes(tmp_path / "run")
    assert found == expected


def test_finished_run_is_reused(copied_run: Path) -> None:
    assert stages_run_for(tiny_recipe(), copied_run) == []


def test_other_bits_keep_the_fit(copied_run: Path) -> None:
    quantization = copy.deepcopy(TINY["quantization"])
    quantization["basis"]["bits"] = 2
    computed = stages_run_for(tiny_recipe(quantization=quantization), copied_run, until="export")
    assert computed == ["qat/0-start", "evaluate/rounded", "qat/1-local", "qat/2-distill", "evaluate/qat", "pack"]


def test_what_is_trained_outside_the_mlps_stays(copied_run: Path) -> None:
    """Steps that do not train it themselves compute with it and pass it on; it ends up in the artefact."""
    quantization = {
        **TINY["quantization"],
        "rest": {"linear_bits": 4, "block_size": 16},
        "training": [
            {
                "objective": "distill", "steps": 5, "batch_size": 32, "learning_rate": 3e-2, "train_rest": True,
                "precision": "bfloat16",
            },
            {"objective": "local", "steps": 3, "batch_tokens": 128},
            {"objective": "distill", "steps": 2, "batch_size": 32},
        ],
    }  # fmt: skip
    run(tiny_recipe(quantization=quantization), copied_run, Progress())
    names = ("1-distill", "2-local", "3-distill")
    steps = [load_file(copied_run / "work" / "qat" / name / TRAINED_REST) for name in names]
    assert any(name.endswith("/scales") for name in steps[0])
    assert "vit.layernorm.weight" in steps[0]
    for step in steps[1:]:
        assert step.keys() == steps[0].keys()
        assert all(torch.equal(step[name], tensor) for name, tensor in steps[0].items())
    artifact = copied_run / "artifact"
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor, str(artifact))
        for tensor in onnx.load(artifact / "model.onnx", load_external_data=False).graph.initializer
    }
    expected = steps[0]["vit.layernorm.weight"].half().numpy()
    assert any(np.array_equal(array.astype(np.float16), expected) for array in stored.values())
    assert [check.passed for check in validate(artifact)] == [True] * 4


def test_other_evaluation_keeps_the_training(copied_run: Path) -> None:
    recipe = tiny_recipe(evaluation={"samples": 100})
    computed = stages_run_for(recipe, copied_run)
    # The artefact's manifest holds the recipe, with the number of samples.
    evaluations = [f"evaluate/{name}" for name in ("dense", "factorized", "fitted", "rounded", "qat")]
    assert computed == [*evaluations, "export", "validate"]
    assert read_manifest(copied_run / "artifact").recipe["evaluation"]["samples"] == 100


def test_other_seed_keeps_nothing(copied_run: Path) -> None:
    assert stages_run_for(tiny_recipe(seed=1), copied_run, until="evaluate/dense") == ["model"]


@pytest.mark.parametrize("content", [b"", b'{"key": "', b"[]", b"\xff\xfe\x00", b'{"key": 1}'])
def test_damaged_stage_file_means_computed_again(copied_run: Path, content: bytes) -> None:
    (copied_run / "work" / "fit" / "group_1" / "stage.json").write_bytes(content)
    assert stages_run_for(tiny_recipe(), copied_run) == ["fit/group_1"]


def test_lost_and_truncated_results_are_computed_again(copied_run: Path) -> None:
    work = copied_run / "work"
    (work / "calibrate" / "block_01_inputs.npy").unlink()
    factors = work / "qat" / "1-local" / "group_0" / "factors.safetensors"
    factors.write_bytes(factors.read_bytes()[:-10])
    (work / "evaluate" / "qat" / "logits.safetensors").unlink()
    shutil.rmtree(work / "pack")
    assert stages_run_for(tiny_recipe(), copied_run) == ["calibrate", "qat/1-local", "evaluate/qat", "pack"]


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_artefact_is_exported_again(finished_run: FinishedRun, copied_run: Path, damage: str) -> None:
    artifact = copied_run / "artifact"
    if damage == "changed":
        data = bytearray((artifact / "model.onnx.data").read_bytes())
        data[100] ^= 1
        (artifact / "model.onnx.data").write_bytes(data)
    else:
        shutil.rmtree(artifact)
    assert stages_run_for(tiny_recipe(), copied_run) == ["export"]
    assert artifact_hashes(copied_run) == artifact_hashes(finished_run.folder)


def test_fresh_uses_nothing(copied_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("computed")

    monkeypatch.setattr(image_classification.ImageClassificationTask, "make_dense", refuse)
    with pytest.raises(InputError, match="computed"):
        run(tiny_recipe(), copied_run, Progress(), fresh=True)
    assert not (copied_run / "work" / "fit").exists()
    assert (copied_run / "artifact" / MANIFEST).exists()


# --- two at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [False, True])
def test_second_run_at_the_same_time_is_refused(copied_run: Path, fresh: bool) -> None:
    kept = {path: path.stat().st_mtime_ns for path in copied_run.rglob("*") if path.is_file()}
    with (copied_run / "work" / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run works in this folder"):
            run(tiny_recipe(), copied_run, Progress(), fresh=fresh)
    lock = copied_run / "work" / "lock"
    assert {path: path.stat().st_mtime_ns for path in kept if path != lock} == {
        path: time for path, time in kept.items() if path != lock
    }


def test_report_is_json_of_plain_numbers(finished_run: FinishedRun) -> None:
    text = (finished_run.folder / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    json.loads(text)


def test_artefact_that_fails_parity_is_moved_away(copied_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No backend sums in the same order as another, so nothing passes a tolerance of zero.
    monkeypatch.setattr(deliver, "PARITY_TOLERANCE", 0.0)
    for stage in ("export", "validate"):
        shutil.rmtree(copied_run / "work" / stage)
    with pytest.raises(StageError, match=r"differ from PyTorch's .* moved to .*artifact\.rejected"):
        run(tiny_recipe(), copied_run, Progress())
    assert not (copied_run / "artifact").exists()
    assert (copied_run / "artifact.rejected" / MANIFEST).exists()
    assert not (copied_run / "report.json").exists()
