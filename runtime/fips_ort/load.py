"""Opening an artefact as an ONNX Runtime session."""

import re
from pathlib import Path

import onnxruntime

from fips_ort.errors import ArtifactError
from fips_ort.manifest import read_manifest
from fips_ort.native import register

MINIMUM_ONNXRUNTIME = (1, 17)
"""The first onnxruntime with API version 17, which the native library asks for."""

_UNKNOWN_OP = re.compile(r"No Op registered for (\w+)|(\w+)\(-?\d+\) is not a registered function/op")
"""What onnxruntime says of an operator that it does not know, of ONNX's domain or of another."""


def load(
    folder: str | Path,
    session_options: "onnxruntime.SessionOptions | None" = None,
    *,
    native: bool = True,
    verify: bool = True,
) -> "onnxruntime.InferenceSession":
    """Open the artefact in ``folder`` on the CPU.

    ``native``: register the native kernels with ``session_options`` (which is changed); without them ONNX
    Runtime computes the same with the functions in the model. ``verify``: check the SHA-256 of every file first;
    otherwise only that they are there with the right size. Raises ArtifactError naming the damaged file, or if
    onnxruntime is older than 1.17, or lacks an op of the model.
    """
    check_onnxruntime(onnxruntime.__version__)
    folder = Path(folder)
    manifest = read_manifest(folder)
    manifest.check_files(folder, hashes=verify)
    options = session_options or onnxruntime.SessionOptions()
    if native:
        register(options)
    # By path, so that ONNX Runtime maps the shards into memory instead of copying them.
    try:
        return onnxruntime.InferenceSession(str(folder / manifest.model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no public class
        unknown = _UNKNOWN_OP.search(str(error))
        if unknown is None:
            raise
        op, maker = unknown[1] or unknown[2], manifest.versions.get("onnxruntime", "a newer one")
        raise ArtifactError(
            f"{folder}: onnxruntime {onnxruntime.__version__} has no op {op}; the artefact was made with {maker}"
        ) from error


def check_onnxruntime(version: str) -> None:
    """Raise ArtifactError if onnxruntime ``version`` is too old."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_ONNXRUNTIME:
        raise ArtifactError(f"onnxruntime {version} is too old: fips_ort needs 1.17 or newer (API version 17)")
