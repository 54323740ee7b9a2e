"""Folders whose genai_config.json names code: none of it runs unless it is asked for."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import edit_manifest, sign
from causal_lm_samples import language_sample, write_language_sample
from hub_cache import snapshot_of

import fips_ort
from exporters.genai_config import GENAI_CONFIG
from fips_ort.errors import ArtifactError
from fips_ort.manifest import MANIFEST
from pipeline.evaluation.genai_folder import without_code
from pipeline.evaluation.text_speed import time_generation
from pipeline.generate import generate, greedy_tokens
from pipeline.plumbing.errors import InputError

HOSTILE = """
#include <stdio.h>
__attribute__((constructor)) static void run(void) { FILE* file = fopen("%s", "w"); if (file) fclose(file); }
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "sound"
    write_language_sample(folder, language_sample("gemma3"))
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A file that is there when hostile code has run."""
    return tmp_path / "it-ran"


@pytest.fixture
def hostile(tmp_path: Path, trace: Path) -> Path:
    """A native library that does something as soon as it is loaded."""
    source = tmp_path / "hostile.c"
    source.write_text(HOSTILE % trace)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "hostile.so", source], check=True)
    return tmp_path / "hostile.so"


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / GENAI_CONFIG
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    if (folder / MANIFEST).exists():
        sign(folder, GENAI_CONFIG)


def set_option(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["model"]["decoder"]["session_options"].update({key: value})


def test_the_sample_is_hostile(folder: Path, hostile: Path, trace: Path) -> None:
    """What is refused below would run: with trust it does."""
    shutil.copyfile(hostile, folder / "libfips_ort.so")
    sign(folder, "libfips_ort.so")
    with pytest.raises(InputError, match="onnxruntime-genai cannot load it"):
        generate(folder, "the", 2, trust_libraries=True)
    assert trace.exists()


@pytest.mark.parametrize("name", ["libfips_ort.so", "other.so", "library"])
def test_an_artefact_runs_with_the_installed_library(
    sound: Path, folder: Path, hostile: Path, trace: Path, name: str
) -> None:
    shutil.copyfile(hostile, folder / name)
    edit_config(folder, set_option("custom_ops_library", name))
    sign(folder, name)
    assert list(generate(folder, "the thing", 8)) == list(generate(sound, "the thing", 8))
    assert greedy_tokens(folder, [2, 3], 8) == greedy_tokens(sound, [2, 3], 8)
    assert not trace.exists()


def test_a_library_for_another_machine_is_no_hindrance(sound: Path, folder: Path) -> None:
    (folder / "libfips_ort.so").write_bytes(b"for another processor")
    sign(folder, "libfips_ort.so")
    assert greedy_tokens(folder, [2, 3], 4) == greedy_tokens(sound, [2, 3], 4)


def test_bench_measures_with_the_installed_library(folder: Path, hostile: Path, trace: Path) -> None:
    shutil.copyfile(hostile, folder / "libfips_ort.so")
    sign(folder, "libfips_ort.so")
    with without_code(folder) as loadable:
        assert time_generation({"artefact": loadable}, [2, 3], 2, threads=1, rounds=1).keys() == {"artefact"}
    assert not trace.exists()


def test_a_snapshot_of_the_hub_talks(sound: Path, tmp_path: Path) -> None:
    """onnxruntime-genai itself refuses its library, a link out of the folder."""
    assert greedy_tokens(snapshot_of(sound, tmp_path), [2, 3], 8) == greedy_tokens(sound, [2, 3], 8)


def test_a_damaged_artefact_does_not_talk(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: file has 2 bytes"):
        generate(folder, "the", 2)


def test_only_listed_files_are_read(folder: Path) -> None:
    files = [entry for entry in json.loads((folder / MANIFEST).read_text())["files"] if entry["path"] != GENAI_CONFIG]
    edit_manifest(folder, files=files)
    with pytest.raises(ArtifactError, match=r"fips\.json: does not list genai_config\.json"):
        generate(folder, "the", 2)


def test_files_beside_an_artefact_are_not_read(sound: Path, folder: Path) -> None:
    (folder / "added_tokens.json").write_text("not JSON")
    (folder / "chat_template.jinja").write_text("{{ hostile }}")
    with without_code(folder) as loadable:
        assert not (loadable / "added_tokens.json").exists()
    assert greedy_tokens(folder, [2, 3], 4) == greedy_tokens(sound, [2, 3], 4)


SECTION = {"session_options": {"custom_ops_library": "libfips_ort.so"}, "filename": "model.onnx"}


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda config: config["model"].update(encoder=SECTION), "model.encoder.session_options.custom_ops_library"),
        (lambda config: config["model"].update(vision=SECTION), "model.vision.session_options.custom_ops_library"),
        (lambda config: config["model"].update(draft=SECTION), "model.draft.session_options.custom_ops_library"),
        (lambda config: config["model"]["decoder"].update(pipeline=[{"a": SECTION}]),
         "model.decoder.pipeline.a.session_options.custom_ops_library"),
        (lambda config: config.update(custom_ops_library="x"), "custom_ops_library"),
        (set_option("custom_ops_library", ["libfips_ort.so"]), "model.decoder.session_options.custom_ops_library"),
        (set_option("provider_options", [{"qnn": {"backend_path": "evil.so"}}]),
         "model.decoder.session_options.provider_options"),
        (set_option("provider_options", [{"cpu": {"library_path": "evil.so"}}]),
         "model.decoder.session_options.provider_options"),
        (set_option("ep.register", "evil.so"), "model.decoder.session_options.ep.register"),
        (set_option("enable_profiling", "written"), "model.decoder.session_options.enable_profiling"),
        (set_option("session.model_external_initializers_file_folder_path", "/etc"),
         "model.decoder.session_options.session.model_external_initializers_file_folder_path"),
        (lambda config: config["model"]["decoder"].update(run_options={"a": "b"}), "model.decoder.run_options"),
        (lambda config: config["model"]["decoder"].update(filename="/etc/passwd"), "model.decoder.filename"),
        (lambda config: config["model"]["decoder"].update(filename="../model.onnx"), "model.decoder.filename"),
        (lambda config: config["model"].update(tokenizer_dir="../elsewhere"), "model.tokenizer_dir"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_artifact", [True, False])
def test_what_else_could_bring_code_or_files_is_refused(
    folder: Path, edit: Callable[[dict[str, Any]], None], key: str, is_artifact: bool
) -> None:
    edit_config(folder, edit)
    if not is_artifact:
        (folder / MANIFEST).unlink()
    with pytest.raises(InputError) as caught:
        generate(folder, "the", 2)
    assert str(caught.value).startswith(f"{folder / GENAI_CONFIG}: {key}: ")
    assert "--trust-libraries" in str(caught.value)


def test_a_foreign_folder_brings_no_library(folder: Path, hostile: Path, trace: Path) -> None:
    (folder / MANIFEST).unlink()
    shutil.copyfile(hostile, folder / "hostile.so")
    edit_config(folder, set_option("custom_ops_library", "hostile.so"))
    with pytest.raises(InputError, match=r"custom_ops_library: names the native library 'hostile\.so'"):
        generate(folder, "the", 2)
    assert not trace.exists()


def test_a_foreign_folder_gets_the_installed_library_for_ours(
    sound: Path, folder: Path, hostile: Path, trace: Path
) -> None:
    (folder / MANIFEST).unlink()
    shutil.copyfile(hostile, folder / fips_ort.library_path().name)
    assert greedy_tokens(folder, [2, 3], 4) == greedy_tokens(sound, [2, 3], 4)
    assert not trace.exists()


@pytest.mark.parametrize(
    "config", ['{"model": {}, "model": {}}', '{"a": NaN}', "[" * 100_000, "\ufeff{}", '{"a": "\\ud800"}']
)
def test_configurations_that_readers_understand_differently(folder: Path, config: str) -> None:
    (folder / GENAI_CONFIG).write_text(config, encoding="utf-8")
    sign(folder, GENAI_CONFIG)
    with pytest.raises(InputError, match=r"onnxruntime-genai cannot load it: .*not valid JSON"):
        generate(folder, "the", 2)


def test_what_was_loaded_leaves_no_folder_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    pieces = generate(folder, "the thing", 8)
    assert not list(temporary.iterdir())
    assert len(list(pieces)) > 3
