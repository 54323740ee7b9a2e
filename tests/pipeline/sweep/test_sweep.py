"""Sweeps: points of a file, running, sharing, failing, resuming, engines, results, choosing."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from places import RECIPES, SAMPLES
from run_samples import TINY

from fips_ort.manifest import sha256
from pipeline import cli
from pipeline.evaluation.measurements import Samples, TokenSpeed, TokenSpeedRow
from pipeline.plumbing.byte_sizes import parse_bytes
from pipeline.plumbing.engines import Outcome
from pipeline.plumbing.errors import InputError, StageError
from pipeline.plumbing.files import read_json, write_json
from pipeline.plumbing.hardware import Hardware
from pipeline.plumbing.ownership import MARK
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.records import read_record, write_record
from pipeline.recipe.reading import load_recipe
from pipeline.report.schema import Memory, Report
from pipeline.sweep import runner
from pipeline.sweep.choose import choose_point, parse_percent
from pipeline.sweep.definition import Sweep, load_sweep
from pipeline.sweep.page import hover_text
from pipeline.sweep.plots import group_ids
from pipeline.sweep.results import Baseline, Results, Row, pareto_front
from pipeline.sweep.runner import finished_report, run_sweep

AXES: dict[str, Any] = {
    "bits": {
        "4": {"quantization.basis.bits": 4, "quantization.projections.bits": 4},
        "2": {"quantization.basis.bits": 2},
    },
    "method": {
        "fips": {},
        "dense": {
            "compression": {"method": "dense", "pattern": "dense"},
            "fit": None,
            "quantization.basis": None,
        },
    },
}


def write_sweep(folder: Path, **changes: Any) -> Path:
    """A sweep over the tiny recipe, with some keys replaced."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    content = {"name": "tiny-sweep", "recipe": "tiny.yaml", "threads": 1, "axes": AXES, **changes}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


# --- the file --------------------------------------------------------------------------------------------------


def test_points_are_all_combinations(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, set={"fit.steps": 7}))
    assert [point.name for point in sweep.points] == ["4-fips", "4-dense", "2-fips", "2-dense"]
    assert sweep.axes == {"bits": ["4", "2"], "method": ["fips", "dense"]}
    first, second = sweep.points[:2]
    assert first.labels == {"bits": "4", "method": "fips"}
    assert first.recipe.name == "tiny-sweep-4-fips"
    assert first.recipe.quantization.basis is not None
    assert first.recipe.quantization.basis.bits == 4
    assert first.recipe.fit is not None
    assert first.recipe.fit.steps == 7
    assert first.recipe.model == load_recipe(tmp_path / "tiny.yaml").model
    # Later axes override earlier ones: the method takes the basis away, whose bits were set.
    assert second.recipe.quantization.basis is None
    assert second.recipe.fit is None
    assert second.recipe.quantization.projections.bits == 4


