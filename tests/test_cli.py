"""The command: what it prints, how fast it starts, and bad input: one message, status 2, nothing harmed."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_run import FinishedRun
from onnxruntime.capi.onnxruntime_pybind11_state import Fail as OnnxRuntimeFail
from PIL import Image
from run_samples import TINY, artifact_hashes, fips, hashes, write_recipe
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from pipeline import cli
from pipeline.plumbing.records import read_record
from pipeline.report.schema import Report
from pipeline.tasks import image_classification

IMAGE_LABELS = ("cat", "dog", "emu")
DATA_FILE = "model.onnx.data"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: arguments → (exit status, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fips", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def artifact(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A copy of the finished artefact to damage."""
    return Path(shutil.copytree(finished_run.folder / "artifact", tmp_path / "artifact"))


def assert_one_message(status: int, stderr: str, *words: str) -> None:
    """Exit status 2 and, after the lines of progress, one message with ``words``; a line for each offender."""
    assert status == 2, stderr
    assert "Traceback" not in stderr
    _, *messages = f"\n{stderr}".split("\nerror: ")
    assert len(messages) == 1, stderr
    assert all(line.startswith("recipe tiny: ") for line in messages[0].splitlines()[1:])
    for word in words:
        assert word in messages[0]


# --- starting --------------------------------------------------------------------------------------------------


