"""The last stages: export of the artefact, its validation three ways, and how fast it runs."""

import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from exporters.artifact import Provenance, check_replaceable, delete_artifact, write_artifact
from exporters.audit import AuditError, audit
from exporters.packed_model import PackedModel
from exporters.parity import Difference, Parity, ParityError, check_parity
from exporters.rest import packed_rest
from fips_ort.errors import ArtifactError
from fips_ort.golden import TOLERANCES
from fips_ort.load import load
from fips_ort.manifest import MANIFEST, read_manifest, sha256
from pipeline.evaluation.measurements import Agreement, LogitDifference, Stage
from pipeline.plumbing.errors import InputError, StageError
from pipeline.plumbing.files import write_json
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.records import Record, find_record, read_record, write_record
from pipeline.plumbing.run_folder import versions
from pipeline.tasks.base import Task

PARITY_TOLERANCE = 1e-3
"""Allowed difference of logits relative to the largest: float32 sums in another order. Parity is checked with float32
activations whatever the artefact permits."""
FREEZING_TOLERANCE = 1e-4
"""Allowed difference of what the stored numbers compute from what the fake-quantized ones do, relative to the largest
logit: they are the same numbers, summed in another order."""
_STAGES: dict[str, Stage] = {"native": "onnx_native", "portable": "onnx_portable"}
"""Backend → the report's name of the artefact on it."""
_EXPORTED, _FILES = "artifact.json", "artifact_files.json"


class _Exported(Record):
    """What the export stage has written: SHA-256 of the manifest."""

    manifest_sha256: str


class _Files(Record):
    """Content of ``work/artifact_files.json``: the files of the artefact that was exported last. It is kept apart from
    the stage, so that it outlives the artefact's manifest."""

    files: list[str]


def known_files(work: Path, artifact: Path) -> list[str]:
    """The files that a run with the folder ``work`` has written into ``artifact``; none if none has.

    Raises InputError if there is something else where artefacts, or rejected ones, are written.
    """
    written = find_record(_Files, work / _FILES)
    known = [] if written is None else written.files
    try:
        check_replaceable(artifact, known)
        check_replaceable(_rejected(artifact))
    except ArtifactError as error:
        raise InputError(f"--out {artifact.parent}: {error}") from None
    return known


def export(
    out: Path,
    work: Path,
    task: Task,
    stored: nn.Module,
    packed: PackedModel,
    artifact: Path,
    known: Collection[str],
    progress: Progress,
) -> None:
    """Audit what the artefact is going to store, and write it. ``known``: :func:`known_files`, which is written to
    ``work`` anew. Raises StageError if the artefact is larger than an allocation was to make it."""
    recipe = task.recipe
    exported = task.export_graph(stored, packed)
    weights = packed.weights() | packed_rest(stored).weights()
    golden = task.golden(task.predictor(stored), TOLERANCES[recipe.export.accuracy_level])
    provenance = Provenance(
        title=recipe.name,
        notes=f"Made by fips-onnx from the recipe `{recipe.name}` (in `{MANIFEST}`). The licence of the original "
        "model's weights applies to this folder too.",
        recipe=recipe.model_dump(mode="json"),
        versions=versions(),
    )
    try:
        rows = audit(exported, packed, recipe.quantization.rest.weights)
    except AuditError as error:
        raise StageError(str(error)) from None
    try:
        manifest = write_artifact(
            artifact, exported, weights, golden, provenance, task.save_config, recipe.export.max_shard_size, known
        )
    except ArtifactError as error:
        raise InputError(str(error)) from None
    write_json(out / "audit.json", [asdict(row) for row in rows])
    write_record(work / _FILES, _Files(files=[entry.path for entry in manifest.files]))
    if recipe.allocate is not None and recipe.allocate.artifact_bytes is not None:
        size = sum(entry.bytes for entry in manifest.files) + (artifact / MANIFEST).stat().st_size
        progress.say(f"  {_against_target(size, recipe.allocate.artifact_bytes, recipe.allocate.target)}")
    write_record(out / _EXPORTED, _Exported(manifest_sha256=sha256(artifact / MANIFEST)))