def test_an_axis_may_be_a_list_of_a_keys_values(tmp_path: Path) -> None:
    axes = {"compression.budget": [0.6, 0.4], "compression.groups": [1, [[0, 1], [2]]]}
    sweep = load_sweep(write_sweep(tmp_path, axes=axes))
    assert [point.name for point in sweep.points] == [
        "budget_0.6-groups_1",
        "budget_0.6-groups_0_1_2",
        "budget_0.4-groups_1",
        "budget_0.4-groups_0_1_2",
    ]
    assert sweep.points[3].recipe.compression.budget == 0.4
    assert sweep.points[3].recipe.compression.groups == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": {}}, ["axes", "at least 1"]),
        ({"axes": {"bits": {}}}, ["axes.bits", "at least 1"]),
        ({"axes": {"bits": 4}}, ["axes.bits", "dictionary"]),
        ({"bogus": 1}, ["bogus", "unknown key"]),
        ({"recipe": "none.yaml"}, ["none.yaml", "No such file"]),
        ({"threads": 0}, ["threads"]),
        ({"axes": {"compression.budgte": [0.5]}}, ["point budgte_0.5", "compression.budgte", "unknown key"]),
        ({"axes": {"compression.budget": [0.5, -1]}}, ["point budget_1", "compression.budget", "-1"]),
        ({"axes": {"a": {"x y": {}, "x/y": {}}}}, ["two points", "x_y"]),
        ({"axes": {"a": {"Big": {}, "big": {}}}}, ["two points", "Big and big"]),
        ({"axes": {"a": {"..": {}}}}, ["axes", "'..'", "no letter or digit"]),
        ({"axes": {"a": {".": {}}}}, ["axes", "'.'", "no letter or digit"]),
        ({"axes": {"a": {"": {}}}}, ["axes", "''", "no letter or digit"]),
        ({"axes": {"a": {"/": {}}}}, ["axes", "'_'", "no letter or digit"]),
        ({"axes": {"a": {"\0": {}}}}, ["not valid YAML", "characters that no text has"]),
        ({"axes": {"a": {".hidden": {}}}}, ["axes", "'.hidden'", "no letter or digit"]),
        ({"axes": {"a": {"..": {}}, "b": {"..": {}}}}, ["axes", "'..-..'", "no letter or digit"]),
        ({"axes": {"a": {"dot.": {}}}}, ["axes", "'dot.'", "ends in a full stop"]),
        ({"axes": {"a": {"nul": {}}}}, ["axes", "'nul'", "device on Windows"]),
        ({"axes": {"a": {"COM1.x": {}}}}, ["axes", "'COM1.x'", "device on Windows"]),
        ({"axes": {"a": {"x" * 151: {}}}}, ["axes", "151 characters"]),
        (
            {"axes": {"a": {"x": {"quantization.basis": None}, "y": {}}, "b": {"z": {"quantization.basis.bits": 2}}}},
            ["x-z"],
        ),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_runs(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    path = write_sweep(tmp_path, **changes)
    with pytest.raises(InputError) as refused:
        load_sweep(path)
    for word in [*words, *([] if "recipe" in changes else [str(path)])]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_sweeps_are_valid(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.name == path.stem
    assert len(sweep.points) > 1


# --- Pareto front ----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_is_what_no_other_beats(costs: list[tuple[int, int]]) -> None:
    front = pareto_front(range(len(costs)), [(float(first), float(second)) for first, second in costs])
    on_front = {costs[index] for index in front}
    beaten = {
        cost for cost in costs if any(other != cost and other[0] <= cost[0] and other[1] <= cost[1] for other in costs)
    }
    assert on_front == set(costs) - beaten
    assert len(on_front) == len(front)  # of equal points, one
    assert [costs[index][0] for index in front] == sorted(costs[index][0] for index in front)


# --- running ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def quick_points() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "COMMAND", "unmeasured_cli")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SAMPLES), os.environ.get("PYTHONPATH", "")]))
        yield


class Said(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return load_sweep(write_sweep(tmp_path_factory.mktemp("definition")))


@pytest.fixture(scope="module")
def serial(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results, list[str]]:
    """The sweep's folder, its results, and what it said. Not to be changed."""
    folder, progress = tmp_path_factory.mktemp("serial") / "out", Said()
    return folder, run_sweep(sweep, folder, progress), progress.lines


Serial = tuple[Path, Results, list[str]]


def test_results_are_those_of_the_points_reports(serial: Serial, sweep: Sweep) -> None:
    folder, results, _ = serial
    assert [row.point for row in results.points] == [point.name for point in sweep.points]
    assert not results.failures
    lines = list(csv.DictReader(io.StringIO((folder / "sweep.csv").read_text(encoding="utf-8"))))
    content = read_json(folder / "sweep.json")
    assert [line["point"] for line in lines] == [point.name for point in sweep.points]
    for line, entry in zip(lines, content["points"], strict=True):
        report = read_json(folder / "points" / line["point"] / "report.json")
        assert float(line["value"]) == entry["value"] == report["quality"]["onnx_native"]
        assert float(line["loss"]) == pytest.approx(report["quality"]["dense"] - report["quality"]["onnx_native"])
        assert float(line["stored_bits"]) == report["bits_per_weight"]["stored"]
        assert int(line["artifact_bytes"]) == report["bytes"]["artifact"]
        assert line["status"] == "done"
        assert entry["seconds"] == pytest.approx(sum(report["seconds"].values()))
        assert (line["bits"], line["method"]) == (entry["labels"]["bits"], entry["labels"]["method"])
        assert (int(line["pareto_stored_bits"]) == 1) == ("stored_bits" in entry["pareto"])
    assert {line["method"]: float(line["paper_bits"]) for line in lines if line["bits"] == "4"}["dense"] == 4.0
    smallest = min(lines, key=lambda line: int(line["artifact_bytes"]))
    assert smallest["pareto_artifact_bytes"] == "1"


def test_common_stages_are_computed_once(serial: Serial) -> None:
    folder, _, lines = serial
    for stage in ("model", "evaluate/dense", "calibrate"):
        assert sum(line.endswith(f": {stage}") for line in lines) == 1
        assert sum(f": {stage}: shared" in line for line in lines) == 3
    assert sum(line.endswith(": fit/group_0") for line in lines) == 1  # dense has none, two bits the same
    assert sum(line.endswith(": qat/0-start") for line in lines) == 4
    one, other = (folder / "points" / name / "work/calibrate/stage.json" for name in ("4-fips", "2-dense"))
    assert one.samefile(other)


def test_pages_show_every_point(serial: Serial) -> None:
    folder, results, _ = serial
    html = (folder / "sweep.html").read_text(encoding="utf-8")
    markdown = (folder / "sweep.md").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "src=" not in html
    for row in results.points:
        assert f"| {row.point} |" in markdown
        assert f"<td>{row.point}</td>" in html
        shown = hover_text(results, row)
        assert f"{row.stored_bits:.2f} stored bits" in shown
    assert html.count("<title>") == 1 + len(group_ids(results))  # the page's own, and one a mark in every panel
    assert "quantization.basis.bits: 2" in html
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_sweep_runs_nothing_again(serial: Serial, sweep: Sweep) -> None:
    folder, _, _ = serial
    before = {path: path.read_bytes() for path in folder.glob("sweep.*")}
    progress = Said()
    run_sweep(sweep, folder, progress)
    assert progress.lines == ["tiny-sweep: 4 points, 4 finished before"]
    assert {path: path.read_bytes() for path in folder.glob("sweep.*")} == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.json", b"{}"),
        ("report.json", b'{"quality": {"onnx_native": 1.0}}'),
        ("report.json", b"[1]"),
        ("report.json", b"\xff"),
        ("report.json", None),
        ("finished.json", b'{"key": 1}'),
        ("finished.json", b'["key"]'),
        ("finished.json", None),
    ],
)
def test_a_point_without_a_whole_report_is_not_finished(
    serial: Serial, sweep: Sweep, tmp_path: Path, name: str, content: bytes | None
) -> None:
    point = sweep.points[0]
    folder = tmp_path / "points" / point.name
    folder.mkdir(parents=True)
    for file in ("report.json", "finished.json"):
        shutil.copy(serial[0] / "points" / point.name / file, folder)
    assert finished_report(tmp_path, point) == read_record(Report, folder / "report.json")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert finished_report(tmp_path, point) is None


@pytest.mark.parametrize("change", ["digit", "recipe"])
def test_a_changed_or_foreign_report_is_no_finished_one(
    serial: Serial, sweep: Sweep, tmp_path: Path, change: str
) -> None:
    """A report that reads well, with another figure in it, or that of another point with its own mark."""
    point, other = sweep.points[:2]
    folder = tmp_path / "points" / point.name
    folder.mkdir(parents=True)
    shutil.copy(serial[0] / "points" / point.name / "finished.json", folder)
    if change == "digit":
        report = read_json(serial[0] / "points" / point.name / "report.json")
        report["quality"]["onnx_native"] = report["quality"]["dense"]
        write_json(folder / "report.json", report)
    else:
        shutil.copy(serial[0] / "points" / other.name / "report.json", folder)
        mark = read_json(folder / "finished.json") | {"report_sha256": sha256(folder / "report.json")}
        write_json(folder / "finished.json", mark)
    assert finished_report(tmp_path, point) is None


def test_a_point_whose_command_leaves_another_report_has_failed(
    serial: Serial, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = sweep.points[0]
    folder = tmp_path / "points" / point.name
    folder.mkdir(parents=True)
    (tmp_path / MARK).touch()
    for content in (b"{}", (serial[0] / "points" / sweep.points[1].name / "report.json").read_bytes()):
        (folder / "report.json").write_bytes(content)
        monkeypatch.setattr(runner, "run_side_by_side", lambda *_: [Outcome(point.name, 0, "")])
        with pytest.raises(StageError, match=r"report\.json is damaged, or is another recipe's"):
            run_sweep(replace(sweep, points=(point,)), tmp_path, Said())


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("place", ["points/mine.txt", "shared/mine.txt", "sweep.csv", "points"])
def test_a_sweep_refuses_a_folder_that_holds_something_else(
    sweep: Sweep, tmp_path: Path, place: str, fresh: bool
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=rf"--out {tmp_path}: .* was not made by fips"):
        run_sweep(sweep, tmp_path, Said(), fresh=fresh)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [place]


def test_a_fresh_sweep_deletes_its_own_results_only(
    serial: Serial, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(serial[0], folder)
    mine = [folder / place for place in ("mine.txt", "points/mine/a.txt", "shared/mine.txt", "points/4-fips/mine.txt")]
    mine.append(folder / "points/4-fips/work/my_dataset/stage.json")
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    stopped = [Outcome(point.name, 1, "stopped") for point in sweep.points]
    monkeypatch.setattr(runner, "run_side_by_side", lambda *_: stopped)
    with pytest.raises(StageError, match="no point"):
        run_sweep(sweep, folder, Said(), fresh=True)
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)
    assert not [*folder.rglob("factors.safetensors")]
    assert all(finished_report(folder, point) is None for point in sweep.points)


def test_points_side_by_side_give_the_same(serial: Serial, sweep: Sweep, tmp_path: Path) -> None:
    run_sweep(sweep, tmp_path / "out", Said(), at_once=2)
    assert (tmp_path / "out/sweep.csv").read_text() == (serial[0] / "sweep.csv").read_text()


def test_ray_gives_the_same(serial: Serial, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    progress = Said()
    try:
        run_sweep(sweep, tmp_path / "out", progress, engine="ray")
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert (tmp_path / "out/sweep.csv").read_text() == (serial[0] / "sweep.csv").read_text()
    assert sum("done" in line for line in progress.lines) == 4


def test_a_killed_sweep_resumes_with_the_same_result(serial: Serial, sweep: Sweep, tmp_path: Path) -> None:
    definition = write_sweep(tmp_path / "definition")
    program = (
        "from pipeline.sweep import runner; runner.COMMAND = 'unmeasured_cli'; from pipeline.cli import main; main()"
    )
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", program, "sweep", str(definition), "--out", str(out), "--jobs", "1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert child.stderr is not None
    seen = []
    for line in child.stderr:
        seen.append(line)
        if line.startswith("4-dense: qat/1-local"):
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert child.returncode == -signal.SIGKILL, "".join(seen)
    assert not (out / "sweep.csv").exists()
    assert (out / "points/4-fips/finished.json").exists()
    _wait_until_free(out / "points/4-dense/work/lock")
    progress = Said()
    run_sweep(sweep, out, progress)
    assert progress.lines[0] == "tiny-sweep: 4 points, 1 finished before"
    assert (out / "sweep.csv").read_text() == (serial[0] / "sweep.csv").read_text()


def _wait_until_free(lock: Path) -> None:
    """The point of a killed sweep ends by itself, which takes a moment."""
    import fcntl

    until = time.monotonic() + 20
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                assert time.monotonic() < until, "the point goes on after its sweep was killed"
                time.sleep(0.1)
            else:
                return


def test_a_failed_point_does_not_stop_the_others(tmp_path: Path) -> None:
    axes = {"compression.budget": [0.01, 0.6]}  # the first has no rank left, which only the model tells
    progress = Said()
    results = run_sweep(load_sweep(write_sweep(tmp_path, axes=axes)), tmp_path / "out", progress)
    assert [row.point for row in results.points] == ["budget_0.6"]
    (failure,) = results.failures
    assert (failure.point, failure.labels) == ("budget_0.01", {"compression.budget": "budget 0.01"})
    assert "compression.budget" in failure.message
    assert any(line.startswith("budget_0.01: failed; the others go on") for line in progress.lines)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out/sweep.csv").read_text())))
    assert [line["status"] for line in lines] == ["failed", "done"]
    assert "compression.budget" in (tmp_path / "out/sweep.md").read_text()
    assert read_record(Results, tmp_path / "out/sweep.json") == results


def test_a_sweep_of_failures_fails(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, axes={"compression.budget": [0.01]})
    with pytest.raises(StageError, match=r"no point.*\n.*budget_0\.01.*compression\.budget"):
        run_sweep(load_sweep(path), tmp_path / "out", Said())


def test_without_ray_the_remedy_is_named(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--engine ray.*pip install 'fips-onnx\[ray\]'"):
        run_sweep(sweep, tmp_path / "out", Said(), engine="ray")


# --- choosing --------------------------------------------------------------------------------------------------


@pytest.fixture
def chosen_from(tmp_path: Path) -> Path:
    """A sweep's result with four points: (loss, bytes) falling, and one that is beaten."""
    figures = {"a": (0.30, 100_000_000), "b": (0.10, 150_000_000), "c": (0.02, 200_000_000), "d": (0.25, 160_000_000)}
    row = TokenSpeedRow(
        backend="native",
        prefill_tokens_per_second=100.0,
        decode_tokens_per_second=50.0,
        prefill_ratio_to_int4=1.0,
        decode_ratio_to_int4=1.0,
    )
    points = tuple(
        Row(
            point=name,
            labels={"name": name},
            value=14.0 * (1 + loss),
            standard_error=0.2,
            loss=loss,
            loss_standard_error=0.01,
            kl_mean=0.1,
            same_top1=0.8,
            paper_bits=2.5,
            stored_bits=3.0,
            artifact_bytes=size,
            mlp_bytes=size // 2,
            speed=TokenSpeed(unit="tokens/s", prompt_tokens=128, generated_tokens=32, threads=1, rows=(row,)),
            memory=Memory(load_rss_bytes=1, peak_rss_bytes=1, pipeline_peak_rss_bytes=1, peak_rss_by_stage={}),
            seconds=1.0,
            overrides={},
            recipe={**TINY, "name": f"s-{name}"},
        )
        for name, (loss, size) in figures.items()
    )
    results = Results(
        schema_version=2,
        name="s",
        axes={"name": tuple(figures)},
        metric="perplexity",
        dense=Baseline(value=14.0, standard_error=0.2, bytes_float16=500_000_000),
        data=Samples(source="text", hash="0", train_samples=1, calibration_samples=1, test_samples=1),
        hardware=Hardware(cpu="Example CPU", cores=1, memory_bytes=2**30),
        versions={},
        points=points,
        failures=(),
    )
    write_record(tmp_path / "sweep.json", results)
    return tmp_path


@pytest.mark.parametrize(
    ("max_bytes", "max_loss", "expected"),
    [
        ("150MB", None, "b"),
        ("149.9MB", None, "a"),
        ("1GB", None, "c"),
        (None, "10%", "b"),
        (None, "50%", "a"),
        (None, "2%", "c"),
        ("170MB", "28%", "b"),
        ("1GiB", "30%", "c"),
    ],
)
def test_choose(chosen_from: Path, max_bytes: str | None, max_loss: str | None, expected: str) -> None:
    assert choose_point(chosen_from, max_bytes, max_loss).point == expected
    assert choose_point(chosen_from / "sweep.json", max_bytes, max_loss).point == expected


def test_the_chosen_recipe_can_be_run(chosen_from: Path, tmp_path: Path) -> None:
    chosen = choose_point(chosen_from, "150MB", None)
    path = tmp_path / "best.yaml"
    chosen.write_recipe(path)
    recipe = load_recipe(path)
    assert recipe.name == "s-b"
    assert recipe.model_dump(exclude={"name"}) == load_tiny(tmp_path).model_dump(exclude={"name"})
    assert "1.100 × dense" in path.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="there already"):
        chosen.write_recipe(path)


def test_the_command_writes_the_chosen_recipe(
    chosen_from: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(chosen_from)
    monkeypatch.setattr(sys, "argv", ["fips", "choose", str(chosen_from), "--max-loss", "10%"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert load_recipe(chosen_from / "s-b.yaml").name == "s-b"
    first, second = capsys.readouterr().out.splitlines()
    assert first == "b: perplexity 15.40 (1.100 × dense), 150 MB, 3.00 stored bits"
    assert second == "s-b.yaml: run it with `fips run s-b.yaml`"


def load_tiny(folder: Path) -> Any:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return load_recipe(path)


@pytest.mark.parametrize(
    ("max_bytes", "max_loss", "words"),
    [
        (None, None, ["--max-bytes", "--max-loss"]),
        ("99MB", None, ["no point", "smallest is a:", "100 MB", "best is c:"]),
        ("150MB", "5%", ["no point"]),
        ("many", None, ["--max-bytes many", "150MB"]),
        ("5XB", None, ["--max-bytes 5XB"]),
        (None, "0.02", ["--max-loss 0.02", "2%"]),
    ],
)
def test_limits_that_cannot_be_kept(
    chosen_from: Path, max_bytes: str | None, max_loss: str | None, words: list[str]
) -> None:
    with pytest.raises(InputError) as refused:
        choose_point(chosen_from, max_bytes, max_loss)
    assert all(word in str(refused.value) for word in words)


def test_choosing_from_what_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sweep\.json.*cannot be read"):
        choose_point(tmp_path, "1MB", None)
    for content, problem in (
        ("[]", "the file: Input should be an object"),
        ('{"schema_version": 1}', "schema_version: Input should be 2"),
        ('{"schema_version": 2}', "name: Field required"),
    ):
        (tmp_path / "sweep.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=rf"sweep\.json: is not the result .*\({problem}\).*run it again"):
            choose_point(tmp_path, "1MB", None)


@pytest.mark.parametrize(
    ("text", "expected"), [("150MB", 150_000_000), ("1.5 kB", 1500), ("2GiB", 2**31), ("800", 800), ("3mb", 3_000_000)]
)
def test_bytes_with_units(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_percent() -> None:
    assert parse_percent("2%") == 0.02
    assert parse_percent("-1.5 %") == -0.015
