import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from artifact_samples import sign, write_in_shards
from causal_lm_samples import MAX_LENGTH, language_sample, tokens, write_language_sample
from hub_cache import snapshot_of
from packed_samples import images
from places import ROOT

import fips_ort
from fips_ort.causal_lm import complete_inputs, greedy_tokens, prefill_inputs
from fips_ort.errors import ArtifactError
from fips_ort.load import load
from fips_ort.validate import main
from pipeline.cli import app


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_in_shards(tmp_path_factory.mktemp("artifacts") / "sound")


def logits(session: onnxruntime.InferenceSession) -> np.ndarray:
    return session.run(None, {"pixel_values": images(2)})[0]


# --- session options that serve more than once --------------------------------------------------------------------


def test_options_serve_two_artefacts(sound: Path) -> None:
    options = onnxruntime.SessionOptions()
    first, second = load(sound, options), load(sound, options)
    np.testing.assert_array_equal(logits(first), logits(second))


def test_options_may_be_registered_again_and_again(sound: Path) -> None:
    options = onnxruntime.SessionOptions()
    fips_ort.register(options)
    fips_ort.register(options)
    options.register_custom_ops_library(str(fips_ort.library_path()))  # as docs/edge.md does without Python
    np.testing.assert_array_equal(logits(load(sound, options)), logits(load(sound)))


