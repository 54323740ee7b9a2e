"""What a sweep found: a row per point out of its report, and which points no other beats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from pipeline.plumbing.hardware import Hardware
from pipeline.report.schema import Report
from pipeline.sweep.definition import Point, Sweep

Outcome = tuple[Report | None, str]
"""A point's report, or None and why there is none."""
Size = Literal["paper_bits", "stored_bits", "artifact_bytes"]
SIZES: tuple[Size, ...] = ("stored_bits", "paper_bits", "artifact_bytes")


@dataclass(frozen=True)
class Row:
    """A point that ran.

    ``loss``: what it lost against the dense model, lower is better: accuracy as a fraction of 1, or perplexity relative
    to dense less 1, paired over windows. ``loss_error``: its standard error; for an accuracy that of the accuracy.
    ``speed``: of native kernels, relative to the dense model: at float32 for images, at int4 for decoding text; both
    are timed in turns, so that the ratio holds on a machine that is doing other things too.
    """

    point: Point
    report: Report

    @property
    def value(self) -> float:
        return self.report["quality"]["onnx_native"]

    @property
    def error(self) -> float:
        return self.report["quality"]["standard_error"]["onnx_native"]

    @property
    def loss(self) -> float:
        quality = self.report["quality"]
        if quality["metric"] == "perplexity":
            return quality["difference_to_dense"]["onnx_native"]["ratio"] - 1.0
        return quality["dense"] - self.value

    @property
    def loss_error(self) -> float:
        quality = self.report["quality"]
        if quality["metric"] == "perplexity":
            difference = quality["difference_to_dense"]["onnx_native"]
            return difference["ratio"] * difference["standard_error"]  # to first order
        return self.error

    @property
    def paper_bits(self) -> float:
        return self.report["bits_per_weight"]["paper"]

    @property
    def stored_bits(self) -> float:
        return self.report["bits_per_weight"]["stored"]

    @property
    def artifact_bytes(self) -> int:
        return self.report["bytes"]["artifact"]

    @property
    def speed(self) -> float:
        row = cast(Mapping[str, float], self.report["speed"]["rows"][0])
        return row["decode_ratio_to_int4" if self.report["speed"]["unit"] == "tokens/s" else "ratio_to_float32"]

    def size(self, kind: Size) -> float:
        return float(getattr(self, kind))


@dataclass(frozen=True)
class Failure:
    """A point that did not run, and why."""

    point: Point
    message: str


@dataclass(frozen=True)
class Results:
    """``rows`` and ``failures`` in the order of the sweep's points; at least one row."""

    sweep: Sweep
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]

    @property
    def metric(self) -> Literal["accuracy", "perplexity"]:
        return self.rows[0].report["quality"]["metric"]

    @property
    def dense(self) -> float:
        """Quality of the dense model."""
        return self.rows[0].report["quality"]["dense"]

    @property
    def dense_error(self) -> float:
        return self.rows[0].report["quality"]["standard_error"]["dense"]

    @property
    def dense_bytes(self) -> int:
        """Of the dense model in float16, weights only."""
        return self.rows[0].report["bytes"]["dense_float16"]

    @property
    def hardware(self) -> Hardware:
        return self.rows[0].report["hardware"]

    def front(self, kind: Size) -> list[Row]:
        """The points that no other point beats in both size and loss, by rising size."""
        return pareto_front(self.rows, [(row.size(kind), row.loss) for row in self.rows])


def collect(sweep: Sweep, outcomes: Mapping[str, Outcome]) -> tuple[list[Row], list[Failure]]:
    """Rows and failures in the order of the sweep's points."""
    rows, failures = [], []
    for point in sweep.points:
        report, message = outcomes[point.name]
        if report is None:
            failures.append(Failure(point, message))
        else:
            rows.append(Row(point, report))
    return rows, failures


def pareto_front(rows: Sequence[Row], costs: Sequence[tuple[float, float]]) -> list[Row]:
    """Of ``rows``, each with two ``costs`` (less is better), those that no other matches in both and beats in one;
    by the first cost, rising."""
    front: list[Row] = []
    least = float("inf")
    for (_, second), row in sorted(zip(costs, rows, strict=True), key=lambda pair: pair[0]):
        if second < least:
            least = second
            front.append(row)
    return front


def describe(results: Results) -> dict[str, Any]:
    """``sweep.json``: everything, what was timed included."""
    fronts = {kind: {row.point.name for row in results.front(kind)} for kind in SIZES}
    first = results.rows[0].report
    return {
        "schema_version": 1,
        "name": results.sweep.name,
        "axes": results.sweep.axes,
        "metric": results.metric,
        "dense": {
            "value": results.dense,
            "standard_error": results.dense_error,
            "bytes_float16": results.dense_bytes,
        },
        "data": first["data"],
        "hardware": results.hardware,
        "versions": first["versions"],
        "points": [
            {
                **figures(row),
                "pareto": [kind for kind in SIZES if row.point.name in fronts[kind]],
                "speed": row.report["speed"],
                "memory": row.report["memory"],
                "seconds": sum(row.report["seconds"].values()),
                "overrides": row.point.overrides,
                "recipe": row.point.content,
            }
            for row in results.rows
        ],
        "failures": [
            {"point": failure.point.name, **failure.point.labels, "message": failure.message}
            for failure in results.failures
        ],
    }


def figures(row: Row) -> dict[str, Any]:
    """What two runs of a point on one machine agree on."""
    divergence = row.report["divergence"]
    return {
        "point": row.point.name,
        "labels": row.point.labels,
        "value": row.value,
        "standard_error": row.error,
        "loss": row.loss,
        "loss_standard_error": row.loss_error,
        "kl_mean": divergence["kl_mean"],
        "same_top1": divergence["same_top1"],
        "paper_bits": row.paper_bits,
        "stored_bits": row.stored_bits,
        "artifact_bytes": row.artifact_bytes,
        "mlp_bytes": row.report["bytes"]["mlp_stored"],
    }
