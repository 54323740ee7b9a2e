"""Measurements: turns of all variants in one case, and the figures that follow from their times."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime

from benchmarks.graph import Graph
from benchmarks.shapes import Shape
from benchmarks.timing import BoundRun, open_session
from benchmarks.variants import BASELINES, GROUP, Variant, basis_variants, mlp_variants, product_variants
from pipeline.evaluation.turns import interleave
from pipeline.plumbing.progress import Progress

KINDS: dict[str, Callable[[Shape, int], list[Variant]]] = {
    "mlp": mlp_variants,
    "product": product_variants,
    "basis": basis_variants,
}
"""What is compared, by name: whole MLPs, the product [M, d] × [d, hidden size], the product with a basis as B = S."""
WEIGHTS = ("cold", "warm")
_MANY_ROWS = 32
"""From this many rows of activations on, weights are read rarely and multiplications take the time. The models of all
variants, which take turns, are then together larger than the cache; for fewer rows each of them is."""
Measurement = dict[str, Any]
"""One variant in one case, as it is written into the JSON; :func:`_figures` says what its figures are."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Variants of one shape that take turns, with cold or with warm weights."""

    kind: str
    shape: str
    weights: str

    def __str__(self) -> str:
        return f"{self.shape} {self.kind} {self.weights}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What every comparison is measured with.

    ``rows``: numbers of rows of activations (M). ``seconds``: about how long to measure at each number of rows and
    threads. ``cold_bytes``: how many bytes a model's cold weights take at least. ``bandwidth``: number of threads →
    bytes per second that they read.
    """

    rows: Sequence[int]
    seconds: float
    cold_bytes: int
    bandwidth: Mapping[int, float]


def measure(comparison: Comparison, variants: Sequence[Variant], settings: Settings) -> list[Measurement]:
    """Measure all variants at every number of threads and rows. Raises RuntimeError if an output is not finite."""
    few = [rows for rows in settings.rows if rows < _MANY_ROWS]
    many = [rows for rows in settings.rows if rows >= _MANY_ROWS]
    warm = comparison.weights == "warm"
    measurements: list[Measurement] = []
    with Progress().task(str(comparison), len(settings.bandwidth) * len(settings.rows)) as advance:
        for rows, together in ((few, False), (many, True)):
            if not rows:
                continue
            layers = {
                variant.name: 1 if warm else _cold_layers(variants if together else [variant], settings.cold_bytes)
                for variant in variants
            }
            measurements += _measure(comparison, variants, replace(settings, rows=rows), layers, lambda: advance(1, ""))
    return measurements


def _measure(
    comparison: Comparison,
    variants: Sequence[Variant],
    settings: Settings,
    layers: Mapping[str, int],
    advance: Callable[[], None],
) -> list[Measurement]:
    """Measure all variants with models of ``layers[variant name]`` layers; ``advance`` is called after each case."""
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory() as folder:
        models = _save_models(Path(folder), variants, layers)
        for threads, bandwidth in settings.bandwidth.items():
            sessions = {name: open_session(model, threads) for name, model in models.items()}
            for rows in settings.rows:
                times = _times(comparison, sessions, rows, settings.seconds)
                seconds = {name: [run / layers[name] for run in runs] for name, runs in times.items()}
                for variant in variants:
                    case = {
                        "shape": comparison.shape,
                        "comparison": comparison.kind,
                        "weights": comparison.weights,
                        "threads": threads,
                        "rows": rows,
                        "variant": variant.name,
                        "layers": layers[variant.name],
                        "file_bytes": sum(file.stat().st_size for file in models[variant.name].parent.iterdir()),
                    }
                    measurements.append(case | _figures(variant, seconds, rows, bandwidth))
                advance()
    return measurements


def run_overhead(folder: Path) -> float:
    """Measure the seconds of a run that computes next to nothing, which every warm time contains."""
    graph = Graph(1)
    graph.output(graph.node("Neg", [graph.input]), 1)
    graph.save(folder / "overhead.onnx")
    run = BoundRun(open_session(folder / "overhead.onnx", 1), 1)
    run()
    return median(interleave({"": run}, 0.0)[""])


def _cold_layers(variants: Sequence[Variant], cold_bytes: int) -> int:
    """How many layers, in whole groups, the models of ``variants`` need for their weights to take ``cold_bytes``."""
    return GROUP * ceil(cold_bytes / (GROUP * sum(variant.stored_bytes for variant in variants)))


def _save_models(folder: Path, variants: Sequence[Variant], layers: Mapping[str, int]) -> dict[str, Path]:
    """Save one model for each variant, in a folder of its own. Returns paths by variant."""
    paths = {}
    for index, variant in enumerate(variants):
        paths[variant.name] = folder / str(index) / "model.onnx"
        paths[variant.name].parent.mkdir()
        variant.graph(layers[variant.name]).save(paths[variant.name])
    return paths


def _times(
    comparison: Comparison, sessions: Mapping[str, onnxruntime.InferenceSession], rows: int, seconds: float
) -> dict[str, list[float]]:
    """Check the outputs, then measure the seconds of whole runs (see :func:`pipeline.evaluation.turns.interleave`)."""
    runs = {name: BoundRun(session, rows) for name, session in sessions.items()}
    for name, run in runs.items():
        run()
        if not run.finite():
            raise RuntimeError(f"{comparison}: {name} has an output that is not finite")
    return interleave(runs, seconds)


def _figures(
    variant: Variant, seconds: Mapping[str, Sequence[float]], rows: int, bandwidth: float
) -> Measurement:
    """The figures that follow from ``seconds`` of one layer in each round, by variant.

    ``milliseconds``: time of one layer (an MLP or a product) in each round, with median, least and greatest.

    ``ratios``: baseline → median over the rounds of the baseline's time by the variant's; above 1 the variant is
    faster. At one row, ``bytes_per_second`` of ``bytes_read`` (weights that the ops read, a basis for each product) and
    its ``bandwidth_fraction``; the same with ``stored`` of ``stored_bytes``, which is what memory has to deliver if all
    layers of a group find a basis in the cache after the first one.
    """
    own = seconds[variant.name]
    figures: Measurement = {
        "dense_weights": variant.weights,
        "stored_bytes": variant.stored_bytes,
        "stored_bits": 8 * variant.stored_bytes / variant.weights,
        "bytes_read": variant.bytes_read,
        "median_ms": 1e3 * median(own),
        "min_ms": 1e3 * min(own),
        "max_ms": 1e3 * max(own),
        "milliseconds": [1e3 * value for value in own],
        "ratios": {
            baseline: median(theirs / ours for theirs, ours in zip(seconds[baseline], own, strict=True))
            for baseline in BASELINES
        },
    }
    if rows == 1:
        for prefix, size in (("", variant.bytes_read), ("stored_", variant.stored_bytes)):
            speed = size / median(own)
            figures |= {f"{prefix}bytes_per_second": speed, f"{prefix}bandwidth_fraction": speed / bandwidth}
    return figures
