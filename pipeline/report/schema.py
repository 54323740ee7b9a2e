"""What ``report.json`` holds: the typed description of a run's report, and the checks of its inner consistency.

Sizes are bytes, times seconds, accuracies and errors fractions of 1. Block indices are strings where they are
keys (JSON has no others).
"""

import json
from typing import Any, Literal, NotRequired, TypedDict

SCHEMA_VERSION = 1

Stage = Literal["dense", "factorized", "fitted", "finetuned", "qat", "onnx_native", "onnx_portable"]
STAGES: tuple[Stage, ...] = ("dense", "factorized", "fitted", "finetuned", "qat", "onnx_native", "onnx_portable")
TrainedStage = Literal["factorized", "fitted", "finetuned", "qat"]
TRAINED_STAGES: tuple[TrainedStage, ...] = ("factorized", "fitted", "finetuned", "qat")
"""The stages that change the factors; those after them store and run what QAT ended with."""


class Model(TypedDict):
    """``parameters`` of the whole dense model, ``mlp_parameters`` of all its MLPs."""

    name: str
    model_type: str
    source: str
    parameters: int
    mlp_parameters: int


class Data(TypedDict):
    source: str
    hash: str
    train_samples: int
    calibration_samples: int
    test_samples: int


class Hardware(TypedDict):
    cpu: str
    cores: int
    memory_bytes: int


class Group(TypedDict):
    """Blocks that share one basis. ``width`` d, ``columns`` N and ``rank`` r of the paper.

    ``basis_bits`` and ``projection_bits``: bits → entries of the rank axis stored with them.
    ``singular_values``: what the SVD of the initialisation found, falling.
    """

    name: str
    blocks: list[int]
    width: int
    columns: int
    rank: int
    basis_bits: dict[str, int]
    projection_bits: dict[str, int]
    pattern: str
    singular_values: list[float]


class Bytes(TypedDict):
    """``by_part`` adds up to ``artifact``."""

    dense_float16: int
    artifact: int
    mlp_dense_float16: int
    mlp_stored: int
    by_part: dict[str, int]


class BitsPerWeight(TypedDict):
    """Both over the weights of the original MLPs: ``paper`` counts values only, ``stored`` every byte."""

    paper: float
    stored: float


class Quality(TypedDict):
    """Top-1 accuracy per stage on the same ``samples``, with standard errors per stage."""

    metric: Literal["accuracy"]
    unit: Literal["fraction"]
    samples: int
    standard_error: dict[Stage, float]
    dense: float
    factorized: float
    fitted: float
    finetuned: NotRequired[float]
    qat: float
    onnx_native: float
    onnx_portable: float


class StageBytes(TypedDict):
    """Bytes of the whole model at each stage; before quantization as stored in float16."""

    dense: int
    factorized: int
    fitted: int
    finetuned: NotRequired[int]
    qat: int
    onnx_native: int
    onnx_portable: int


class Divergence(TypedDict):
    """Of the artefact from the dense model: KL(dense ‖ artefact) in nats, share of samples with the same top label."""

    kl_mean: float
    kl_p99: float
    same_top1: float


class ReconstructionError(TypedDict):
    """Block index → squared error of the MLP's output relative to the mean square of the dense output."""

    factorized: dict[str, float]
    fitted: dict[str, float]
    finetuned: NotRequired[dict[str, float]]
    qat: dict[str, float]


class Difference(TypedDict):
    """Largest difference of two sets of logits, absolute and relative to the largest logit."""

    max_abs: float
    relative: float


class Parity(TypedDict):
    """``tolerance`` is for ``relative``."""

    native_vs_torch: Difference
    portable_vs_torch: Difference
    native_vs_portable: Difference
    tolerance: float
    same_predictions: bool


class SpeedRow(TypedDict):
    backend: str
    images_per_second: float
    ratio_to_float32: float


class Speed(TypedDict):
    """``rows``: the artefact with native kernels first."""

    unit: Literal["images/s"]
    batch: int
    threads: int
    rows: list[SpeedRow]


class Memory(TypedDict):
    load_rss_bytes: int
    peak_rss_bytes: int
    pipeline_peak_rss_bytes: int


class Report(TypedDict):
    """``report.json``."""

    schema_version: int
    recipe: dict[str, Any]
    model: Model
    data: Data
    versions: dict[str, str]
    hardware: Hardware
    groups: list[Group]
    dense_blocks: list[int]
    bytes: Bytes
    bits_per_weight: BitsPerWeight
    quality: Quality
    stage_bytes: StageBytes
    divergence: Divergence
    reconstruction_error: ReconstructionError
    parity: Parity
    speed: Speed
    memory: Memory
    warnings: list[str]
    seconds: dict[str, float]
    reused_stages: list[str]


def stages_of(report: Report) -> list[Stage]:
    """The stages the run had, in order."""
    return [stage for stage in STAGES if stage in report["quality"]]


def trained_stages_of(report: Report) -> list[TrainedStage]:
    """The stages with reconstruction errors, in order."""
    return [stage for stage in TRAINED_STAGES if stage in report["reconstruction_error"]]


def check_report(report: Report) -> None:
    """Raise ValueError for a report that contradicts itself or that JSON cannot hold (NaN, infinity)."""
    if report["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"report of schema version {report['schema_version']}, expected {SCHEMA_VERSION}")
    sizes = report["bytes"]
    total = sum(sizes["by_part"].values())
    if total != sizes["artifact"]:
        raise ValueError(f"bytes.by_part adds up to {total}, bytes.artifact is {sizes['artifact']}")
    stages = set(stages_of(report))
    for name, found in (
        ("stage_bytes", set(report["stage_bytes"])),
        ("quality.standard_error", set(report["quality"]["standard_error"])),
    ):
        if found != stages:
            raise ValueError(f"{name} has the stages {sorted(found)}, quality has {sorted(stages)}")
    grouped = {str(block) for group in report["groups"] for block in group["blocks"]}
    if not grouped:
        raise ValueError("the report has no compressed blocks")
    for trained in trained_stages_of(report):
        if (blocks := set(report["reconstruction_error"][trained])) != grouped:
            raise ValueError(
                f"reconstruction_error.{trained} has the blocks {sorted(blocks)}, the groups have {sorted(grouped)}"
            )
    try:
        json.dumps(report, allow_nan=False)
    except ValueError:
        raise ValueError(f"the report holds numbers that are not finite: {', '.join(_not_finite(report))}") from None


def _not_finite(value: Any, key: str = "") -> list[str]:
    if isinstance(value, dict):
        return [
            found for name, item in value.items() for found in _not_finite(item, f"{key}.{name}" if key else str(name))
        ]
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in _not_finite(item, f"{key}.{index}")]
    return [key] if isinstance(value, float) and (value != value or abs(value) == float("inf")) else []