def test_help_needs_no_heavy_library() -> None:
    program = (
        "import sys; sys.argv = ['fips', '--help']; from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit as error: assert not error.code\n"
        "heavy = {'torch', 'transformers', 'torchao', 'onnx', 'onnxruntime', 'sklearn', 'matplotlib'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    for name in ("plan", "run", "validate", "inspect", "bench", "eval"):
        assert name in child.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.5


def test_run_prints_only_our_lines(finished_run: FinishedRun) -> None:
    stages = set(json.loads((finished_run.folder / "report.json").read_text(encoding="utf-8"))["seconds"])
    for line in finished_run.stderr.splitlines():
        assert line in stages or line.startswith("  "), line
    verdict, detail, artifact, report = finished_run.stdout.splitlines()
    assert "accuracy" in verdict
    assert "200 test samples" in detail
    assert artifact.split() == ["artefact", str(finished_run.folder / "artifact")]
    assert report.split() == ["report", str(finished_run.folder / "report.html")]


# --- commands on a finished run --------------------------------------------------------------------------------


def test_plan(command: Command, finished_run: FinishedRun) -> None:
    status, out, err = command("plan", finished_run.recipe)
    assert (status, err) == (0, "")
    group = next(line.split() for line in out.splitlines() if line.strip().startswith("group_0"))
    assert group[:5] == ["group_0", "0,", "1", "32", "256"]
    report = json.loads((finished_run.folder / "report.json").read_text(encoding="utf-8"))
    assert int(group[5]) == report["groups"][0]["rank"]
    assert f"tiny: {report['model']['parameters']:,} parameters" in out


def test_plan_with_overrides(command: Command, finished_run: FinishedRun) -> None:
    status, out, _ = command("plan", finished_run.recipe, "--set", "compression.groups=[[1]]", "--set", "name=other")
    assert status == 0
    assert out.startswith("other: ")
    assert "left dense: blocks [0, 2]" in out


def test_validate(command: Command, finished_run: FinishedRun) -> None:
    status, out, _ = command("validate", finished_run.folder / "artifact")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["ok"] * 4


def test_inspect(command: Command, finished_run: FinishedRun) -> None:
    folder = finished_run.folder / "artifact"
    status, out, _ = command("inspect", folder)
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    manifest = json.loads((folder / "fips.json").read_text(encoding="utf-8"))
    for weight in manifest["weights"]:
        assert f"{weight['rows']} × {weight['columns']}" in lines[weight["name"]]
        assert f"{weight['bytes']:,}" in lines[weight["name"]]
    assert f"{sum(file['bytes'] for file in manifest['files']):,} bytes in all" in out


def test_bench(command: Command, finished_run: FinishedRun) -> None:
    folder = finished_run.folder / "artifact"
    status, out, _ = command("bench", folder, "--batch", "3", "--threads", "1", "--seconds", "0.1")
    assert status == 0
    assert "batch 3, 1 threads" in out
    for backend in ("artefact, native kernels", "artefact, portable functions"):
        line = next(line for line in out.splitlines() if backend in line)
        assert all(float(figure) > 0 for figure in line.split()[-4:])


def test_an_image_classifier_is_not_measured_beside_others(command: Command, finished_run: FinishedRun) -> None:
    folder = finished_run.folder / "artifact"
    status, _, err = command("bench", folder, "--beside", folder)
    assert_one_message(status, err, "--beside", "image classifier")


@pytest.mark.parametrize("options", [[], ["--portable"]])
def test_eval_measures_what_the_report_says(
    command: Command, finished_run: FinishedRun, options: list[str]
) -> None:
    quality = json.loads((finished_run.folder / "report.json").read_text(encoding="utf-8"))["quality"]
    status, out, _ = command("eval", finished_run.folder / "artifact", *options)
    assert status == 0
    accuracy = quality["onnx_portable" if options else "onnx_native"]
    error = quality["standard_error"]["onnx_native"]
    assert out == f"accuracy {100 * accuracy:.2f} ± {100 * error:.2f} % of 200 samples\n"


# --- bad recipes -----------------------------------------------------------------------------------------------


def changed(path: str, value: Any) -> dict[str, Any]:
    """The tiny recipe with the value at a dotted path replaced."""
    content: dict[str, Any] = json.loads(json.dumps(TINY))
    *parents, last = path.split(".")
    node = content
    for parent in parents:
        node = node[parent]
    node[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("compresion", {}, ["compresion", "unknown key"]),
        ("compression.bugdet", 0.5, ["compression.bugdet", "unknown key"]),
        ("compression.groups", [[0, 7]], ["compression.groups.0", "[7]", "0 to 2"]),
        ("compression.groups", [[0, 1], [1]], ["compression.groups.1", "block 1 is in group 0 already"]),
        ("compression.groups", [[]], ["compression.groups.0", "empty"]),
        ("compression.budget", 0.01, ["compression.budget", "0.01", "rank"]),
        ("compression.budget", 0, ["compression.budget", "greater than 0"]),
        ("quantization.basis.bits", 5, ["quantization.basis.bits", "5"]),
        ("quantization.projections.bits", 1, ["quantization.projections.bits", "1"]),
        ("quantization.basis.block_size", 24, ["quantization.basis.block_size", "24"]),
        ("model.model_type", "vitt", ["'vitt'", "deit, dinov2, swin, vit"]),
        ("model.model_type", "bert", ["'bert'", "deit, dinov2, swin, vit"]),
        ("model.config.hidden_sise", 32, ["model.config.hidden_sise"]),
        ("data.image_size", 16, ["data.image_size", "16", "8"]),
        ("evaluation.samples", 100_000, ["evaluation", "100000"]),
        ("seed", -1, ["seed", "-1"]),
    ],
)
def test_bad_recipe(command: Command, tmp_path: Path, path: str, value: Any, words: list[str]) -> None:
    recipe = write_recipe(tmp_path, changed(path, value))
    status, out, err = command("run", recipe, "--out", tmp_path / "run")
    assert out == ""
    assert_one_message(status, err, *words)
    work = tmp_path / "run" / "work"
    assert not work.exists() or not (work / "model").exists()  # refused before the model is trained


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot read the recipe", "No such file"]),
        ("name: [", ["not valid YAML"]),
        ("- 1\n", ["a recipe is a mapping"]),
    ],
)
def test_unreadable_recipe(command: Command, tmp_path: Path, content: str | None, words: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    for name in ("plan", "run"):
        status, _, err = command(name, path)
        assert_one_message(status, err, str(path), *words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "recipe.yaml", "--bogus"],
        ["bench"],
        ["bench", "folder", "--batch", "0"],
        ["bench", "folder", "--threads", "-1"],
    ],
)
def test_usage_error(command: Command, arguments: list[str]) -> None:
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert "Usage: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("override", ["seed", "=1", "seed.x=1", "seed=[", "seed=a"])
def test_bad_override(command: Command, finished_run: FinishedRun, override: str) -> None:
    status, _, err = command("plan", finished_run.recipe, "--set", override)
    assert_one_message(status, err, "seed" if "seed" in override else "--set")


# --- bad data and models ---------------------------------------------------------------------------------------


def save_model(folder: Path, change: Callable[[ViTForImageClassification], None] = lambda _: None) -> None:
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(IMAGE_LABELS)), "label2id": {name: i for i, name in enumerate(IMAGE_LABELS)}}
    model = ViTForImageClassification(ViTConfig(**TINY["model"]["config"], **labels))
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)


