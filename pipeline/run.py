"""A whole run: the list of stages, in order, with what each depends on."""

import json
import os
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exporters.artifact import Golden, Provenance, write_artifact
from exporters.audit import audit
from exporters.modules import install_packed
from exporters.packed_model import PackedModel, load_packed_model, save_packed_model
from exporters.parity import ParityError, check_parity
from exporters.vision import export_vision
from fips_ort.errors import ArtifactError
from fips_ort.load import load
from fips_ort.manifest import MANIFEST, read_manifest, sha256
from fips_ort.memory import measure_memory
from torch import nn

from pipeline import stages
from pipeline.bench import DENSE_FLOAT32, artefact_sessions, dense_sessions, seconds_per_run
from pipeline.compress import install
from pipeline.data import ImageData, load_data
from pipeline.errors import InputError, StageError
from pipeline.evaluate import Quality, divergence
from pipeline.files import read_json, write_json
from pipeline.hardware import describe_hardware
from pipeline.models.adapters import MLPSite, find_mlps
from pipeline.models.loading import load_preprocessing
from pipeline.plan import Plan, make_plan
from pipeline.progress import Progress
from pipeline.quantize import freeze
from pipeline.recipe import PretrainedModel, Recipe
from pipeline.report import write_report
from pipeline.report_schema import SCHEMA_VERSION, Report
from pipeline.run_folder import RunFolder, versions

ARTIFACT = "artifact"
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


def run(recipe: Recipe, folder: Path, progress: Progress, *, fresh: bool = False) -> Report:
    """Everything from the recipe to the validated artefact in ``folder/artifact`` and the report beside it.

    Stages whose inputs have not changed are taken from ``folder/work``. Raises InputError for what the user can
    mend, StageError if the artefact does not keep what was promised.
    """
    run_folder = RunFolder(folder, progress, fresh=fresh)
    with run_folder.lock():
        return _run(recipe, run_folder, progress)


