"""What ``report.json`` holds: the typed description of a run's report, and the checks of its inner consistency.

One report serves image classifiers and language models; ``quality.metric`` tells which: accuracy, higher is better,
or perplexity, lower is better. Sizes are bytes, times seconds, accuracies and errors fractions of 1. Block indices
are strings where they are keys (JSON has no others).
"""

import json
import math
from typing import Any, Literal, NotRequired, TypedDict

from pipeline.plumbing.hardware import Hardware

SCHEMA_VERSION = 3

Stage = Literal["dense", "factorized", "fitted", "finetuned", "rounded", "qat", "onnx_native", "onnx_portable"]
STAGES: tuple[Stage, ...] = (
    "dense",
    "factorized",
    "fitted",
    "finetuned",
    "rounded",
    "qat",
    "onnx_native",
    "onnx_portable",
)
"""``rounded``: the codes before any training of them, as ``quantization.start`` found them."""
FactorStage = Literal["factorized", "fitted", "finetuned"]
FACTOR_STAGES: tuple[FactorStage, ...] = ("factorized", "fitted", "finetuned")
"""The stages with factors in floating point; method dense has none of them."""
TrainedStage = Literal["factorized", "fitted", "finetuned", "rounded", "qat"]
TRAINED_STAGES: tuple[TrainedStage, ...] = (*FACTOR_STAGES, "rounded", "qat")
"""The stages that change the MLPs; those after them store and run what QAT ended with."""


class Model(TypedDict):
    """``parameters`` of the whole dense model, ``mlp_parameters`` of all its MLPs."""

    name: str
    model_type: str
    source: str
    parameters: int
    mlp_parameters: int


class Compression(TypedDict):
    """``method`` fips: shared bases and projections; dense: the MLPs' own matrices, quantized. ``start``: how the
    codes were found before training."""

    method: Literal["fips", "dense"]
    start: Literal["nearest", "gptq"]


class Data(TypedDict):
    """Samples are images, or windows of text: then with ``context``, tokens in a window, and tokens in all."""

    source: str
    hash: str
    train_samples: int
    calibration_samples: int
    test_samples: int
    context: NotRequired[int]
    train_tokens: NotRequired[int]
    calibration_tokens: NotRequired[int]
    test_tokens: NotRequired[int]


TEXT_KEYS = ("context", "train_tokens", "calibration_tokens", "test_tokens")
"""What :class:`Data` has for text, and only for text."""


class Group(TypedDict):
    """Blocks that share one basis. ``width`` d, ``columns`` N and ``rank`` r of the paper.

    ``basis_bits`` and ``projection_bits``: bits → entries of the rank axis stored with them.
    ``singular_values``: what the SVD of the initialisation found, falling.

    Method dense has no basis: ``rank`` is None, ``basis_bits`` and ``singular_values`` are empty, and
    ``projection_bits`` has the one bit-width of the matrices, mapped to ``width``.
    """

    name: str
    blocks: list[int]
    width: int
    columns: int
    rank: int | None
    basis_bits: dict[str, int]
    projection_bits: dict[str, int]
    pattern: str
    singular_values: list[float]


class Bytes(TypedDict):
    """``by_part`` adds up to ``artifact``; :data:`MLP_PARTS` and :data:`PACKAGING_PARTS` name what is special in it."""

    dense_float16: int
    artifact: int
    mlp_dense_float16: int
    mlp_stored: int
    by_part: dict[str, int]


MLP_PARTS = ("basis codes", "projection codes", "weight codes", "sparsity patterns", "scales")
"""Parts of ``bytes.by_part`` that store compressed MLPs (``weight codes``: of method dense)."""
PACKAGING_PARTS = ("graph", "native library", "tokenizer", "other files")
"""Parts that are no weights. All others are weights outside the MLPs: ``token table``, ``rest of the model``."""


class BitsPerWeight(TypedDict):
    """Both over the weights of the original MLPs: ``paper`` counts values only, ``stored`` every byte."""

    paper: float
    stored: float


class _Quality(TypedDict):
    """A number per stage the run had, on the same samples, with its standard error."""

    standard_error: dict[Stage, float]
    dense: float
    factorized: NotRequired[float]
    fitted: NotRequired[float]
    finetuned: NotRequired[float]
    rounded: NotRequired[float]
    qat: float
    onnx_native: float
    onnx_portable: NotRequired[float]


class Accuracy(_Quality):
    """Top-1 accuracy on ``samples`` images, with binomial standard errors."""

    metric: Literal["accuracy"]
    unit: Literal["fraction"]
    samples: int


class PairedDifference(TypedDict):
    """To the dense model, window by window: mean difference of the negative log-likelihood in nats a token, its
    standard error over windows, and ``ratio`` of the perplexities, which is exp(``nll``)."""

    nll: float
    standard_error: float
    ratio: float


class Perplexity(_Quality):
    """exp of the mean negative log-likelihood of ``tokens`` tokens in ``windows`` windows of ``context`` tokens,
    which start ``stride`` tokens apart. ``standard_error`` of the perplexity, over windows."""

    metric: Literal["perplexity"]
    unit: Literal["perplexity"]
    tokens: int
    context: int
    stride: int
    windows: int
    difference_to_dense: dict[Stage, PairedDifference]