def save_images(folder: Path, labels: tuple[str, ...] = IMAGE_LABELS) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in labels:
            (folder / split / label).mkdir(parents=True)
            for number in range(3):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")


def pretrained_recipe(folder: Path) -> Path:
    content = {
        **TINY,
        "model": {"source": "pretrained", "path": str(folder / "model")},
        "data": {"source": "image_folder", "path": str(folder / "images")},
        "calibration": {},
        "evaluation": {},
    }
    return write_recipe(folder, content)


def set_nan(model: ViTForImageClassification) -> None:
    model.get_parameter("classifier.weight")[1, 5] = float("nan")


def overflow(model: ViTForImageClassification) -> None:
    for name, parameter in model.named_parameters():
        if "mlp" in name or "intermediate" in name or "output" in name:
            parameter.mul_(1e30)


def test_nan_in_weights(command: Command, tmp_path: Path) -> None:
    save_model(tmp_path / "model", set_nan)
    save_images(tmp_path / "images")
    status, _, err = command("run", pretrained_recipe(tmp_path), "--out", tmp_path / "run")
    assert_one_message(status, err, "classifier.weight", "NaN")


def test_activations_overflow(command: Command, tmp_path: Path) -> None:
    save_model(tmp_path / "model", overflow)
    save_images(tmp_path / "images")
    wide = "quantization.rest.weights=float32"
    status, _, err = command("run", pretrained_recipe(tmp_path), "--out", tmp_path / "run", "--set", wide)
    assert_one_message(status, err, "not finite")


@pytest.mark.parametrize(
    ("labels", "words"),
    [((), ["images"]), (("0", "1", "3"), ["label 3 is out of range", "3 labels"]), (("cat", "cow"), ["'cow'"])],
)
def test_bad_images(command: Command, tmp_path: Path, labels: tuple[str, ...], words: list[str]) -> None:
    save_model(tmp_path / "model")
    save_images(tmp_path / "images", labels)
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True, exist_ok=True)
    status, _, err = command("run", pretrained_recipe(tmp_path), "--out", tmp_path / "run")
    assert_one_message(status, err, *words)


def test_missing_model(command: Command, tmp_path: Path) -> None:
    save_images(tmp_path / "images")
    status, _, err = command("run", pretrained_recipe(tmp_path), "--out", tmp_path / "run")
    assert_one_message(status, err, "model.path", str(tmp_path / "model"))


