import contextlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from artifact_samples import SHARD, edit_manifest, write_in_shards
from hypothesis import given
from hypothesis import strategies as st
from packed_samples import images, sample, write_sample

from exporters.artifact import check_replaceable, plan_shards, recover, shard_names
from exporters.audit import audit
from fips_ort.errors import ArtifactError
from fips_ort.load import check_onnxruntime, load
from fips_ort.manifest import MANIFEST, parse_manifest, read_manifest, sha256
from fips_ort.validate import main, validate


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact in several shards; not to be changed."""
    return write_in_shards(tmp_path_factory.mktemp("artifacts") / "sound")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- writing ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1 << 22), max_size=40), st.integers(4096, 1 << 22))
def test_shards_hold_every_tensor_once_aligned_and_within_the_limit(sizes: list[int], limit: int) -> None:
    shards = plan_shards(sizes, limit)
    assert [index for shard in shards for index, _ in shard] == list(range(len(sizes)))
    for shard in shards:
        ends = [offset + sizes[index] for index, offset in shard]
        assert ends[-1] <= limit or len(shard) == 1
        assert shard[0][1] == 0
        for (index, offset), end in zip(shard[1:], ends[:-1], strict=True):
            assert end <= offset < end + 4096
            assert offset % (4096 if sizes[index] >= 1 << 20 else 64) == 0


def test_a_tensor_above_the_limit_gets_its_own_shard() -> None:
    assert plan_shards([10, 5000, 10, 20], 4096) == [[(0, 0)], [(1, 0)], [(2, 0), (3, 64)]]
    assert shard_names(1) == ["model.onnx.data"]
    assert shard_names(2) == ["model-00001-of-00002.onnx.data", "model-00002-of-00002.onnx.data"]


def test_the_folder_holds_graph_shards_and_what_the_manifest_lists(sound: Path) -> None:
    manifest = read_manifest(sound)
    shards = sorted(path.name for path in sound.glob("*.onnx.data"))
    assert shards == shard_names(len(shards))
    assert len(shards) > 2
    assert all((sound / name).stat().st_size <= SHARD for name in shards)
    assert {entry.path for entry in manifest.files} == contents(sound).keys() - {MANIFEST}
    assert {"config.json", "README.md", manifest.library, "golden/pixel_values.npy"} <= contents(sound).keys()
    # The graph alone is small: no tensor of 256 bytes or more is inside.
    graph = onnx.load(sound / manifest.model, load_external_data=False)
    assert all(len(tensor.raw_data) < 256 for tensor in graph.graph.initializer)
    assert sum(tensor.bytes for tensor in manifest.tensors if tensor.file.endswith(".data")) <= sum(
        (sound / name).stat().st_size for name in shards
    )
    assert parse_manifest((sound / MANIFEST).read_text(), "here") == manifest
    assert [path.name for path in sound.parent.iterdir()] == [sound.name]


def test_manifest_lists_every_packed_weight(sound: Path) -> None:
    weights = {entry.name: entry for entry in read_manifest(sound).weights}
    exported = sample("vit", "1:4")
    attention = {f"vit.layers.{i}.attention.{name}_proj" for i in range(3) for name in "qkvo"}
    assert weights.keys() == exported.packed.weights().keys() | attention
    entry = weights["vit.layers.0.mlp.fc1"]
    assert (entry.rows, entry.columns, entry.pattern, entry.segments) == (64, 64, "1:4", [0, 64, 0, 0])
    # 64 × 64 entries: a quarter kept, 4 bits and a 2-bit index each; a float16 scale per 32 columns.
    assert entry.bytes == 64 * 64 // 4 * 4 // 8 + 64 * 64 // 4 * 2 // 8 + 64 * 2 * 2


def test_saved_graph_passes_the_checker_and_the_audit(sound: Path) -> None:
    onnx.checker.check_model(str(sound / "model.onnx"))
    exported = sample("vit", "1:4")
    rows = audit(sound, exported.packed, "float16")
    tensors = read_manifest(sound).tensors
    assert [(row.name, row.bytes) for row in rows] == [(tensor.name, tensor.bytes) for tensor in tensors]


def test_two_writes_give_identical_bytes(sound: Path, tmp_path: Path) -> None:
    write_in_shards(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(sound)


def test_the_graph_in_memory_is_left_as_it_was(tmp_path: Path) -> None:
    exported = sample("vit", "1:4")
    before = ir.to_proto(exported.graph).SerializeToString()
    write_sample(tmp_path / "artifact", exported)
    assert ir.to_proto(exported.graph).SerializeToString() == before
    assert (tmp_path / "artifact" / "model.onnx.data").is_file()


def test_a_new_artefact_replaces_the_old_one_whole(folder: Path) -> None:
    (folder / "stale").write_text("from the old artefact")
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit_manifest(folder, files=[*files, {"path": "stale", "bytes": 21, "sha256": sha256(folder / "stale")}])
    write_sample(folder, sample("vit", "1:4"), title="new")
    assert "stale" not in contents(folder)
    assert not list(folder.glob("model-*"))
    assert read_manifest(folder).recipe == {"name": "new"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """While active, the system refuses to let this process write a file beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 4000, 20000])