Quality = Accuracy | Perplexity


class StageBytes(TypedDict):
    """Bytes of the whole model at each stage; before quantization as stored in float16."""

    dense: int
    factorized: NotRequired[int]
    fitted: NotRequired[int]
    finetuned: NotRequired[int]
    rounded: NotRequired[int]
    qat: int
    onnx_native: int
    onnx_portable: NotRequired[int]


class Divergence(TypedDict):
    """Of the artefact from the dense model: KL(dense ‖ artefact) in nats over samples (images, or tokens of text,
    which have more percentiles), share of them with the same top label or token."""

    kl_mean: float
    kl_median: NotRequired[float]
    kl_p90: NotRequired[float]
    kl_p99: float
    kl_p999: NotRequired[float]
    kl_max: NotRequired[float]
    same_top1: float


DivergenceKey = Literal["kl_mean", "kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max"]
PERCENTILES: tuple[DivergenceKey, ...] = ("kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max")
"""Of the divergence of a language model, rising."""


class ReconstructionError(TypedDict):
    """Block index → squared error of the MLP's output relative to the mean square of the dense output."""

    factorized: NotRequired[dict[str, float]]
    fitted: NotRequired[dict[str, float]]
    finetuned: NotRequired[dict[str, float]]
    rounded: NotRequired[dict[str, float]]
    qat: dict[str, float]


class Difference(TypedDict):
    """Largest difference of two sets of logits, absolute and relative to the largest logit."""

    max_abs: float
    relative: float


class Parity(TypedDict):
    """With float32 activations; ``tolerance`` is for ``relative``. ``rounding``: what int8 activations change, where
    the artefact permits them."""

    native_vs_torch: Difference
    portable_vs_torch: Difference
    native_vs_portable: Difference
    rounding: NotRequired[Difference]
    tolerance: float
    same_predictions: bool


class ImageSpeedRow(TypedDict):
    backend: str
    images_per_second: float
    ratio_to_float32: float


class ImageSpeed(TypedDict):
    """``rows``: the artefact with native kernels first."""

    unit: Literal["images/s"]
    batch: int
    threads: int
    rows: list[ImageSpeedRow]


class TokenSpeedRow(TypedDict):
    """The ratios are to the same model exported at int4 by onnxruntime-genai's builder, where that was measured."""

    backend: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_ratio_to_int4: NotRequired[float]
    decode_ratio_to_int4: NotRequired[float]


class TokenSpeed(TypedDict):
    """A prompt of ``prompt_tokens``, then ``generated_tokens`` one by one. ``rows``: the artefact with native kernels
    first; the ratios in every row or in none."""

    unit: Literal["tokens/s"]
    prompt_tokens: int
    generated_tokens: int
    threads: int
    rows: list[TokenSpeedRow]


Speed = ImageSpeed | TokenSpeed


class Memory(TypedDict):
    """Resident memory: of a process that has loaded the artefact, that runs it, and that made it.

    ``peak_rss_by_stage``: the largest resident set of the process that computed a stage, from the end of the stage
    before on. ``load_rss_by_backend``: backend of a row of ``speed`` → resident memory after loading it.
    """

    load_rss_bytes: int
    peak_rss_bytes: int
    pipeline_peak_rss_bytes: int
    peak_rss_by_stage: dict[str, int]
    load_rss_by_backend: NotRequired[dict[str, int]]


class Report(TypedDict):
    """``report.json``. ``disk_bytes``: what the run keeps in its work folder."""

    schema_version: int
    recipe: dict[str, Any]
    model: Model
    compression: Compression
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
    disk_bytes: int
    reused_stages: list[str]


def stages_of(report: Report) -> list[Stage]:
    """The stages the run had, in order."""
    return [stage for stage in STAGES if stage in report["quality"]]


def trained_stages_of(report: Report) -> list[TrainedStage]:
    """The stages with reconstruction errors, in order."""
    return [stage for stage in TRAINED_STAGES if stage in report["reconstruction_error"]]


# --- checks ----------------------------------------------------------------------------------------------------