def _run(recipe: Recipe, folder: RunFolder, progress: Progress) -> Report:
    work = folder.work
    preprocessing = load_preprocessing(recipe.model, recipe.data)
    # A pretrained model may come with a large data set: only what the run draws is read and hashed.
    limited = isinstance(recipe.model, PretrainedModel)
    limits = (recipe.calibration.samples, recipe.evaluation.samples) if limited else (None, None)
    data = load_data(recipe.data, preprocessing, recipe.seed, *limits)
    settings = recipe.model_dump(mode="json")
    key = folder.stage(
        "model",
        [settings["model"], recipe.seed, data.hash],
        "",
        lambda out: None
        if isinstance(recipe.model, PretrainedModel)
        else stages.train_dense(out, recipe, preprocessing, data, progress),
    )
    loaded = stages.open_dense(work / "model", recipe, preprocessing, data)
    sites = find_mlps(loaded.model)
    plan = make_plan(recipe, sites)
    dense = Dense(loaded.model, loaded.image_processor, loaded.image_size, sites, plan, data)
    key_of_dense = [loaded.source_hash, data.hash, key]

    def evaluated(name: str, before: str, make_model: Callable[[], nn.Module]) -> Quality:
        def compute(out: Path) -> None:
            model = make_model().eval()
            stages.save_quality(stages.measure(stages.predictor(model), recipe, data, progress, name), out)

        folder.stage(f"evaluate/{name}", settings["evaluation"], before, compute)
        return stages.load_quality(work / "evaluate" / name)

    quality = {"dense": evaluated("dense", key, lambda: dense.model)}
    errors: dict[str, dict[str, float]] = {}

    # Calibration, factorization, fit: group by group.
    calibration = work / "calibrate"
    used_sites = [site for group in plan.groups for site in group.sites]
    calibrated = folder.stage(
        "calibrate",
        [settings["calibration"], settings["compression"]["groups"], recipe.seed],
        json.dumps(key_of_dense),
        lambda out: stages.calibrate(out, recipe, dense.model, used_sites, data, progress),
    )
    keys = {}
    for group in plan.groups:
        keys[group.name] = folder.stage(
            f"factorize/{group.name}",
            [settings["compression"], asdict(group)],
            calibrated,
            lambda out, group=group: stages.factorize(out, recipe, dense.model, group, calibration),
        )
    factorized = [work / "factorize" / group.name for group in plan.groups]
    quality["factorized"] = evaluated(
        "factorized",
        json.dumps(keys),
        lambda: install(dense.model, stages.restore_all(recipe, dense.model, plan, factorized)),
    )
    errors["factorized"] = _merge_errors(factorized)
    for group in plan.groups:
        keys[group.name] = folder.stage(
            f"fit/{group.name}",
            settings["fit"],
            keys[group.name],
            lambda out, group=group: stages.fit(
                out, recipe, dense.model, group, work / "factorize" / group.name, calibration, progress
            ),
        )
    current = [work / "fit" / group.name for group in plan.groups]
    key = json.dumps(keys)
    quality["fitted"] = evaluated(
        "fitted", key, lambda: install(dense.model, stages.restore_all(recipe, dense.model, plan, current))
    )
    errors["fitted"] = _merge_errors(current)

    # Optional global error minimisation.
    if recipe.finetune is not None:
        before = current
        key = folder.stage(
            "finetune",
            settings["finetune"],
            key,
            lambda out: stages.finetune(out, recipe, dense.model, plan, before, calibration, data, progress),
        )
        current = [work / "finetune" / group.name for group in plan.groups]
        quality["finetuned"] = evaluated(
            "finetuned", key, lambda: install(dense.model, stages.restore_all(recipe, dense.model, plan, current))
        )
        errors["finetuned"] = stages.load_errors(work / "finetune")

    # Quantization-aware training, on a model whose other weights are as they will be stored.
    base = stages.store_rest(recipe, dense.model, sites, dense.image_size)
    segments = stages.segments_of_groups(recipe, dense.model, plan, current)
    unquantized = current
    schemes = {name: value for name, value in settings["quantization"].items() if name != "training"}
    key = folder.stage(
        "qat/0-scales",
        [schemes, settings["export"]["accuracy_level"]],
        key,
        lambda out: stages.quantize(out, recipe, dense.model, base, plan, unquantized, calibration),
    )
    last = work / "qat" / "0-scales"
    current = [last / group.name for group in plan.groups]
    for position, entry in enumerate(recipe.quantization.training):
        before = current
        name = f"qat/{position + 1}-{entry.objective}"
        key = folder.stage(
            name,
            [settings["quantization"]["training"][position], recipe.seed],
            key,
            lambda out, position=position, before=before: stages.train_quantized(
                out, recipe, position, dense.model, base, plan, unquantized, before, calibration, data, progress
            ),
        )
        last = work / name
        current = [last / group.name for group in plan.groups]
    mlps = stages.restore_quantized(recipe, base, plan, unquantized, current)
    fake_quantized = install(base, mlps).eval()
    quality["qat"] = evaluated("qat", key, lambda: fake_quantized)
    errors["qat"] = stages.load_errors(last)

    # Integer codes, artefact, validation.
    key = folder.stage("pack", [], key, lambda out: save_packed_model(freeze(mlps), out / "packed.safetensors"))
    packed = load_packed_model(work / "pack" / "packed.safetensors")
    level = recipe.export.accuracy_level
    stored = install_packed(base, packed, level).eval()
    artifact = folder.folder / ARTIFACT
    key = folder.stage(
        "export",
        [settings["export"], recipe.name],
        key,
        lambda out: _export(out, recipe, dense, stored, packed, artifact),
        is_valid=lambda out: _is_intact(out, artifact),
    )
    folder.stage(
        "validate",
        [settings["export"], settings["evaluation"]],
        key,
        lambda out: _validate(out, recipe, dense, fake_quantized, stored, packed, artifact, progress),
    )
    for backend in ("onnx_native", "onnx_portable"):
        quality[backend] = stages.load_quality(work / "validate" / backend)
    folder.stage("bench", [], key, lambda out: _bench(out, dense, artifact))
    report = _report(recipe, folder, dense, packed, segments, mlps, quality, errors)
    write_report(report, folder.folder)
    return report


