"""What a sweep found: a row per point out of its report, and which points no other beats."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from pipeline.evaluation.measurements import PerplexityByStage, Quality, Samples, Share, Speed, TextSamples
from pipeline.plumbing.hardware import Hardware
from pipeline.plumbing.records import Record
from pipeline.report.schema import Memory, Report
from pipeline.sweep.definition import Overrides, Point, Sweep

Size = Literal["stored_bits", "paper_bits", "artifact_bytes"]
SIZES: tuple[Size, ...] = get_args(Size)

_Item = TypeVar("_Item")


class Row(Record):
    """A point that ran. All but ``speed``, ``memory`` and ``seconds`` is the same in two runs on one machine.

    ``labels``: axis → label. ``value``: quality of the artefact. ``loss``: what it lost against the dense model, lower
    is better: accuracy as a fraction of 1, or perplexity relative to dense less 1, paired over windows.
    ``loss_standard_error``: for an accuracy, that of the accuracy. ``pareto``: the sizes in which no other point beats
    this one. ``overrides``: what its recipe has in place of the base recipe's values. ``recipe``: as nested mappings.
    """

    point: str
    labels: dict[str, str]
    value: float
    standard_error: NonNegativeFloat
    loss: float
    loss_standard_error: NonNegativeFloat
    kl_mean: NonNegativeFloat
    same_top1: Share
    paper_bits: PositiveFloat
    stored_bits: PositiveFloat
    artifact_bytes: PositiveInt
    mlp_bytes: PositiveInt
    pareto: tuple[Size, ...] = ()
    speed: Speed
    memory: Memory
    seconds: NonNegativeFloat
    overrides: Overrides
    recipe: dict[str, Any]


class Failure(Record):
    """A point that did not run, and why."""

    point: str
    labels: dict[str, str]
    message: str


class Baseline(Record):
    """The dense model that points are compared with: its quality, and the bytes of its weights in float16."""

    value: float
    standard_error: NonNegativeFloat
    bytes_float16: PositiveInt


class Results(Record):
    """Everything that a sweep found, what was timed included; written as ``sweep.json``. ``axes``: labels by axis.
    ``points`` and ``failures`` are in the order of the sweep's points."""

    schema_version: Literal[2]
    name: str
    axes: dict[str, tuple[str, ...]]
    metric: Literal["accuracy", "perplexity"]
    dense: Baseline
    data: TextSamples | Samples
    hardware: Hardware
    versions: dict[str, str]
    points: Annotated[tuple[Row, ...], Field(min_length=1)]
    failures: tuple[Failure, ...]


def gather(sweep: Sweep, endings: Mapping[str, Report | str]) -> Results:
    """Gather the results from the ``endings`` by name of a point: its report, or why there is none.

    At least one must be a report. What they have in common (data, dense model, hardware) is taken from the first.
    """
    reports = {name: ending for name, ending in endings.items() if isinstance(ending, Report)}
    rows = [_row(point, reports[point.name]) for point in sweep.points if point.name in reports]
    fronts = {size: pareto_front(rows, [(getattr(row, size), row.loss) for row in rows]) for size in SIZES}
    first = reports[rows[0].point]
    return Results(
        schema_version=2,
        name=sweep.name,
        axes={axis: tuple(labels) for axis, labels in sweep.axes.items()},
        metric=first.quality.metric,
        dense=Baseline(
            value=first.quality.dense,
            standard_error=first.quality.standard_error["dense"],
            bytes_float16=first.bytes.dense_float16,
        ),
        data=first.data,
        hardware=first.hardware,
        versions=first.versions,
        points=tuple(
            row.model_copy(update={"pareto": tuple(size for size in SIZES if row in fronts[size])}) for row in rows
        ),
        failures=tuple(
            Failure(point=point.name, labels=point.labels, message=message)
            for point in sweep.points
            if isinstance(message := endings[point.name], str)
        ),
    )


def pareto_front(items: Sequence[_Item], costs: Sequence[tuple[float, float]]) -> list[_Item]:
    """Select the ``items``, each with two ``costs`` (less is better), that no other matches in both and beats in one;
    by the first cost, rising."""
    front: list[_Item] = []
    least = float("inf")
    for (_, second), item in sorted(zip(costs, items, strict=True), key=lambda pair: pair[0]):
        if second < least:
            least = second
            front.append(item)
    return front


def _row(point: Point, report: Report) -> Row:
    quality = report.quality
    loss, loss_error = _loss(quality)
    return Row(
        point=point.name,
        labels=point.labels,
        value=quality.onnx_native,
        standard_error=quality.standard_error["onnx_native"],
        loss=loss,
        loss_standard_error=loss_error,
        kl_mean=report.divergence.kl_mean,
        same_top1=report.divergence.same_top1,
        paper_bits=report.bits_per_weight.paper,
        stored_bits=report.bits_per_weight.stored,
        artifact_bytes=report.bytes.artifact,
        mlp_bytes=report.bytes.mlp_stored,
        speed=report.speed,
        memory=report.memory,
        seconds=sum(report.seconds.values()),
        overrides=point.overrides,
        recipe=point.content,
    )


def _loss(quality: Quality) -> tuple[float, float]:
    """Return what the artefact lost against the dense model, with its standard error (see :class:`Row`)."""
    if isinstance(quality, PerplexityByStage):
        difference = quality.difference_to_dense["onnx_native"]
        return difference.ratio - 1.0, difference.ratio_error
    return quality.dense - quality.onnx_native, quality.standard_error["onnx_native"]
