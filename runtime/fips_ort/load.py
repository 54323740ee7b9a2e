"""Opening an artefact as an ONNX Runtime session."""

import re
from pathlib import Path

from fips_ort.errors import ArtifactError
from fips_ort.manifest import read_manifest
from fips_ort.native import register

try:
    import onnxruntime
except ImportError as error:
    raise ImportError(
        f"artefacts run in ONNX Runtime, which cannot be imported ({error}): install one of its packages, for example "
        "`pip install onnxruntime`"
    ) from error
if not hasattr(onnxruntime, "InferenceSession"):
    raise ImportError(
        f"ONNX Runtime's package is broken ({', '.join(onnxruntime.__path__)} has no InferenceSession), as when one of "
        "two packages of it was removed: uninstall all of them and install one again, for example "
        "`pip install --force-reinstall onnxruntime`"
    )

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

    ``native``: register the native kernels with ``session_options`` (which is changed; options may serve any number of
    artefacts); without them ONNX Runtime computes the same with the functions in the model. ``verify``: check the
    SHA-256 of every file first; otherwise only that they are there with the right size, and hold what the manifest
    says. Raises ArtifactError naming the damaged file, or if onnxruntime is older than 1.17, lacks an op of the model
    or cannot load it, or if ``native`` and this installation has no native library.
    """
    check_onnxruntime(onnxruntime.__version__)
    folder = Path(folder)
    manifest = read_manifest(folder)
    manifest.check_files(folder, hashes=verify)
    options = session_options or _quiet_options()
    if native:
        try:
            register(options)
        except FileNotFoundError as error:
            raise ArtifactError(f"{folder}: {error}; or load it with native=False") from None
    path = folder / manifest.model
    # By path, so that ONNX Runtime maps the shards into memory instead of copying them.
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no public class
        raise ArtifactError(_explain(str(error), folder, path, manifest.versions)) from error


def _quiet_options() -> "onnxruntime.SessionOptions":
    """Options of a session that does not warn of what is meant so: an input with a default, and more logits than the
    graph declares (:mod:`fips_ort.causal_lm`)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def _explain(error: str, folder: Path, path: Path, made_with: dict[str, str]) -> str:
    """What ONNX Runtime's ``error`` means for the artefact in ``folder``."""
    version = onnxruntime.__version__
    unknown = _UNKNOWN_OP.search(error)
    if unknown is not None:
        op, maker = unknown[1] or unknown[2], made_with.get("onnxruntime", "a newer one")
        return f"{folder}: onnxruntime {version} has no op {op}; the artefact was made with {maker}"
    links = "; copy what its symbolic links lead to with `cp -rL`" if "escapes" in error else ""
    return f"{path}: onnxruntime {version} cannot load it: {error}{links}"


def check_onnxruntime(version: str) -> None:
    """Raise ArtifactError if onnxruntime ``version`` is too old."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_ONNXRUNTIME:
        raise ArtifactError(f"onnxruntime {version} is too old: fips_ort needs 1.17 or newer (API version 17)")