def _merge_errors(folders: list[Path]) -> dict[str, float]:
    return {block: error for folder in folders for block, error in stages.load_errors(folder).items()}


# --- artefact --------------------------------------------------------------------------------------------------


def _export(out: Path, recipe: Recipe, dense: Dense, stored: nn.Module, packed: PackedModel, artifact: Path) -> None:
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
        write_artifact(artifact, exported, packed, golden, provenance, save_config, recipe.export.max_shard_size)
    except ArtifactError as error:
        raise InputError(str(error)) from None
    rows = audit(artifact, packed, recipe.quantization.rest.weights)
    write_json(out / "audit.json", [asdict(row) for row in rows])
    write_json(out / "artifact.json", {"manifest_sha256": sha256(artifact / MANIFEST)})


def _is_intact(out: Path, artifact: Path) -> bool:
    """Whether the artefact is the one that the export stage wrote, byte by byte."""
    try:
        read_manifest(artifact).check_files(artifact)
        return bool(sha256(artifact / MANIFEST) == read_json(out / "artifact.json")["manifest_sha256"])
    except (ArtifactError, OSError):
        return False


def _validate(
    out: Path,
    recipe: Recipe,
    dense: Dense,
    fake_quantized: nn.Module,
    stored: nn.Module,
    packed: PackedModel,
    artifact: Path,
    progress: Progress,
) -> None:
    """Fake-quantized ↔ stored numbers ↔ both backends; then the accuracy of the file itself."""
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
        raise StageError(str(error)) from None
    for backend in ("native", "portable"):
        session = load(artifact, native=backend == "native", verify=backend == "native")

        def predict(pixel_values: torch.Tensor, session: Any = session) -> torch.Tensor:
            return torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])

        name = f"onnx_{backend}"
        stages.save_quality(stages.measure(predict, recipe, dense.data, progress, name), out / name)
    content = {
        name: {"max_abs": difference.absolute, "relative": difference.relative}
        for name, difference in (
            ("native_vs_torch", parity.native_vs_torch),
            ("portable_vs_torch", parity.portable_vs_torch),
            ("native_vs_portable", parity.native_vs_portable),
        )
    }
    same = [stages.load_quality(out / name).logits.argmax(dim=1) for name in ("onnx_native", "onnx_portable")]
    write_json(out / "parity.json", {**content, "tolerance": tolerance, "same_predictions": torch.equal(*same)})


def _bench(out: Path, dense: Dense, artifact: Path) -> None:
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


# --- report ----------------------------------------------------------------------------------------------------


