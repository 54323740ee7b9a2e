"""Stages of a run folder: computed once, again when what they depend on changes, never half."""

import hashlib
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.plumbing import run_folder
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import read_json, write_aside, write_json
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.run_folder import RunFolder, StageResult, clear_shared, code_digest, stage_key, versions

BEFORE = StageResult(Path("before"), "key of before")


RESULT_SHA256 = hashlib.sha256(b"result").hexdigest()


class Recorder:
    """A stage that writes ``content`` and counts how often."""

    def __init__(self, content: str = "result") -> None:
        self.content = content
        self.found: list[list[str]] = []

    def __call__(self, folder: Path) -> None:
        self.found.append(sorted(path.name for path in folder.iterdir()))
        (folder / "result.txt").write_text(self.content, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", Progress())


def test_result_is_reused(folder: RunFolder) -> None:
    stage = Recorder()
    first = folder.stage("fit", {"steps": 3}, [BEFORE], stage)
    second = folder.stage("fit", {"steps": 3}, [BEFORE], stage)
    assert first == second
    assert stage.found == [["started.json"]]
    assert folder.reused == ["fit"]
    done = read_json(folder.work / "fit" / "stage.json")
    cost = {"seconds": folder.seconds["fit"], "peak_rss_bytes": folder.peak_rss_bytes["fit"]}
    assert done == {"key": first.key, **cost, "files": {"result.txt": {"bytes": 6, "sha256": RESULT_SHA256}}}
    assert not (folder.work / "fit" / "started.json").exists()


@pytest.mark.parametrize(
    ("settings", "inputs"),
    [
        ({"steps": 4}, [BEFORE]),
        ({"steps": 3}, [StageResult(BEFORE.folder, "other")]),
        ({"steps": 3}, [BEFORE, BEFORE]),
        ({"steps": 3}, []),
    ],
)
def test_other_key_starts_from_nothing(
    folder: RunFolder, settings: dict[str, int], inputs: list[StageResult]
) -> None:
    stage = Recorder()
    first = folder.stage("fit", {"steps": 3}, [BEFORE], stage)
    assert folder.stage("fit", settings, inputs, stage).key != first.key
    assert stage.found == [["started.json"]] * 2


def test_key_covers_code_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {stage_key("fit", {}, [])}
    keys.add(stage_key("factorize", {}, []))
    monkeypatch.setattr(run_folder, "code_digest", lambda: "0" * 64)
    keys.add(stage_key("fit", {}, []))
    monkeypatch.setattr(run_folder, "versions", lambda: {"torch": "1.0"})
    keys.add(stage_key("fit", {}, []))
    assert len(keys) == 4
    assert all(len(key) == 64 for key in keys)


def test_code_and_versions() -> None:
    assert code_digest() == code_digest.__wrapped__()
    assert {"torch", "torchao", "transformers", "numpy", "onnxruntime", "fips-onnx", "fips-ort"} <= versions().keys()


@pytest.mark.parametrize("installed", [["onnxruntime-gpu"], ["onnxruntime-qnn"], ["onnxruntime-directml"], []])
def test_another_flavour_of_a_library_counts(monkeypatch: pytest.MonkeyPatch, installed: list[str]) -> None:
    """And one that is used from its build folder, without any distribution, is no obstacle."""
    version = importlib.metadata.version

    def of(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.99.0" if name in installed else version(name)

    monkeypatch.setattr(importlib.metadata, "version", of)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": installed * 2})
    found = versions.__wrapped__()
    assert found["onnxruntime"] == (f"1.99.0 ({installed[0]})" if installed else "unknown")
    assert found["torch"] == version("torch")


def test_interrupted_stage_finds_what_it_left(folder: RunFolder) -> None:
    def interrupted(path: Path) -> None:
        (path / "checkpoint.pt").write_bytes(b"half way")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.stage("fit", {}, [], interrupted)
    stage = Recorder()
    folder.stage("fit", {}, [], stage)
    assert stage.found == [["checkpoint.pt", "started.json"]]


def test_checkpoint_of_another_key_is_deleted(folder: RunFolder) -> None:
    def interrupted(path: Path) -> None:
        (path / "checkpoint.pt").write_bytes(b"half way")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.stage("fit", {"steps": 1}, [], interrupted)
    stage = Recorder()
    folder.stage("fit", {"steps": 2}, [], stage)
    assert stage.found == [["started.json"]]


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Another content of the same size, in a file of the same time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("damage", [remove, truncate, flip])
@pytest.mark.parametrize("name", ["result.txt", "stage.json"])
def test_damaged_result_is_computed_again(folder: RunFolder, damage: Callable[[Path], None], name: str) -> None:
    stage = Recorder()
    folder.stage("fit", {}, [], stage)
    damage(folder.work / "fit" / name)
    RunFolder(folder.folder, Progress()).stage("fit", {}, [], stage)
    assert stage.found == [["started.json"]] * 2
    assert (folder.work / "fit" / "result.txt").read_text(encoding="utf-8") == "result"


@pytest.mark.parametrize("change", [{"seconds": None}, {"peak_rss_bytes": "1"}, {"more": 1}])
def test_stage_file_of_another_form_means_computed_again(folder: RunFolder, change: dict[str, object]) -> None:
    stage = Recorder()
    folder.stage("fit", {}, "", stage)
    path = folder.work / "fit" / "stage.json"
    write_json(path, read_json(path) | change)
    folder.stage("fit", {}, "", stage)
    assert stage.found == [["started.json"]] * 2


def test_result_that_does_not_hold_any_more_is_computed_again(folder: RunFolder) -> None:
    stage = Recorder()
    folder.stage("export", {}, [], stage)
    folder.stage("export", {}, [], stage, is_valid=lambda _: False)
    folder.stage("export", {}, [], stage, is_valid=lambda path: path == folder.work / "export")
    assert len(stage.found) == 2


# --- what is not ours --------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fresh", [False, True])
def test_folders_that_are_no_stages_are_left_alone(folder: RunFolder, fresh: bool) -> None:
    with folder.lock():
        folder.stage("fit/group_0", {}, [], Recorder())
    own = folder.work / "my_dataset"
    own.mkdir()
    (own / "stage.json").write_text("mine", encoding="utf-8")
    (folder.work / "my_link").symlink_to(own)
    (folder.work / "notes.txt").write_text("mine", encoding="utf-8")
    again = RunFolder(folder.folder, Progress(), fresh=fresh)
    with again.lock():
        assert (again.work / "fit/group_0/stage.json").exists() != fresh
        again.stage("fit/group_0", {"steps": 1}, [], Recorder())
    assert (own / "stage.json").read_text(encoding="utf-8") == "mine"
    assert (folder.work / "my_link").resolve() == own
    assert (folder.work / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("place", ["work", "work/thesis.txt", "work/lock", "work/fit/group_0/stage.json"])
def test_a_work_folder_that_no_run_has_made_is_refused(tmp_path: Path, place: str, fresh: bool) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine", encoding="utf-8")
    before = tree(tmp_path)
    for attempt in (RunFolder.check, lambda run: run.lock().__enter__()):
        with pytest.raises(InputError, match=str(path if place == "work" else tmp_path / place[:8])):
            attempt(RunFolder(tmp_path, Progress(), fresh=fresh))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("place", ["fit", "fit/notes.txt", "pack/a/b.txt", "fit/group_0/notes.txt", "qat/1-local"])
def test_a_file_in_the_way_of_a_stage_is_refused_at_the_start(folder: RunFolder, place: str, fresh: bool) -> None:
    with folder.lock():
        if place != "fit":
            folder.stage("fit/group_0", {}, [], Recorder())
    path = folder.work / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine", encoding="utf-8")
    before = tree(folder.folder)
    again = RunFolder(folder.folder, Progress(), fresh=fresh)
    with pytest.raises(InputError, match=f"{path} is no result of a run"):
        again.check()
    with pytest.raises(InputError, match=f"{path} is no result of a run"), again.lock():
        pass
    assert tree(folder.folder) == before
    path.unlink()
    with again.lock():
        pass


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("place", ["fit", "fit/group_0", "calibrate"])
def test_nothing_is_deleted_through_a_link(folder: RunFolder, tmp_path: Path, place: str, fresh: bool) -> None:
    with folder.lock():
        folder.stage("fit/group_0", {}, [], Recorder())
        folder.stage("calibrate", {}, [], Recorder())
    elsewhere = tmp_path / "elsewhere"
    (folder.work / place).rename(elsewhere)
    (folder.work / place).symlink_to(elsewhere)
    before = tree(elsewhere)
    with pytest.raises(InputError, match="in the way"), RunFolder(folder.folder, Progress(), fresh=fresh).lock():
        pass
    assert tree(elsewhere) == before
    assert (folder.work / place).is_symlink()


def test_work_may_be_a_link_to_another_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/work").symlink_to(tmp_path / "disk")
    for _ in range(2):
        with RunFolder(tmp_path / "run", Progress(), fresh=True).lock():
            pass
    (tmp_path / "disk/mine").mkdir()
    with RunFolder(tmp_path / "run", Progress(), fresh=True).lock():
        assert (tmp_path / "disk/mine").is_dir()


def test_a_killed_stage_is_no_obstacle(folder: RunFolder) -> None:
    def killed(path: Path) -> None:
        (path / "part").mkdir()
        (path / "part/half.txt").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), folder.lock():
        folder.stage("fit", {"steps": 1}, [], killed)
    stage = Recorder()
    again = RunFolder(folder.folder, Progress())
    with again.lock():
        again.stage("fit", {"steps": 2}, [], stage)
    assert stage.found == [["started.json"]]


# --- shared results ----------------------------------------------------------------------------------------------


def test_a_damaged_shared_result_is_computed_again_and_replaced(tmp_path: Path) -> None:
    shared, mine = tmp_path / "shared", tmp_path / "shared/mine.txt"
    for number, expected in enumerate((1, 0, 1, 0)):
        run, stage = RunFolder(tmp_path / str(number), Progress(), shared=shared), Recorder()
        with run.lock():
            result = run.stage("fit", {}, [], stage)
        assert len(stage.found) == expected
        assert (result.folder / "result.txt").read_text(encoding="utf-8") == "result"
        mine.write_text("mine", encoding="utf-8")
        if number == 1:
            flip(shared / result.key / "result.txt")
    clear_shared(shared)
    assert [path.name for path in shared.iterdir()] == ["mine.txt"]


def test_failure_to_write_names_the_stage(folder: RunFolder) -> None:
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"work/fit: cannot be written: No space left on device"):
        folder.stage("fit", {}, [], fail)
    assert not (folder.work / "fit" / "stage.json").exists()


def test_lock_is_exclusive_and_lifted(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path, Progress()), RunFolder(tmp_path, Progress(), fresh=True)
    with first.lock():
        first.stage("fit", {}, [], Recorder())
        with pytest.raises(InputError, match="another run"), second.lock():
            pass
        assert (tmp_path / "work" / "fit" / "stage.json").exists()
    with second.lock():
        assert not (tmp_path / "work" / "fit").exists()


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": [1, 2]})
    assert read_json(path) == {"a": [1, 2]}

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"file\.json: cannot be written: No space left on device"):
        write_aside(path, fail)
    assert read_json(path) == {"a": [1, 2]}
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]
