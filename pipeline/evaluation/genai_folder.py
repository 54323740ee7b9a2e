"""Folders that onnxruntime-genai loads, without the code that they bring.

``genai_config.json`` names a native library, and onnxruntime-genai loads it: whoever wrote the folder runs code. Here
it is given a folder of links beside a configuration of our own making, with this installation's library.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporters.genai_config import GENAI_CONFIG
from fips_ort.errors import ArtifactError
from fips_ort.files import inside, quoted, read_file
from fips_ort.manifest import MANIFEST, read_manifest
from fips_ort.native import library_path
from fips_ort.strict_json import parse_json
from pipeline.plumbing.errors import InputError

TRUST = "--trust-libraries"
"""The command's option for what is refused here."""
_LIBRARY = "custom_ops_library"
_DECODER = "model.decoder.session_options"
_HARMLESS = {
    "log_id", "log_severity_level", "log_verbosity_level", "intra_op_num_threads", "inter_op_num_threads",
    "enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level",
}  # fmt: skip
"""Session options that name no file, library or execution provider. Others are handed on to ONNX Runtime, which knows
some that do."""
_LIBRARIES = (".so", ".dll", ".dylib")
_MOST_BYTES = 1 << 24


@contextmanager
def without_code(folder: Path, *, trust_libraries: bool = False) -> Iterator[Path]:
    """A folder with the model in ``folder`` for onnxruntime-genai to load, there while the context lasts; what was
    loaded from it stays.

    An artefact is held to its manifest, and only the files that it lists are there. The native library is the installed
    one of fips_ort. ``trust_libraries``: ``folder`` itself, whose own native library and execution providers then run.
    Raises ArtifactError for a damaged artefact, InputError for a folder that names other code.
    """
    is_artifact = os.path.lexists(folder / MANIFEST)
    if is_artifact:
        manifest = read_manifest(folder)
        manifest.check_files(folder)
        names = [entry.path for entry in manifest.files]
        if GENAI_CONFIG not in names:
            raise ArtifactError(f"{folder / MANIFEST}: does not list {GENAI_CONFIG}")
    else:
        names = [path.name for path in folder.iterdir()]
    if trust_libraries:
        yield folder
        return
    try:
        config = parse_json(read_file(folder / GENAI_CONFIG, _MOST_BYTES).decode("utf-8"), str(folder / GENAI_CONFIG))
    except (ArtifactError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}: onnxruntime-genai cannot load it: {error}; try `fips validate {folder}`") from None
    library = _installed_library(folder)
    config = _harmless(folder, config, "", library.name, replace_any=is_artifact)
    with tempfile.TemporaryDirectory(prefix="fips-genai-") as temporary:
        staged = Path(temporary)
        for name in names:
            if name != GENAI_CONFIG and not name.endswith(_LIBRARIES):
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).symlink_to((folder / name).resolve())
        # A copy: onnxruntime-genai refuses a library that is a link out of the folder.
        shutil.copyfile(library, staged / library.name)
        (staged / GENAI_CONFIG).write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        yield staged


def _installed_library(folder: Path) -> Path:
    try:
        return library_path()
    except FileNotFoundError as error:
        raise InputError(f"{folder}: {error}") from None


def _harmless(folder: Path, value: Any, path: str, library: str, *, replace_any: bool) -> Any:
    """The part ``value`` of genai_config.json at ``path`` (keys with dots), with ``library`` in the place of fips_ort's
    own (``replace_any``: of any). Raises InputError if it names other code, or files elsewhere."""

    def refuse(key: str, reason: str) -> InputError:
        where = f"{folder / GENAI_CONFIG}: {path}.{key}".replace(": .", ": ")
        return InputError(f"{where}: {reason}; {TRUST} loads the folder with all that it brings, if you trust it")

    if isinstance(value, list):
        return [_harmless(folder, item, path, library, replace_any=replace_any) for item in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        if key == _LIBRARY:
            if path != _DECODER or not isinstance(item, str):
                raise refuse(key, f"names a native library, {quoted(item)}, whose code would run")
            if not replace_any and Path(item).name != library:
                raise refuse(key, f"names the native library {quoted(item)}, whose code would run")
            result[key] = library
            continue
        if path.endswith("session_options") and key == "provider_options":
            if item not in ([], [{"cpu": {}}], [{"CPU": {}}]):
                raise refuse(key, "names execution providers, which load libraries")
        elif path.endswith("session_options") and key not in _HARMLESS:
            raise refuse(key, "is no option that fips knows")
        elif key == "run_options" and item:
            raise refuse(key, "are no options that fips knows")
        elif key.endswith(("filename", "_file", "_dir")) and isinstance(item, str) and item:
            try:
                inside(folder, item)
            except ArtifactError:
                raise refuse(key, f"{quoted(item)} is no plain path inside the folder") from None
        result[key] = _harmless(folder, item, f"{path}.{key}".lstrip("."), library, replace_any=replace_any)
    return result