def test_an_old_artefact_survives_a_write_that_fails(folder: Path, limit: int) -> None:
    exported = sample("vit", "1:4")
    before = contents(folder)
    with file_size_limit(limit), pytest.raises(ArtifactError) as caught:
        write_sample(folder, exported)
    assert str(caught.value) == f"{folder}: cannot write the artefact: File too large"
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_is_no_artefact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="exists and is no artefact"):
        write_sample(tmp_path, sample("vit", "1:4"))
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("name", ["notes.txt", "golden/mine.npy", "mine/notes.txt", ".being-written"])
def test_files_that_are_not_the_artefacts_are_not_lost_with_it(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = contents(folder)
    with pytest.raises(ArtifactError, match=rf"{name}: is no part of the artefact there"):
        write_sample(folder, sample("vit", "1:4"), title="new")
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("role", ["partial", "old"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_called_like_our_siblings_is_left_alone(folder: Path, role: str, kind: str) -> None:
    place, elsewhere = folder.with_name(f".{folder.name}.{role}"), folder.with_name("elsewhere")
    (place if kind == "folder" else elsewhere).mkdir()
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to(elsewhere)
    ((place if kind == "folder" else elsewhere) / "thesis.txt").write_text("years of work")
    before = contents(folder.parent)
    with pytest.raises(ArtifactError, match=rf"\.{folder.name}\.{role}: exists and is no artefact"):
        write_sample(folder, sample("vit", "1:4"), title="new")
    assert contents(folder.parent) == before


def test_an_artefact_that_is_a_link_is_left_alone(folder: Path) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    before = contents(folder)
    with pytest.raises(ArtifactError, match="link: exists and is no artefact"):
        write_sample(link, sample("vit", "1:4"), title="new")
    assert contents(folder) == before
    assert link.is_symlink()


def test_leftovers_of_a_killed_write_are_replaced(folder: Path) -> None:
    partial, old = (folder.with_name(f".{folder.name}.{role}") for role in ("partial", "old"))
    shutil.copytree(folder, old)
    (old / "config.json").unlink()  # a killed deletion
    partial.mkdir()
    (partial / ".being-written").touch()
    (partial / "config.json").touch()
    write_sample(folder, sample("vit", "1:4"), title="new")
    assert read_manifest(folder).recipe == {"name": "new"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_damaged_manifest_is_replaced_where_its_files_are_known(folder: Path) -> None:
    names = [entry.path for entry in read_manifest(folder).files]
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match=r"cannot be told \(.*not valid JSON"):
        check_replaceable(folder)
    check_replaceable(folder, names)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt: is no part"):
        check_replaceable(folder, names)


def test_too_little_disk_is_told_before_anything_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ArtifactError, match=r"needs about [\d,]+ bytes of disk, 1,000 are free"):
        write_sample(folder, sample("vit", "1:4"))
    assert contents(folder) == before


def test_a_crash_between_the_two_renames_is_repaired(folder: Path) -> None:
    before = contents(folder)
    old = folder.with_name(f".{folder.name}.old")
    folder.rename(old)
    recover(folder)
    assert contents(folder) == before
    assert not old.exists()
    # A crash after the second rename leaves both: the new one stays.
    shutil.copytree(folder, old)
    (folder / "new").touch()
    recover(folder)
    assert "new" in contents(folder)
    assert not old.exists()


# --- loading and validating --------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_load_runs_the_model(sound: Path, native: bool) -> None:
    x = images(5, seed=3)
    (logits,) = load(sound, native=native).run(None, {"pixel_values": x})
    expected = sample("vit", "1:4").logits(x)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "pattern"), [("deit", "dense"), ("dinov2", "bitmap")])
def test_other_patterns_are_sound_too(kind: str, pattern: str, tmp_path: Path) -> None:
    write_sample(tmp_path / "artifact", sample(kind, pattern, graded=True))
    checks = list(validate(tmp_path / "artifact"))
    assert [check.name for check in checks] == ["manifest", "files", "native", "portable"]
    assert all(check.passed for check in checks)


def verdicts(lines: list[str]) -> list[str]:
    return [line.split(":")[0] for line in lines]