def check_report(report: Report) -> None:
    """Raise ValueError for a report that contradicts itself or that JSON cannot hold (NaN, infinity)."""
    if report["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"report of schema version {report['schema_version']}, expected {SCHEMA_VERSION}")
    try:
        json.dumps(report, allow_nan=False)
    except ValueError:
        raise ValueError(f"the report holds numbers that are not finite: {', '.join(_not_finite(report))}") from None
    sizes = report["bytes"]
    total = sum(sizes["by_part"].values())
    if total != sizes["artifact"]:
        raise ValueError(f"bytes.by_part adds up to {total}, bytes.artifact is {sizes['artifact']}")
    _check_stages(report)
    _check_groups(report)
    _check_kind(report)
    if report["quality"]["metric"] == "perplexity":
        _check_perplexity(report["quality"])
    _check_speed(report)


def _check_stages(report: Report) -> None:
    stages = set(stages_of(report))
    method = report["compression"]["method"]
    required: set[str] = {"dense", "qat", "onnx_native"} | ({"factorized"} if method == "fips" else set())
    if missing := required - stages:
        raise ValueError(f"quality lacks the stages {sorted(missing)} of method {method}")
    if method == "dense" and (foreign := stages & set(FACTOR_STAGES)):
        raise ValueError(f"quality has the stages {sorted(foreign)}, which method dense has not")
    compared: list[tuple[str, set[Any], set[Any]]] = [
        ("stage_bytes", set(report["stage_bytes"]), stages),
        ("quality.standard_error", set(report["quality"]["standard_error"]), stages),
        ("reconstruction_error", set(report["reconstruction_error"]), stages & set(TRAINED_STAGES)),
    ]
    if report["quality"]["metric"] == "perplexity":
        differences = set(report["quality"]["difference_to_dense"])
        compared.append(("quality.difference_to_dense", differences, stages - {"dense"}))
    for name, found, expected in compared:
        if found != expected:
            raise ValueError(f"{name} has the stages {sorted(found)}, quality has {sorted(expected)} for it")


def _check_groups(report: Report) -> None:
    grouped = {str(block) for group in report["groups"] for block in group["blocks"]}
    if not grouped:
        raise ValueError("the report has no compressed blocks")
    for trained in trained_stages_of(report):
        if (blocks := set(report["reconstruction_error"][trained])) != grouped:
            raise ValueError(
                f"reconstruction_error.{trained} has the blocks {sorted(blocks)}, the groups have {sorted(grouped)}"
            )
    factorized = report["compression"]["method"] == "fips"
    for group in report["groups"]:
        has_basis = (group["rank"] is not None, bool(group["basis_bits"]), bool(group["singular_values"]))
        if set(has_basis) != {factorized}:
            raise ValueError(
                f"{group['name']}: rank, basis_bits and singular_values go with method fips, and only with it; the "
                f"method is {report['compression']['method']}"
            )


def _check_kind(report: Report) -> None:
    """Data, divergence and speed are of the kind that the metric says."""
    metric = report["quality"]["metric"]
    is_text = metric == "perplexity"
    extra = set(PERCENTILES) - {"kl_p99"}
    wrong: set[str] = (set(TEXT_KEYS) - set(report["data"])) if is_text else set(TEXT_KEYS) & set(report["data"])
    wrong |= (extra - set(report["divergence"])) if is_text else extra & set(report["divergence"])
    if wrong:
        raise ValueError(f"metric {metric}: data and divergence {'lack' if is_text else 'have'} {sorted(wrong)}")
    unit = "tokens/s" if is_text else "images/s"
    if report["speed"]["unit"] != unit:
        raise ValueError(f"metric {metric}: speed in {report['speed']['unit']}, expected {unit}")
    if is_text:
        values = [report["divergence"][key] for key in PERCENTILES]
        if sorted(values) != values:
            raise ValueError(f"the percentiles {', '.join(PERCENTILES)} of the divergence do not rise: {values}")


def _check_perplexity(quality: Perplexity) -> None:
    if not 0 < quality["tokens"] <= quality["windows"] * quality["context"]:
        raise ValueError(
            f"quality.tokens is {quality['tokens']}, {quality['windows']} windows of {quality['context']} tokens have "
            f"at most {quality['windows'] * quality['context']}"
        )
    if not 0 < quality["stride"] <= quality["context"]:
        raise ValueError(f"quality.stride is {quality['stride']}, expected 1 to {quality['context']}, the context")
    for stage, difference in quality["difference_to_dense"].items():
        # Sums over windows in another order differ by rounding; anything more is another set of tokens.
        for expected in (math.exp(difference["nll"]), quality[stage] / quality["dense"]):
            if not math.isclose(difference["ratio"], expected, rel_tol=1e-4):
                raise ValueError(
                    f"quality.difference_to_dense.{stage}.ratio is {difference['ratio']:.6g}, its nll and the "
                    f"perplexities say {math.exp(difference['nll']):.6g} and {quality[stage] / quality['dense']:.6g}"
                )


def _check_speed(report: Report) -> None:
    speed = report["speed"]
    backends = [row["backend"] for row in speed["rows"]]
    if not backends:
        raise ValueError("speed has no rows")
    if unknown := set(report["memory"].get("load_rss_by_backend", ())) - set(backends):
        raise ValueError(f"memory.load_rss_by_backend has {sorted(unknown)}, the rows of speed have {backends}")
    if speed["unit"] == "tokens/s":
        counts = {len({"prefill_ratio_to_int4", "decode_ratio_to_int4"} & set(row)) for row in speed["rows"]}
        if counts not in ({0}, {2}):
            raise ValueError("speed: both ratios to int4 belong in every row, or in none")


def _not_finite(value: Any, key: str = "") -> list[str]:
    if isinstance(value, dict):
        return [
            found for name, item in value.items() for found in _not_finite(item, f"{key}.{name}" if key else str(name))
        ]
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in _not_finite(item, f"{key}.{index}")]
    return [key] if isinstance(value, float) and (value != value or abs(value) == float("inf")) else []
