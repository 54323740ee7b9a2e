"""The report of a run, put together from what its stages left behind."""

from pathlib import Path
from typing import Any

import torch

from exporters.packed_model import PackedModel
from fips_ort.layout import BIT_WIDTHS, Segments
from fips_ort.manifest import read_manifest
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import kept_values, named_factors
from pipeline.evaluation.measurements import Agreement, Benchmark, Stage, TrainedStage
from pipeline.plumbing.files import read_json
from pipeline.plumbing.hardware import describe_hardware
from pipeline.plumbing.peak_memory import peak_rss_bytes
from pipeline.plumbing.records import read_record
from pipeline.plumbing.run_folder import RunFolder, versions
from pipeline.quantization.rest_layers import fitted_rest
from pipeline.recipe.plan import GroupPlan, Plan, fitted_rows
from pipeline.recipe.schema import Recipe
from pipeline.report.schema import (
    BitsPerWeight,
    Bytes,
    DenseModel,
    Group,
    Memory,
    Method,
    Report,
    RestWeight,
)
from pipeline.tasks.base import Task
from qat.factor import Factor

TOKEN_TABLE = "model.embed_tokens."
"""Beginning of the names of a language model's initializers for its token table."""


def assemble_report(
    task: Task,
    plan: Plan,
    folder: RunFolder,
    *,
    artifact: Path,
    packed: PackedModel,
    segments: dict[str, tuple[Segments, Segments]],
    mlps: list[FactorizedMLP],
    evaluated: dict[Stage, Path],
    errors: dict[TrainedStage, dict[str, float]],
) -> Report:
    """Put the report of a run together.

    ``segments``: of (basis, projections) by group; ``evaluated``: folder of the saved quality by stage; ``errors``: by
    stage and block.
    """
    recipe, work = task.recipe, folder.work
    config: Any = task.model.config
    whole, parameters = (
        sum(parameter.numel() for parameter in model.parameters()) for model in (task.dense.whole, task.model)
    )
    compressed = sum(group.dense_parameters for group in plan.groups)
    weights = packed.weights().values()
    mlp_stored = sum(weight.nbytes for weight in weights)
    by_part = _bytes_by_part(artifact, packed)
    size = sum(by_part.values())
    unquantized = 2 * (parameters - compressed + kept_values(mlps))
    stage_bytes: dict[Stage, int] = {
        "dense": 2 * whole,
        "factorized": 2 * (parameters - compressed + sum(group.parameters for group in plan.groups)),
        "fitted": unquantized,
        "finetuned": unquantized,
        "rounded": size,
        "qat": size,
        "onnx_native": size,
        "onnx_portable": size,
    }
    quality, divergence = task.describe_quality(evaluated)
    benchmark = read_record(Benchmark, work / "bench" / "bench.json")
    return Report(
        schema_version=4,
        recipe=recipe,
        model=DenseModel(
            name=type(task.model).__name__,
            model_type=config.model_type,
            source=recipe.model.source,
            parameters=whole,
            mlp_parameters=sum(site.width * site.columns for site in task.sites),
        ),
        compression=Method(method=recipe.compression.method, start=recipe.quantization.start),
        data=task.describe_data(),
        versions=versions(),
        hardware=describe_hardware(),
        groups=tuple(
            _describe_group(plan.recipes[group.name], group, segments[group.name], work) for group in plan.groups
        ),
        dense_blocks=tuple(plan.dense_blocks),
        rest_weights=tuple(
            RestWeight(name=weight.name, bits=_bits(tuple(weight.segments)), bytes=weight.bytes)
            for weight in read_manifest(artifact).weights
            if weight.name not in packed.weights()
        ),
        bytes=Bytes(
            dense_float16=2 * whole,
            artifact=size,
            mlp_dense_float16=2 * compressed,
            mlp_stored=mlp_stored,
            by_part=by_part,
        ),
        bits_per_weight=BitsPerWeight(
            paper=sum(map(_value_bits, named_factors(mlps).values())) / compressed, stored=8 * mlp_stored / compressed
        ),
        quality=quality,
        divergence=divergence,
        stage_bytes={stage: stage_bytes[stage] for stage in evaluated},
        reconstruction_error=errors,
        parity=read_record(Agreement, work / "validate" / "parity.json"),
        speed=benchmark.speed,
        memory=Memory(
            **benchmark.memory.model_dump(exclude_unset=True),
            pipeline_peak_rss_bytes=max(*folder.peak_rss_bytes.values(), peak_rss_bytes()),
            peak_rss_by_stage=folder.peak_rss_bytes,
        ),
        warnings=(
            *task.dense.notes,
            *map(str, fitted_rows(plan)),
            *map(str, fitted_rest(recipe, task.model, task.sites)),
        ),
        seconds=folder.seconds,
        disk_bytes=sum(path.stat().st_size for path in work.rglob("*") if path.is_file()),
        reused_stages=tuple(folder.reused),
    )