def test_a_copy_of_the_library_does_not_register_it_again(sound: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    copy = shutil.copyfile(fips_ort.library_path(), tmp_path / "copy.so")
    options.register_custom_ops_library(str(copy))
    np.testing.assert_array_equal(logits(load(sound, options)), logits(load(sound)))


def test_options_serve_after_a_failure(sound: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    broken = Path(shutil.copytree(sound, tmp_path / "broken"))
    model = broken / "model.onnx"
    model.write_bytes(model.read_bytes().replace(b"Softmax", b"Saftmax"))
    sign(broken, "model.onnx")
    for _ in range(2):
        with pytest.raises(ArtifactError, match="has no op Saftmax"):
            load(broken, options)
    np.testing.assert_array_equal(logits(load(sound, options)), logits(load(sound)))


def test_options_that_are_registered_are_good_for_portable_sessions(sound: Path) -> None:
    options = onnxruntime.SessionOptions()
    load(sound, options)
    np.testing.assert_allclose(logits(load(sound, options, native=False)), logits(load(sound)), rtol=1e-4, atol=1e-4)


def test_options_of_several_threads(sound: Path) -> None:
    options = onnxruntime.SessionOptions()
    with ThreadPoolExecutor(8) as pool:
        sessions = list(pool.map(lambda _: load(sound, options), range(16)))
    for session in sessions:
        np.testing.assert_array_equal(logits(session), logits(sessions[0]))


def test_options_at_the_place_of_old_ones_are_new(sound: Path) -> None:
    """The address of options is how they are known again; it comes back when they are gone."""
    for _ in range(20):
        options = onnxruntime.SessionOptions()
        load(sound, options, verify=False)
        del options


# --- the Hugging Face cache ---------------------------------------------------------------------------------------


def test_a_snapshot_of_the_hub_is_an_artefact(sound: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(sound, tmp_path)
    assert (snapshot / "model.onnx").is_symlink()
    np.testing.assert_array_equal(logits(load(snapshot)), logits(load(sound)))
    assert main([str(snapshot)]) == 0
    # However one comes there.
    (tmp_path / "shortcut").symlink_to(snapshot)
    assert main([str(tmp_path / "shortcut")]) == 0


def test_an_artefact_may_be_a_part_of_what_is_in_a_repository(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "files" / "onnx" / "artifact")
    assert main([str(snapshot_of(tmp_path / "files", tmp_path / "cache") / "onnx" / "artifact")]) == 0


def test_inspect_accepts_a_snapshot(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["inspect", str(snapshot_of(sound, tmp_path))], standalone_mode=False)
    assert "vit.layers.0.mlp.fc1" in capsys.readouterr().out


def test_contents_of_a_snapshot_are_checked(sound: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(sound, tmp_path)
    blob = (snapshot / "config.json").resolve()
    blob.write_bytes(blob.read_bytes().replace(b"vit", b"tiv"))
    with pytest.raises(ArtifactError, match=r"config\.json: SHA-256 differs"):
        load(snapshot)


@pytest.mark.parametrize(
    "target",
    ["/etc/passwd", "../../../secret", "../../../models--other--one/blobs/x", "../../blobs/../../secret",
     "../../blobs/chain", "../../blobs/deep/file", "../../refs/x", "loop"],
)  # fmt: skip
def test_links_of_a_snapshot_lead_nowhere_else(sound: Path, tmp_path: Path, target: str) -> None:
    snapshot = snapshot_of(sound, tmp_path)
    repository = snapshot.parent.parent
    others = (tmp_path / "secret", tmp_path / "models--other--one/blobs/x", repository / "blobs/deep/file",
              repository / "refs/x")  # fmt: skip
    for place in others:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((snapshot / "config.json").read_bytes())
    (repository / "blobs" / "chain").symlink_to(tmp_path / "secret")
    (snapshot / "loop").symlink_to("config.json")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(target)
    with pytest.raises(ArtifactError, match=r"'config\.json' (leads outside|cannot be followed)"):
        load(snapshot)


def test_blobs_that_are_a_link_are_no_blobs(sound: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(sound, tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="leads outside"):
        load(snapshot)


@pytest.mark.parametrize("name", ["models", "evil--models--a--b", "snapshots"])
def test_other_folders_have_no_blobs(sound: Path, tmp_path: Path, name: str) -> None:
    snapshot = snapshot_of(sound, tmp_path)
    snapshot.parent.parent.rename(tmp_path / name)
    with pytest.raises(ArtifactError, match="leads outside"):
        load(tmp_path / name / "snapshots" / snapshot.name)


def test_a_chain_of_links_to_the_blobs_is_followed(sound: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(sound, tmp_path)
    blob = Path(os.readlink(snapshot / "config.json")).name
    (snapshot.parent.parent / "blobs" / "other").symlink_to(blob)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/other")
    assert main([str(snapshot)]) == 0


# --- token ids ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gemma3", "gemma2", "llama"])
def text_session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models with a token table of 8 bits, of 4 bits, and of float16."""
    folder = tmp_path_factory.mktemp("text") / "artifact"
    write_language_sample(folder, language_sample(request.param))
    return load(folder)


@pytest.mark.parametrize("token", [265, 266, 1 << 40, -1, -265, -266])
def test_token_ids_that_the_model_lacks_are_named(text_session: Any, token: int) -> None:
    message = rf"^token id {token} is not in the model's vocabulary of 265$"
    with pytest.raises(ValueError, match=message):
        prefill_inputs(text_session, np.array([[2, 3], [token, 4]]))
    with pytest.raises(ValueError, match=message):
        complete_inputs(text_session, {"input_ids": np.array([[2, token]])})
    with pytest.raises(ValueError, match=message):
        greedy_tokens(text_session, [2, token, 3], 4)


@pytest.mark.parametrize(
    "ids",
    [np.zeros((0, 0), np.int64), np.zeros((0, 4), np.int64), np.array([2, 3]), np.array([[[2]]]), np.array([[2.0]]),
     np.array([["2"]]), np.array([[True]]), np.array(2), np.array([[2, None]])],
)  # fmt: skip
def test_what_is_no_batch_of_texts_is_refused(text_session: Any, ids: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^token ids (must be integers )?\[batch, tokens\](, got| of no texts)"):
        prefill_inputs(text_session, ids)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint64, np.int16])
def test_token_ids_of_any_integers(text_session: Any, dtype: type) -> None:
    ids = np.array([[2, 3, 200]])
    expected = text_session.run(["logits"], prefill_inputs(text_session, ids))[0]
    feeds = prefill_inputs(text_session, ids.astype(dtype))
    assert feeds["input_ids"].dtype == np.int64
    np.testing.assert_array_equal(text_session.run(["logits"], feeds)[0], expected)


def test_prompts(text_session: Any) -> None:
    prompt = tokens(20)[0]
    expected = greedy_tokens(text_session, prompt.tolist(), 3)
    assert greedy_tokens(text_session, prompt.numpy(), 3) == expected
    assert greedy_tokens(text_session, prompt.tolist(), 0) == []
    for empty in ([], np.zeros(0, np.int64)):
        with pytest.raises(ValueError, match="the prompt has no tokens"):
            greedy_tokens(text_session, empty, 3)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        greedy_tokens(text_session, [2], -1)


@pytest.mark.parametrize("length", [MAX_LENGTH + 1, MAX_LENGTH - 1, 5])
def test_a_text_that_grows_too_long(text_session: Any, length: int) -> None:
    prompt = tokens(length)[0].tolist()
    if length < MAX_LENGTH:
        assert len(greedy_tokens(text_session, prompt, MAX_LENGTH - length + 1)) == MAX_LENGTH - length + 1
    with pytest.raises(ValueError, match=rf"a text of {MAX_LENGTH + 1} tokens is longer than the model was exported"):
        greedy_tokens(text_session, prompt, MAX_LENGTH)


# --- ONNX Runtime itself ------------------------------------------------------------------------------------------


def import_load(folder: Path) -> str:
    """The last line that Python says when it imports ``fips_ort.load`` with ``folder`` in front of its path."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "import fips_ort.native; import fips_ort.load"]
    environment = {**os.environ, "PYTHONPATH": path}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 1
    return child.stderr.strip().splitlines()[-1]


def test_without_onnxruntime_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError(\"No module named 'onnxruntime'\")")
    assert import_load(tmp_path) == (
        "ImportError: artefacts run in ONNX Runtime, which cannot be imported (No module named 'onnxruntime'): install "
        "one of its packages, for example `pip install onnxruntime`"
    )


def test_what_one_of_two_packages_leaves_is_called_broken(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    assert "ONNX Runtime's package is broken" in import_load(tmp_path)


def test_without_the_native_library_the_error_says_what_to_do(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fips_ort, "__path__", [str(sound / "golden")])
    with pytest.raises(ArtifactError, match=r"install the fips-ort distribution .*; or load it with native=False"):
        load(sound)
    load(sound, native=False)


def test_fips_ort_requires_no_particular_package_of_onnxruntime() -> None:
    project = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["numpy>=1.26"]
    assert project["optional-dependencies"] == {"onnxruntime": ["onnxruntime>=1.17"]}