def _against_target(size: int, allowed: int, target: float | str) -> str:
    """How the ``size`` of an artefact compares with what an allocation ``allowed``. Raises StageError if it is more."""
    if size > allowed:
        raise StageError(
            f"the artefact has {size:,} bytes, {size - allowed:,} more than allocate.target: {target}; what the "
            f"allocation does not choose was counted too low: set allocate.target to {2 * allowed - size}B (nothing is "
            "measured again)"
        )
    return f"{size:,} bytes, {allowed - size:,} below allocate.target: {target}"


def is_intact(out: Path, artifact: Path) -> bool:
    """Whether the artefact is the one that the export stage wrote, byte by byte."""
    try:
        read_manifest(artifact).check_files(artifact)
        return bool(sha256(artifact / MANIFEST) == read_record(_Exported, out / _EXPORTED).manifest_sha256)
    except (OSError, ValueError):  # an ArtifactError is one
        return False


def validate(
    out: Path,
    task: Task,
    fake_quantized: nn.Module,
    stored: nn.Module,
    artifact: Path,
    dense_quality: Path,
    progress: Progress,
) -> None:
    """Check that the fake-quantized model, the stored numbers and both backends agree; then measure the quality of the
    file itself.

    An artefact that fails is moved to ``artifact.rejected``, so that nobody takes it for a good one.
    """
    batches = task.parity_batches()
    predict_expected, predict_actual = task.predictor(fake_quantized), task.predictor(stored)
    for batch in batches:
        with torch.inference_mode():
            expected, actual = predict_expected(batch), predict_actual(batch)
        if float((actual - expected).abs().max()) > FREEZING_TOLERANCE * float(expected.abs().max()):
            raise StageError("the packed codes do not compute what the fake-quantized model computes")
    try:
        parity = check_parity(artifact, stored, batches, PARITY_TOLERANCE)
    except ParityError as error:
        rejected = _rejected(artifact)
        try:
            delete_artifact(rejected)
        except ArtifactError as obstacle:
            raise StageError(f"{error}; the artefact must not be used: {artifact} ({obstacle})") from None
        os.replace(artifact, rejected)
        raise StageError(f"{error}; the artefact was moved to {rejected}") from None
    for backend in task.evaluated_backends:
        session = load(artifact, native=backend == "native", verify=backend == "native")
        name = _STAGES[backend]
        progress.say(f"  {name}: {task.measure(session, out / name, name, progress, against_dense=dense_quality)}")
        del session
    write_record(out / "parity.json", _describe_parity(parity))


def _rejected(artifact: Path) -> Path:
    return artifact.with_name(f"{artifact.name}.rejected")


def _describe_parity(parity: Parity) -> Agreement:
    def describe(difference: Difference) -> LogitDifference:
        return LogitDifference(max_abs=difference.absolute, relative=difference.relative)

    rounding = {} if parity.rounding is None else {"rounding": describe(parity.rounding)}
    return Agreement(
        native_vs_torch=describe(parity.native_vs_torch),
        portable_vs_torch=describe(parity.portable_vs_torch),
        native_vs_portable=describe(parity.native_vs_portable),
        **rounding,
        tolerance=PARITY_TOLERANCE,
        same_predictions=parity.native_vs_portable.same_predictions == 1.0,
    )


def quality_folders(validated: Path, task: Task) -> dict[Stage, Path]:
    """Folders in which :func:`validate` has saved the artefact's quality, by the report's name of the stage."""
    return {_STAGES[backend]: validated / _STAGES[backend] for backend in task.evaluated_backends}


def bench(out: Path, task: Task, artifact: Path, progress: Progress) -> None:
    """Measure speed beside the dense model in ONNX Runtime, and resident memory."""
    measured = task.bench(artifact)
    for name, reason in measured.speed.left_out.items():
        progress.say(f"  left out: {name} ({reason})")
    write_record(out / "bench.json", measured)
