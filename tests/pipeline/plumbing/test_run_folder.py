"""Stages of a run folder: computed once, again when what they depend on changes, never half."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.plumbing import run_folder
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import read_json, write_aside, write_json
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.run_folder import RunFolder, StageResult, code_digest, stage_key, versions

BEFORE = StageResult(Path("before"), "key of before")


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
    assert done == {"key": first.key, **cost, "files": {"result.txt": 6}}
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


@pytest.mark.parametrize("damage", [remove, truncate])
@pytest.mark.parametrize("name", ["result.txt", "stage.json"])
def test_damaged_result_is_computed_again(folder: RunFolder, damage: Callable[[Path], None], name: str) -> None:
    stage = Recorder()
    folder.stage("fit", {}, [], stage)
    damage(folder.work / "fit" / name)
    folder.stage("fit", {}, [], stage)
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