def test_validate_needs_no_torch(sound: Path) -> None:
    code = """import sys
from fips_ort.validate import main
status = main(sys.argv[1:])
print(sorted({'torch', 'onnx'} & sys.modules.keys()))
sys.exit(status)"""
    result = subprocess.run([sys.executable, "-c", code, str(sound)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert verdicts(lines[:-1]) == ["ok     manifest", "ok     files", "ok     native", "ok     portable"]
    assert lines[-1] == "[]"


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.onnx.data"))


def test_a_flipped_bit_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = first_shard(folder)
    data = bytearray(shard.read_bytes())
    data[1000] ^= 4
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{shard.name}: SHA-256 differs"):
        load(folder)
    assert main([str(folder)]) == 2
    message = "SHA-256 differs from the manifest's; the file is damaged or was changed"
    assert capsys.readouterr().err == f"error: {shard}: {message}\n"


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_shard_is_named(folder: Path, verify: bool) -> None:
    shard = first_shard(folder)
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(ArtifactError, match=rf"{shard.name}: file has {size - 1} bytes, the manifest says {size}"):
        load(folder, verify=verify)
    assert main([str(folder)]) == 2


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_shard_is_named(folder: Path, verify: bool) -> None:
    shard = first_shard(folder)
    shard.unlink()
    with pytest.raises(ArtifactError, match=rf"{shard.name}: file is missing"):
        load(folder, verify=verify)
    assert main([str(folder)]) == 2


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "golden/../../secret", "link/file", "..\\secret", "C:/x", ""]
)
@pytest.mark.parametrize("place", ["model", "library", "files", "golden"])
def test_a_path_outside_the_folder_is_refused(folder: Path, place: str, path: str) -> None:
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "file").touch()
    (folder / "link").symlink_to(folder.parent / "outside")
    content = json.loads((folder / MANIFEST).read_text())
    if place == "files":
        edit_manifest(folder, files=[*content["files"], {"path": path, "bytes": 0, "sha256": ""}])
    elif place == "golden":
        edit_manifest(folder, golden=content["golden"] | {"inputs": {"pixel_values": path}})
    else:
        edit_manifest(folder, **{place: path})
    with pytest.raises(ArtifactError, match="leads outside the artefact's folder"):
        read_manifest(folder)
    assert main([str(folder)]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2, this version of fips_ort reads 1"),
        ({"surplus": 1}, "missing or unknown keys: surplus"),
        ({"files": {}}, "files: expected a list, got dict"),
        ({"files": [{"path": "a", "bytes": "7", "sha256": ""}]}, r"files\[0\]: bytes: expected int, got '7'"),
        ({"golden": {"inputs": {}, "outputs": {"logits": 1}, "tolerance": 1.0}}, "golden: outputs: expected dict"),
        ({"model": "other.onnx"}, "refers to files it does not list: other.onnx"),
    ],
)
def test_a_malformed_manifest_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_what_is_no_artefact_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "fips.json: file is missing" in capsys.readouterr().err
    (tmp_path / MANIFEST).write_text("{")
    assert main([str(tmp_path)]) == 2
    assert "not valid JSON" in capsys.readouterr().err


def test_wrong_results_fail_the_validation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "golden" / "logits.npy"
    logits = np.load(path)
    logits[0, 0] += 0.01 * np.abs(logits).max()
    np.save(path, logits)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    entry = next(entry for entry in files if entry["path"] == "golden/logits.npy")
    entry["sha256"] = sha256(path)
    edit_manifest(folder, files=files)
    assert main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert verdicts(lines) == ["ok     manifest", "ok     files", "FAILED native", "FAILED portable"]


@pytest.mark.parametrize("version", ["1.16.3", "0.9", "unknown"])
def test_an_old_onnxruntime_is_refused(version: str) -> None:
    with pytest.raises(ArtifactError, match=rf"onnxruntime {version} is too old: fips_ort needs 1\.17"):
        check_onnxruntime(version)


@pytest.mark.parametrize("version", ["1.17.0", "1.32.0.dev1", "2.0"])
def test_a_new_onnxruntime_is_accepted(version: str) -> None:
    check_onnxruntime(version)


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
def test_an_op_that_onnxruntime_lacks_is_named(folder: Path, domain: str) -> None:
    """The session fails as in an onnxruntime that is older than an op of the model, ONNX's or its own."""
    path = folder / read_manifest(folder).model
    model = onnx.load(path, load_external_data=False)
    (node, *_) = (node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type, node.domain = "Golu", domain
    onnx.save(model, path)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    next(entry for entry in files if entry["path"] == path.name)["bytes"] = path.stat().st_size
    edit_manifest(folder, files=files, versions={"onnxruntime": "99.1"})
    with pytest.raises(ArtifactError, match=r"artifact: onnxruntime \d.* has no op Golu; .* made with 99\.1"):
        load(folder, verify=False)
