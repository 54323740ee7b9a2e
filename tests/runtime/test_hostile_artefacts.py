"""Artefacts that somebody wrote to harm whoever loads them, and damaged ones: refused with ArtifactError, and nothing
else, before anything large is read."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from artifact_samples import edit_manifest, sign
from packed_samples import sample, write_sample

from fips_ort.errors import ArtifactError
from fips_ort.load import load
from fips_ort.manifest import MANIFEST, read_manifest
from fips_ort.validate import main, validate


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "sound"
    write_sample(folder, sample("vit", "1:4"))
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def refused(folder: Path, match: str, *, verify: bool = True) -> None:
    """``load`` and the command both refuse it, in a few seconds."""
    begin = time.monotonic()
    with pytest.raises(ArtifactError, match=match):
        load(folder, verify=verify)
    assert main([str(folder)]) == 2
    assert time.monotonic() - begin < 10


# --- weights that are not listed ---------------------------------------------------------------------------------


def test_weights_must_be_listed(folder: Path) -> None:
    files = [entry for entry in manifest_of(folder)["files"] if entry["path"] != "model.onnx.data"]
    edit_manifest(folder, files=files, tensors=[])
    refused(folder, r"model.onnx: refers to files fips.json does not list: model.onnx.data")
    refused(folder, r"model.onnx: refers to files fips.json does not list: model.onnx.data", verify=False)


def drop(tensors: list[dict[str, Any]]) -> None:
    del tensors[4]


def invent(tensors: list[dict[str, Any]]) -> None:
    tensors.append({**tensors[4], "name": "invented"})


def change(**values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda tensors: tensors[4].update(values)


@pytest.mark.parametrize(
    "edit", [drop, invent, change(shape=[7]), change(dtype="INT64"), change(bytes=1), change(file="config.json"),
             change(file="model.onnx")]
)  # fmt: skip
def test_the_graph_stores_what_is_listed(folder: Path, edit: Callable[[list[dict[str, Any]]], None]) -> None:
    tensors = manifest_of(folder)["tensors"]
    assert tensors[4]["file"] == "model.onnx.data"
    name = tensors[4]["name"]
    edit(tensors)
    edit_manifest(folder, tensors=tensors)
    refused(folder, f"stores other tensors than fips.json lists, or elsewhere: ({name}|invented)$")


def change_model(folder: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    sign(folder, "model.onnx")


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "config.json/", "./model.onnx.data"]
)
@pytest.mark.parametrize("place", ["initializer", "attribute"])
def test_the_graph_names_no_file_elsewhere(folder: Path, place: str, location: str) -> None:
    (folder.parent / "secret").write_bytes(bytes(1 << 20))

    def edit(model: onnx.ModelProto) -> None:
        stored = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in stored.external_data if entry.key == "location").value = location
        if place == "attribute":
            node = onnx.helper.make_node("Constant", [], ["unused"], value=stored)
            model.graph.node.append(node)
            stored.external_data[0].value = "model.onnx.data"

    change_model(folder, edit)
    with pytest.raises(ArtifactError, match=r"refers to files fips\.json does not list"):
        load(folder)
    # Nor if the manifest lists it.
    files = manifest_of(folder)["files"]
    edit_manifest(folder, files=[*files, {"path": location, "bytes": 1 << 20, "sha256": "0" * 64}])
    refused(folder, "leads outside|no plain relative path|file is missing")


def test_tensors_end_within_their_file(folder: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        stored = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in stored.external_data if entry.key == "offset").value = str(1 << 40)

    change_model(folder, edit)
    refused(folder, r"its tensors take 1,099,511,\d+,\d+ bytes of model.onnx.data, which has")


def test_a_listed_file_that_nobody_needs_is_fine(folder: Path) -> None:
    (folder / "notes.txt").write_text("of the author")
    sign(folder, "notes.txt")
    load(folder)
    assert main([str(folder)]) == 0


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x3a\xff\xff\xff\x7f", bytes(1000)])
@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_graph_is_named(folder: Path, content: bytes, verify: bool) -> None:
    (folder / "model.onnx").write_bytes(content)
    sign(folder, "model.onnx")
    refused(folder, "model.onnx: not an ONNX model that fips_ort reads", verify=verify)


def test_a_graph_that_onnxruntime_refuses_is_named(folder: Path) -> None:
    change_model(folder, lambda model: model.graph.node[5].input.__setitem__(0, "nobody makes this"))
    refused(folder, r"model.onnx: onnxruntime \d\S* cannot load it: .*nobody makes this", verify=False)


# --- what a manifest may say --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [True, 1.0, "1", None, 2, [1]])
def test_only_the_integer_one_is_the_schema_version(folder: Path, version: Any) -> None:
    edit_manifest(folder, schema_version=version)
    refused(folder, "schema_version is .*, this version of fips_ort reads 1")


@pytest.mark.parametrize("text", ["Infinity", "NaN", "1e999", "-1e999", "1e9", "0.21", "1e-2", "-1e-3"])
def test_the_tolerance_is_bounded(folder: Path, text: str) -> None:
    """Activations are float32 here: 1e-3 is all that is allowed, 0.2 is for int8 activations."""
    content = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(content.replace('"tolerance": 0.001', f'"tolerance": {text}'))
    assert (folder / MANIFEST).read_text() != content
    refused(folder, "tolerance is|not valid JSON: number")


def test_int8_activations_permit_a_larger_tolerance(tmp_path: Path) -> None:
    write_sample(tmp_path / "artifact", sample("vit", "1:4", accuracy_level=4))
    edit_manifest(tmp_path / "artifact", golden=manifest_of(tmp_path / "artifact")["golden"] | {"tolerance": 0.2})
    load(tmp_path / "artifact")
    edit_manifest(tmp_path / "artifact", golden=manifest_of(tmp_path / "artifact")["golden"] | {"tolerance": 0.201})
    refused(tmp_path / "artifact", "tolerance is 0.201, at most 0.2 is allowed")


@pytest.mark.parametrize("key", ["files", "tensors", "weights"])
def test_nothing_is_listed_twice(folder: Path, key: str) -> None:
    entries = manifest_of(folder)[key]
    edit_manifest(folder, **{key: [*entries, entries[0]]})
    refused(folder, rf"{key}: listed twice: {entries[0].get('name', entries[0].get('path'))}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema_version"', '"schema_version": 1, "schema_version"', "keys twice: schema_version"),
        ('"library"', '"library": "x", "library"', "keys twice: library"),
        ('"name": "sample"', '"name": NaN', "number 'NaN'"),
        ('"name": "sample"', '"name": -Infinity', "number '-Infinity'"),
        ('"name": "sample"', '"name": 1e400', "number '1e400'"),
        ('"name": "sample"', f'"name": {"7" * 6000}', "number '7777"),
        ('"name": "sample"', f'"name": {"[" * 200_000}{"]" * 200_000}', "too many brackets"),
        ('"name": "sample"', f'"name": {"[" * 200_000}', "too many brackets"),
        ('"name": "sample"', '"name": "\\ud800"', "surrogates not allowed"),
        ('"model": "model.onnx"', '"model": "config.json"', "'config.json' is no .onnx file"),
        ('"model": "model.onnx"', '"model": 7', "model: expected str, got 7"),
        ('"library": "libfips_ort.so"', '"library": "gone.so"', "refers to files it does not list: gone.so"),
        ('"bytes": ', '"bytes": -', "no valid size and SHA-256"),
        ('"sha256": "', '"sha256": "A', "no valid size and SHA-256"),
        ('"rows": 64', '"rows": 0', "rows and columns must be positive"),
        ('"rows": 64', '"rows": -64', "rows and columns must be positive"),
        ('"pattern": "1:4"', '"pattern": "3:4"', "unsupported pattern '3:4'"),
        ('"block_size": 32', '"block_size": 0', "block_size 0 does not divide"),
        ('"name": "vit.', '"name": "\\u001b[2Jvit.', "cannot be printed"),
    ],
)  # fmt: skip
def test_what_cannot_be_true_is_refused(folder: Path, old: str, new: str, message: str) -> None:
    content = (folder / MANIFEST).read_text()
    assert old in content
    (folder / MANIFEST).write_text(content.replace(old, new))
    with pytest.raises(ArtifactError, match=message):
        read_manifest(folder).check_files(folder)
    refused(folder, message)


@pytest.mark.parametrize(
    "path",
    ["a\0b", "\ud800", "x" * 300, "x/" * 2500 + "x", "x" * 5000, "loop", "a//b", "./model.onnx", "golden/",
     "new\nline", "\x1b[2J", " "],
)  # fmt: skip
@pytest.mark.parametrize("place", ["model", "files", "golden", "tensors"])
def test_strange_paths_are_refused(folder: Path, place: str, path: str) -> None:
    (folder / "loop").symlink_to("loop2")
    (folder / "loop2").symlink_to("loop")
    content = manifest_of(folder)
    entry = {"path": path, "bytes": 0, "sha256": "0" * 64}
    if place == "files":
        edit_manifest(folder, files=[*content["files"], entry])
    elif place == "golden":
        golden = content["golden"] | {"outputs": {"logits": path}}
        edit_manifest(folder, golden=golden, files=[*content["files"], entry])
    elif place == "tensors":
        tensors = [{**tensor, "file": path} for tensor in content["tensors"]]
        edit_manifest(folder, tensors=tensors, files=[*content["files"], entry])
    else:
        edit_manifest(folder, model=path, files=[*content["files"], entry])
    refused(folder, ".")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "x/" * 2500])
def test_folders_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError):
        load(tmp_path / name)
    assert main([str(tmp_path / name)]) == 2


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"fips.json: cannot be read: Not a directory"):
        load(tmp_path / "file")


# --- what is not read, or not waited for -------------------------------------------------------------------------


def test_a_pipe_as_manifest_is_not_waited_for(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    refused(folder, "fips.json: is no regular file")


def test_a_folder_as_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    refused(folder, "fips.json: (is no regular file|cannot be read: Is a directory)")


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "/etc/passwd"])
def test_a_device_as_manifest_is_not_read(folder: Path, target: str) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to(target)
    refused(folder, "leads outside")


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 1 << 30)
    refused(folder, "file has 1,073,741,824 bytes, at most 16,777,216 are read")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"null", b"[]", b"1"])
def test_manifests_that_are_none(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    refused(folder, "fips.json: (not valid JSON|cannot be read|a manifest is a JSON object)")


@pytest.mark.parametrize("count", [100_001, 400_000])
def test_entries_are_counted_first(folder: Path, count: int) -> None:
    content = manifest_of(folder) | {"files": None}
    text = json.dumps(content).replace('"files": null', '"files": [' + ",".join(["{}"] * count) + "]")
    (folder / MANIFEST).write_text(text)
    refused(folder, rf"files: {count:,} entries, at most 100,000 are read")


def test_a_pipe_as_a_file_is_not_waited_for(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(folder, "config.json: is no regular file")


def test_a_huge_graph_is_not_read(folder: Path) -> None:
    os.truncate(folder / "model.onnx", 1 << 30)
    files = manifest_of(folder)["files"]
    next(entry for entry in files if entry["path"] == "model.onnx")["bytes"] = 1 << 30
    edit_manifest(folder, files=files)
    with pytest.raises(ArtifactError, match=r"model\.onnx: file has 1,073,741,824 bytes, at most 268,435,456 are read"):
        load(folder, verify=False)


# --- golden inputs and outputs ------------------------------------------------------------------------------------


def npy(shape: str, dtype: str = "<f4", body: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + body


def archive(tmp: Path) -> bytes:
    np.savez(tmp / "a.npz", np.zeros(3))
    return (tmp / "a.npz").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(10000000000,)"), r"does not take the 0 bytes in the file"),
        (npy("(3, 10)", body=bytes(119)), "does not take the 119 bytes"),
        (npy("(0, 10)"), "holds no numbers"),
        (npy("(-1, -10)", body=bytes(40)), "holds no numbers"),
        (npy("(3, 10)", "|O", bytes(120)), "holds object"),
        (npy("(3, 10)", "<U1", bytes(120)), "holds <U1"),
        (npy("(3, 10)", "<c8", bytes(240)), "holds complex64"),
        (npy("(3, 10)", "<f4", np.full(30, np.nan, "<f4").tobytes()), "not finite"),
        (npy("(3, 10)", "<f4", np.full(30, np.inf, "<f4").tobytes()), "not finite"),
        (npy("(3, 10)", body=bytes(120)), "all numbers are zero"),
        (npy("(3, 10)", "<f8", np.full(30, 1e-300).tobytes()), "all numbers are zero"),
        (npy("(" * 5000 + ")" * 5000), "not a .npy file"),
        (b"\x93NUMPY\x09\x00", "not a .npy file"),
        (b"", "not a .npy file"),
        (b"PK\x03\x04", "not a .npy file"),
    ],
)  # fmt: skip
def test_golden_outputs_are_numbers_that_prove_something(folder: Path, content: bytes, message: str) -> None:
    (folder / "golden" / "logits.npy").write_bytes(content)
    sign(folder, "golden/logits.npy")
    with pytest.raises(ArtifactError, match=rf"golden/logits.npy: .*{message}"):
        list(validate(folder))
    assert main([str(folder)]) == 2


@pytest.mark.parametrize(
    ("golden", "message"),
    [
        ({"inputs": {"input_ids": "golden/pixel_values.npy"}}, "the model has no inputs input_ids"),
        ({"outputs": {"labels": "golden/logits.npy"}}, "the model has no outputs labels"),
        ({"outputs": {}}, "it needs inputs and outputs"),
        ({"inputs": {}}, "it needs inputs and outputs"),
    ],
)
def test_golden_names_are_the_graphs(folder: Path, golden: dict[str, Any], message: str) -> None:
    edit_manifest(folder, golden=manifest_of(folder)["golden"] | golden)
    with pytest.raises(ArtifactError, match=message):
        list(validate(folder))
    assert main([str(folder)]) == 2


@pytest.mark.parametrize("cut", [np.s_[:1], np.s_[:, -1:], np.s_[-1:, -1:]])
def test_golden_outputs_are_whole(folder: Path, cut: Any) -> None:
    """The last of the images would do for a text's tokens; never single logits."""
    path = folder / "golden" / "logits.npy"
    np.save(path, np.load(path)[cut])
    sign(folder, "golden/logits.npy")
    assert main([str(folder)]) == 1
