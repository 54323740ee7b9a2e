"""The last stages: export of the artefact, its validation three ways, and how fast it runs."""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters.artifact import Golden, Provenance, write_artifact
from exporters.audit import AuditError, audit
from exporters.packed_model import PackedModel
from exporters.parity import ParityError, check_parity
from exporters.vision import export_vision
from fips_ort.errors import ArtifactError
from fips_ort.load import load
from fips_ort.manifest import MANIFEST, read_manifest, sha256
from fips_ort.memory import measure_memory
from pipeline.bench import DENSE_FLOAT32, artefact_sessions, dense_sessions, seconds_per_run
from pipeline.data import ImageData
from pipeline.errors import InputError, StageError
from pipeline.files import read_json, write_json
from pipeline.models.adapters import MLPSite
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.report.render import remove_report
from pipeline.run_folder import versions
from pipeline.stages import load_quality, measure, save_quality

GOLDEN_IMAGES = 4
PARITY_IMAGES = 64
PARITY_TOLERANCE = {0: 1e-3, 4: 5e-2}
"""Allowed difference of logits relative to the largest, by accuracy_level: float32 sums in another order, or
int8 activations in the native kernels."""
BENCH_BATCH = 8
BENCH_SECONDS = 10.0


@dataclass(frozen=True)
class Dense:
    """The dense model with what belongs to it."""

    model: nn.Module
    processor: Any
    image_size: int
    sites: list[MLPSite]
    plan: Plan
    data: ImageData


def export(out: Path, recipe: Recipe, dense: Dense, stored: nn.Module, packed: PackedModel, artifact: Path) -> None:
    """Audit what the artefact is going to store, and write it."""
    pixel_shape = (3, dense.image_size, dense.image_size)
    exported = export_vision(stored, pixel_shape)
    images = dense.data.test.batch(range(min(GOLDEN_IMAGES, len(dense.data.test))))[0]
    with torch.inference_mode():
        logits = stored(pixel_values=images).logits
    tolerance = PARITY_TOLERANCE[recipe.export.accuracy_level]
    golden = Golden({"pixel_values": images.numpy()}, {"logits": logits.numpy()}, tolerance)
    provenance = Provenance(
        title=recipe.name,
        notes=f"Made by fips-onnx from the recipe `{recipe.name}` (in `{MANIFEST}`). The licence of the original "
        "model's weights applies to this folder too.",
        recipe=recipe.model_dump(mode="json"),
        versions=versions(),
    )

    def save_config(folder: Path) -> None:
        dense.model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        dense.processor.save_pretrained(folder)

    try:
        rows = audit(exported, packed, recipe.quantization.rest.weights)
    except AuditError as error:
        raise StageError(str(error)) from None
    try:
        write_artifact(artifact, exported, packed, golden, provenance, save_config, recipe.export.max_shard_size)
    except ArtifactError as error:
        raise InputError(str(error)) from None
    # A report of an earlier run would now speak of another artefact.
    remove_report(artifact.parent)
    write_json(out / "audit.json", [asdict(row) for row in rows])
    write_json(out / "artifact.json", {"manifest_sha256": sha256(artifact / MANIFEST)})


def is_intact(out: Path, artifact: Path) -> bool:
    """Whether the artefact is the one that the export stage wrote, byte by byte."""
    try:
        read_manifest(artifact).check_files(artifact)
        return bool(sha256(artifact / MANIFEST) == read_json(out / "artifact.json")["manifest_sha256"])
    except (ArtifactError, OSError):
        return False


def validate(
    out: Path,
    recipe: Recipe,
    dense: Dense,
    fake_quantized: nn.Module,
    stored: nn.Module,
    artifact: Path,
    progress: Progress,
) -> None:
    """Fake-quantized ↔ stored numbers ↔ both backends; then the accuracy of the file itself.

    An artefact that fails is moved to ``artifact.rejected``, so that nobody takes it for a good one.
    """
    test = dense.data.test
    images = test.batch(range(min(PARITY_IMAGES, len(test))))[0]
    with torch.inference_mode():
        expected = fake_quantized(pixel_values=images).logits
        actual = stored(pixel_values=images).logits
    largest = float(expected.abs().max())
    if float((actual - expected).abs().max()) > 1e-4 * largest:
        raise StageError("the packed codes do not compute what the fake-quantized model computes")
    tolerance = PARITY_TOLERANCE[recipe.export.accuracy_level]
    try:
        parity = check_parity(artifact, stored, images.numpy(), tolerance)
    except ParityError as error:
        rejected = artifact.with_name(f"{artifact.name}.rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        os.replace(artifact, rejected)
        raise StageError(f"{error}; the artefact was moved to {rejected}") from None
    for backend in ("native", "portable"):
        session = load(artifact, native=backend == "native", verify=backend == "native")

        def predict(pixel_values: torch.Tensor, session: Any = session) -> torch.Tensor:
            return torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])

        name = f"onnx_{backend}"
        save_quality(measure(predict, recipe, dense.data, progress, name), out / name)
    content = {
        name: {"max_abs": difference.absolute, "relative": difference.relative}
        for name, difference in (
            ("native_vs_torch", parity.native_vs_torch),
            ("portable_vs_torch", parity.portable_vs_torch),
            ("native_vs_portable", parity.native_vs_portable),
        )
    }
    same = [load_quality(out / name).logits.argmax(dim=1) for name in ("onnx_native", "onnx_portable")]
    write_json(out / "parity.json", {**content, "tolerance": tolerance, "same_predictions": torch.equal(*same)})


def bench(out: Path, dense: Dense, artifact: Path) -> None:
    """Speed beside the dense model in ONNX Runtime, and resident memory."""
    threads = os.cpu_count() or 1
    images = dense.data.test.batch(range(min(BENCH_BATCH, len(dense.data.test))))[0].numpy()
    shape = (3, dense.image_size, dense.image_size)
    sessions = artefact_sessions(artifact, threads) | dense_sessions(dense.model, shape, threads)
    seconds = seconds_per_run(sessions, images, BENCH_SECONDS)
    rows = [
        {
            "backend": name,
            "images_per_second": len(images) / value,
            "ratio_to_float32": seconds[DENSE_FLOAT32] / value,
        }
        for name, value in seconds.items()
    ]
    write_json(out / "speed.json", {"unit": "images/s", "batch": len(images), "threads": threads, "rows": rows})
    write_json(out / "memory.json", measure_memory(artifact))
