"""Proof that an artefact is sound, on a machine without torch: ``python -m fips_ort.validate FOLDER``.

Exit status 0: sound. 1: it does not compute what it must. 2: it is damaged, or this is no artefact.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fips_ort.causal_lm import complete_inputs
from fips_ort.errors import ArtifactError
from fips_ort.files import some_of
from fips_ort.golden import read_array, read_outputs
from fips_ort.load import load, onnxruntime
from fips_ort.manifest import MANIFEST, Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a validation."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'} {self.name}: {self.detail}"


def validate(folder: Path) -> Iterator[Check]:
    """Check the manifest, every file, and that the model reproduces the golden outputs natively and portably.

    Raises ArtifactError where the artefact is damaged, or proves nothing.
    """
    manifest = read_manifest(folder)
    yield Check("manifest", True, f"{len(manifest.files)} files, {len(manifest.tensors)} tensors")
    manifest.check_files(folder)
    total = sum(entry.bytes for entry in manifest.files)
    yield Check("files", True, f"sizes and SHA-256 of {total:,} bytes are as promised")
    golden = manifest.golden
    inputs = {name: read_array(folder, path) for name, path in golden.inputs.items()}
    expected = read_outputs(folder, golden.outputs)
    for name, native in (("native", True), ("portable", False)):
        yield from _check_session(folder, manifest, name, native, inputs, expected)


def _check_session(
    folder: Path,
    manifest: Manifest,
    name: str,
    native: bool,
    inputs: dict[str, NDArray[np.float32]],
    expected: dict[str, NDArray[np.float32]],
) -> Iterator[Check]:
    session = load(folder, native=native, verify=False)
    for kind, given, known in (
        ("inputs", inputs, session.get_inputs()),
        ("outputs", expected, session.get_outputs()),
    ):
        if unknown := sorted(given.keys() - {value.name for value in known}):
            raise ArtifactError(f"{folder / MANIFEST}: golden: the model has no {kind} {some_of(unknown)}")
    try:
        feeds = complete_inputs(session, inputs)
    except ValueError as error:
        raise ArtifactError(f"{folder / MANIFEST}: golden: inputs: {error}") from None
    try:
        computed = dict(zip(expected, session.run(list(expected), feeds), strict=True))
    except Exception as error:  # onnxruntime's own exceptions share no base class
        yield Check(name, False, f"onnxruntime {onnxruntime.__version__} cannot run it: {error}")
        return
    for output, values in expected.items():
        difference = relative_difference(last_entries(computed[output], values.shape), values)
        passed = difference <= manifest.golden.tolerance
        yield Check(
            name,
            passed,
            f"{output} differ from the golden ones by {difference:.2e} of the largest, "
            f"{manifest.golden.tolerance:.0e} is allowed",
        )


def last_entries(array: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Cut ``array`` to its last entries along one axis, ``shape`` in all: golden logits of a text are those after its
    last token alone. Arrays that differ from it otherwise, or in their last axis, are returned as they are."""
    if array.ndim != len(shape):
        return array
    cut = [axis for axis, (own, wanted) in enumerate(zip(array.shape, shape, strict=True)) if own != wanted]
    if len(cut) != 1 or cut[0] == array.ndim - 1 or array.shape[cut[0]] < shape[cut[0]]:
        return array
    first = array.shape[cut[0]] - shape[cut[0]]
    return array.take(range(first, array.shape[cut[0]]), axis=cut[0])


def relative_difference(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest absolute difference over the largest magnitude in ``expected``; infinite if shapes differ or NaN."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    difference = float(np.abs(actual - expected).max())
    return difference / max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fips_ort.validate", description="Prove that an artefact is sound.")
    parser.add_argument("folder", type=Path, help="the artefact's folder")
    folder = parser.parse_args(arguments).folder
    passed = True
    try:
        for check in validate(folder):
            print(check, flush=True)
            passed = passed and check.passed
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