def _report(
    recipe: Recipe,
    folder: RunFolder,
    dense: Dense,
    packed: PackedModel,
    segments: dict[str, Any],
    mlps: list[Any],
    quality: dict[str, Quality],
    errors: dict[str, dict[str, float]],
) -> Report:
    work, artifact, plan = folder.work, folder.folder / ARTIFACT, dense.plan
    parameters = sum(parameter.numel() for parameter in dense.model.parameters())
    compressed = sum(group.dense_parameters for group in plan.groups)
    mlp_parameters = sum(site.width * site.hidden * (len(site.first) + 1) for site in dense.sites)
    weights = packed.weights().values()
    mlp_stored = sum(weight.nbytes for weight in weights)
    values = stages.kept_values(mlps)
    value_bits = sum(
        int((mask := unpacked_mask(weight))[rows, columns].sum()) * bits
        for weight in weights
        for bits, rows, columns in weight.layout.submatrices()
    )
    by_part = _bytes_by_part(artifact, packed, read_json(work / "export" / "audit.json"))
    size = sum(by_part.values())
    unquantized = 2 * (parameters - compressed + values)
    factorized_values = sum(group.rank * (group.width + group.columns) for group in plan.groups)
    stage_bytes = {
        "dense": 2 * parameters,
        "factorized": 2 * (parameters - compressed + factorized_values),
        "fitted": unquantized,
        "finetuned": unquantized,
        "qat": size,
        "onnx_native": size,
        "onnx_portable": size,
    }
    drift = divergence(quality["onnx_native"].logits, quality["dense"].logits)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "model": {
            "name": type(dense.model).__name__,
            "model_type": dense.model.config.model_type,  # type: ignore[union-attr]
            "source": recipe.model.source,
            "parameters": parameters,
            "mlp_parameters": mlp_parameters,
        },
        "data": {
            "source": recipe.data.source,
            "hash": dense.data.hash,
            "train_samples": len(dense.data.train),
            "calibration_samples": min(recipe.calibration.samples or len(dense.data.train), len(dense.data.train)),
            "test_samples": quality["dense"].samples,
        },
        "versions": versions(),
        "hardware": describe_hardware(),
        "groups": [
            {
                "name": group.name,
                "blocks": [site.block for site in group.sites],
                "width": group.width,
                "columns": group.columns,
                "rank": group.rank,
                "basis_bits": _bits(segments[group.name][0]),
                "projection_bits": _bits(segments[group.name][1]),
                "pattern": recipe.compression.pattern,
                "singular_values": read_json(work / "factorize" / group.name / "singular_values.json"),
            }
            for group in plan.groups
        ],
        "dense_blocks": list(plan.dense_blocks),
        "bytes": {
            "dense_float16": 2 * parameters,
            "artifact": size,
            "mlp_dense_float16": 2 * compressed,
            "mlp_stored": mlp_stored,
            "by_part": by_part,
        },
        "bits_per_weight": {"paper": value_bits / compressed, "stored": 8 * mlp_stored / compressed},
        "quality": {
            "metric": "accuracy",
            "unit": "fraction",
            "samples": quality["dense"].samples,
            "standard_error": {stage: result.standard_error for stage, result in quality.items()},
            **{stage: result.accuracy for stage, result in quality.items()},
        },
        "stage_bytes": {stage: stage_bytes[stage] for stage in quality},
        "divergence": asdict(drift),
        "reconstruction_error": errors,
        "parity": read_json(work / "validate" / "parity.json"),
        "speed": read_json(work / "bench" / "speed.json"),
        "memory": {
            **read_json(work / "bench" / "memory.json"),
            "pipeline_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
        "warnings": [],
        "seconds": folder.seconds,
        "reused_stages": folder.reused,
    }
    return report  # type: ignore[return-value]


def unpacked_mask(weight: Any) -> np.ndarray:
    """Which entries of a packed weight are stored: bool [rows, columns]."""
    from fips_ort.packed import unpack

    mask = unpack(weight)[2]
    return np.ones((weight.layout.rows, weight.layout.columns), np.bool_) if mask is None else mask


def _bits(sizes: tuple[int, ...]) -> dict[str, int]:
    from fips_ort.layout import BIT_WIDTHS

    return {str(bits): size for bits, size in zip(BIT_WIDTHS, sizes, strict=True) if size}


def _bytes_by_part(artifact: Path, packed: PackedModel, audit_rows: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes of the artefact's folder by what they are for; adds up to the whole folder."""
    bases = set(map(id, packed.bases.values()))
    parts = {"basis codes": 0, "projection codes": 0, "sparsity patterns": 0, "scales": 0}
    for weight in packed.weights().values():
        parts["basis codes" if id(weight) in bases else "projection codes"] += weight.codes.nbytes
        parts["sparsity patterns"] += weight.pattern.nbytes
        parts["scales"] += weight.scales.nbytes
    manifest = read_manifest(artifact)
    sizes = {path.relative_to(artifact).as_posix(): path.stat().st_size for path in artifact.rglob("*") if path.is_file()}
    shards = {tensor.file for tensor in manifest.tensors} - {manifest.model}
    data = sum(sizes[name] for name in shards)
    inline = sum(tensor.bytes for tensor in manifest.tensors if tensor.file == manifest.model)
    parts["rest of the model"] = data + inline - sum(parts.values())
    parts["graph"] = sizes[manifest.model] - inline
    parts["native library"] = sizes[manifest.library]
    counted = {manifest.model, manifest.library, *shards}
    parts["other files"] = sum(size for name, size in sizes.items() if name not in counted)
    return parts