def test_diverging_training_fails(command: Command, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, changed("fit.learning_rate", 1e30))
    status, out, err = command("run", recipe, "--out", tmp_path / "run")
    assert (status, out) == (1, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("failed: fit group_0: the loss is ")


def test_interrupted_run_says_how_to_go_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.run.run", interrupt)
    status, out, err = command("run", write_recipe(tmp_path))
    assert (status, out, err) == (130, "", "stopped; the same command resumes\n")


# --- output and what nobody has foreseen -----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["ascii", "full", "closed pipe"])
def test_output_never_kills_a_finished_run(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["fips", "run", str(finished_run.recipe), "--out", str(finished_run.folder)])
    if where == "closed pipe":
        read, write = os.pipe()
        os.close(read)
        stdout = open(write, "w", encoding="utf-8")  # noqa: SIM115
    else:
        path = "/dev/full" if where == "full" else tmp_path / "out"
        stdout = open(path, "w", encoding="ascii", errors="strict")  # noqa: SIM115
    monkeypatch.setattr("pipeline.run.run", lambda *_, **__: read_record(Report, finished_run.folder / "report.json"))
    with stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    if where == "ascii":
        assert "\\xb1" in (tmp_path / "out").read_text(encoding="ascii")  # ± of the verdict


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a value\nof two lines"), "ValueError: a value of two lines"),
        (ImportError("No module named 'x'"), "ImportError: No module named 'x'"),
        (MemoryError(), "MemoryError (out of memory)"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError"),
        (UnicodeEncodeError("ascii", "→", 0, 1, "no"), "UnicodeEncodeError: "),
        (OnnxRuntimeFail("[ONNXRuntimeError] : 1 : FAIL"), "Fail: [ONNXRuntimeError] : 1 : FAIL"),
    ],
)
@pytest.mark.parametrize("name", ["run", "plan"])
def test_what_nobody_has_foreseen_is_one_line_and_a_traceback_kept(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out, arguments = tmp_path / "run", [name, write_recipe(tmp_path)]
    if name == "run":
        monkeypatch.setattr(image_classification.ImageClassificationTask, "make_dense", fail)
        arguments += ["--out", out]
    else:
        monkeypatch.setattr("pipeline.estimate.estimate", fail)
    status, stdout, err = command(*arguments)
    assert (status, stdout) == (1, "")
    line = err.splitlines()[-1]
    assert line.startswith(f"failed: {'model: ' if name == 'run' else ''}{said}")
    assert "Traceback" not in err
    kept = Path(line.rpartition("the traceback is in ")[2])
    assert kept.parent == (out / "work" if name == "run" else tmp_path)
    text = kept.read_text(encoding="utf-8")
    assert text.startswith("Traceback")
    assert "in fail" in text


def test_a_traceback_that_no_disk_takes_is_shown(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.estimate.estimate", fail)
    monkeypatch.setattr(tempfile, "mkstemp", fail)
    status, _, err = command("plan", write_recipe(tmp_path))
    assert status == 1
    assert err.startswith("failed: OSError: [Errno 28] No space left on device; this was not foreseen, and no disk")
    assert "Traceback" in err


# --- bad places to write to ------------------------------------------------------------------------------------


def test_out_is_a_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    recipe = write_recipe(tmp_path)
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        status, _, err = command("run", recipe, "--out", out)
        assert_one_message(status, err, str(out))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_is_not_writable(command: Command, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    status, _, err = command("run", write_recipe(tmp_path), "--out", tmp_path / "closed" / "run")
    assert_one_message(status, err, "closed", "Permission denied")


def test_other_folder_in_the_artefacts_place_is_left_alone(finished_run: FinishedRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run.folder, tmp_path / "run"))
    shutil.rmtree(run / "artifact")
    (run / "artifact").mkdir()
    (run / "artifact" / "thesis.txt").write_text("years of work", encoding="utf-8")
    status, err = fips(["run", str(finished_run.recipe), "--out", str(run)])
    assert_one_message(status, err, "is no artefact")
    assert [path.name for path in (run / "artifact").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("options", [[], ["--fresh"]])
@pytest.mark.parametrize(
    "place",
    [
        "artifact/thesis.txt", "artifact", "artifact.rejected/thesis.txt", ".artifact.old/thesis.txt",
        ".artifact.partial/thesis.txt", "report.html", "report.json/thesis.txt", "work", "work/model/thesis.txt",
    ],
)  # fmt: skip
def test_what_is_not_ours_is_refused_at_the_start(
    command: Command, tmp_path: Path, place: str, options: list[str]
) -> None:
    out = tmp_path / "run"
    (out / place).parent.mkdir(parents=True)
    (out / place).write_text("years of work", encoding="utf-8")
    before = hashes(out)
    status, _, err = command("run", write_recipe(tmp_path), "--out", out, *options)
    assert_one_message(status, err, f"--out {out}: ", str(out / place.partition("/")[0]))
    assert hashes(out) == before


@pytest.mark.parametrize("options", [[], ["--fresh"], ["--set", "seed=1"]])
def test_notes_in_an_artefact_are_refused_at_the_start(
    command: Command, finished_run: FinishedRun, tmp_path: Path, options: list[str]
) -> None:
    out = Path(shutil.copytree(finished_run.folder, tmp_path / "run"))
    (out / "artifact" / "notes.txt").write_text("years of work", encoding="utf-8")
    before = hashes(out)
    status, _, err = command("run", finished_run.recipe, "--out", out, *options)
    assert_one_message(status, err, f"--out {out}: ", "notes.txt: is no part of the artefact")
    assert hashes(out) == before


@pytest.mark.parametrize("limit", [0, 100, 50_000])
def test_disk_full_from_the_start(finished_run: FinishedRun, tmp_path: Path, limit: int) -> None:
    status, err = fips(["run", str(finished_run.recipe), "--out", str(tmp_path / "run")], file_limit=limit)
    assert_one_message(status, err, str(tmp_path / "run" / "work" / "model"), "cannot be written", "File too large")


@pytest.mark.parametrize(
    ("override", "limit", "place"),
    [
        ("calibration.samples=200", 50_000, "work/calibrate"),
        ("fit.steps=21", 1_000, "work/fit/group_0"),
        ("evaluation.samples=199", 1_000, "work/evaluate/dense"),
        ("seed=0", 5_000, "report.json"),  # nothing to compute
    ],
)
def test_disk_full_later(
    finished_run: FinishedRun, tmp_path: Path, override: str, limit: int, place: str
) -> None:
    run = Path(shutil.copytree(finished_run.folder, tmp_path / "run"))
    report = (run / "report.html").read_bytes()
    arguments = ["run", str(finished_run.recipe), "--out", str(run), "--set", override]
    status, err = fips(arguments, file_limit=limit)
    assert_one_message(status, err, str(run / place), "cannot be written", "File too large")
    assert artifact_hashes(run) == artifact_hashes(finished_run.folder)
    assert (run / "report.html").read_bytes() == report


def test_old_artefact_survives_a_full_disk(finished_run: FinishedRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run.folder, tmp_path / "run"))
    arguments = ["run", str(finished_run.recipe), "--out", str(run), "--set", "export.max_shard_size=8192"]
    status, err = fips(arguments, file_limit=100_000)
    assert_one_message(status, err, "cannot write the artefact", "File too large")
    assert artifact_hashes(run) == artifact_hashes(finished_run.folder)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in finished_run.folder.iterdir())


# --- damaged artefacts -----------------------------------------------------------------------------------------


def truncate(artifact: Path) -> None:
    data = (artifact / DATA_FILE).read_bytes()
    (artifact / DATA_FILE).write_bytes(data[:-1])


def flip_bit(artifact: Path) -> None:
    data = bytearray((artifact / DATA_FILE).read_bytes())
    data[len(data) // 2] ^= 4
    (artifact / DATA_FILE).write_bytes(data)


def remove_shard(artifact: Path) -> None:
    (artifact / DATA_FILE).unlink()


def remove_golden(artifact: Path) -> None:
    (artifact / "golden" / "pixel_values.npy").unlink()


def edit_manifest(artifact: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((artifact / "fips.json").read_text(encoding="utf-8"))
    edit(manifest)
    (artifact / "fips.json").write_text(json.dumps(manifest), encoding="utf-8")


def escape(artifact: Path) -> None:
    (artifact.parent / "secret.npy").write_bytes(b"")
    edit_manifest(artifact, lambda manifest: manifest["golden"]["inputs"].update(pixel_values="../secret.npy"))


def escape_by_link(artifact: Path) -> None:
    shutil.move(artifact / DATA_FILE, artifact.parent / DATA_FILE)
    (artifact / DATA_FILE).symlink_to(artifact.parent / DATA_FILE)


def truncate_manifest(artifact: Path) -> None:
    text = (artifact / "fips.json").read_text(encoding="utf-8")
    (artifact / "fips.json").write_text(text[: len(text) // 2], encoding="utf-8")


def other_schema(artifact: Path) -> None:
    edit_manifest(artifact, lambda manifest: manifest.update(schema_version=99))


def remove_manifest(artifact: Path) -> None:
    (artifact / "fips.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, [DATA_FILE, "bytes"]),
        (flip_bit, [DATA_FILE, "SHA-256"]),
        (remove_shard, [DATA_FILE, "missing"]),
        (remove_golden, ["pixel_values.npy", "missing"]),
        (escape, ["fips.json", "../secret.npy", "outside"]),
        (escape_by_link, ["fips.json", DATA_FILE, "outside"]),
        (truncate_manifest, ["fips.json", "not valid JSON"]),
        (other_schema, ["fips.json", "schema_version", "99"]),
        (remove_manifest, ["fips.json", "missing"]),
        (shutil.rmtree, ["fips.json", "missing"]),
    ],
)
@pytest.mark.parametrize("name", ["validate", "inspect", "bench", "eval"])
def test_damaged_artefact(
    command: Command, artifact: Path, name: str, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(artifact)
    before = hashes(artifact)
    status, _, err = command(name, artifact)
    assert_one_message(status, err, *words)
    assert hashes(artifact) == before