def _describe_group(recipe: Recipe, group: GroupPlan, segments: tuple[Segments, Segments], work: Path) -> Group:
    is_fips = group.has_basis
    return Group(
        name=group.name,
        blocks=tuple(site.block for site in group.sites),
        width=group.width,
        columns=group.columns,
        rank=group.rank if is_fips else None,
        basis_bits=_bits(segments[0]),
        projection_bits=_bits(segments[1]),
        pattern=recipe.compression.pattern,
        singular_values=(
            tuple(read_json(work / "factorize" / group.name / "singular_values.json")) if is_fips else ()
        ),
    )


def _value_bits(factor: Factor) -> int:
    """Count the bits of the values of a factor alone, without scales, pattern and what fills up its layout."""
    assert factor.quantizer is not None
    kept = torch.ones_like(factor.weight, dtype=torch.bool) if factor.mask is None else factor.mask
    return sum(bits * int(kept[tuple(part)].sum()) for bits, *part in factor.quantizer.layout.submatrices())


def _bits(sizes: tuple[int, ...]) -> dict[str, int]:
    return {str(bits): size for bits, size in zip(BIT_WIDTHS, sizes, strict=True) if size}


def _bytes_by_part(artifact: Path, packed: PackedModel) -> dict[str, int]:
    """Count the bytes of the artefact's folder by what they are for; they add up to the whole folder."""
    bases = set(map(id, packed.bases.values()))
    codes = "projection codes" if bases else "weight codes"
    parts = {"basis codes": 0, codes: 0, "sparsity patterns": 0, "scales": 0}
    for weight in packed.weights().values():
        parts["basis codes" if id(weight) in bases else codes] += weight.codes.nbytes
        parts["sparsity patterns"] += weight.pattern.nbytes
        parts["scales"] += weight.scales.nbytes
    packed_bytes = sum(parts.values())
    manifest = read_manifest(artifact)
    files = [path for path in artifact.rglob("*") if path.is_file()]
    sizes = {path.relative_to(artifact).as_posix(): path.stat().st_size for path in files}
    shards = {tensor.file for tensor in manifest.tensors} - {manifest.model}
    data = sum(sizes[name] for name in shards)
    inline = sum(tensor.bytes for tensor in manifest.tensors if tensor.file == manifest.model)
    table = sum(tensor.bytes for tensor in manifest.tensors if tensor.name.startswith(TOKEN_TABLE))
    if table:
        parts["token table"] = table
    parts["rest of the model"] = data + inline - packed_bytes - table
    parts["graph"] = sizes[manifest.model] - inline
    parts["native library"] = sizes[manifest.library]
    tokenizer = {name for name in sizes if name.startswith(("tokenizer", "special_tokens"))}
    if tokenizer:
        parts["tokenizer"] = sum(sizes[name] for name in tokenizer)
    counted = {manifest.model, manifest.library, *shards, *tokenizer}
    parts["other files"] = sum(size for name, size in sizes.items() if name not in counted)
    return parts
