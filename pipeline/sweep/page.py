"""The files of a sweep: ``sweep.json`` with everything, ``sweep.csv``, and for readers ``.md``, ``.html``, ``.png``."""

import csv
import io
from pathlib import Path

import matplotlib.style
import yaml
from markupsafe import Markup

from pipeline.plumbing.files import write_aside, write_json, write_text
from pipeline.report.figure_style import COLOURS, STYLE, to_svg
from pipeline.report.render import template_environment
from pipeline.report.sections import Table
from pipeline.report.units import (
    format_bytes,
    format_percent,
    format_perplexity,
    format_points,
    format_ratio,
    format_seconds,
)
from pipeline.sweep.plots import group_ids, speed_label, sweep_figure
from pipeline.sweep.results import SIZES, Results, Row, describe, figures

_PIXELS_PER_INCH = 200


def write_results(results: Results, folder: Path) -> None:
    """Write all files into ``folder``. Equal results give equal bytes, but for what was timed, which is not in the
    CSV."""
    write_json(folder / "sweep.json", describe(results))
    write_text(folder / "sweep.csv", render_csv(results))
    write_text(folder / "sweep.md", render("sweep.md.j2", results))
    write_text(folder / "sweep.html", render("sweep.html.j2", results))
    write_aside(folder / "sweep.png", lambda path: _save_png(results, path))


def render_csv(results: Results) -> str:
    """A line per point, failed ones included; only what two runs agree on, so nothing that was timed."""
    fronts = {kind: {row.point.name for row in results.front(kind)} for kind in SIZES}
    axes = list(results.sweep.axes)
    numbers = [name for name in figures(results.rows[0]) if name not in ("point", "labels")]
    header = ["point", *axes, "status", "metric", *numbers, *(f"pareto_{kind}" for kind in SIZES)]
    lines = {}
    for row in results.rows:
        values, name = figures(row), row.point.name
        labels = [row.point.labels[axis] for axis in axes]
        on_front = [int(name in fronts[kind]) for kind in SIZES]
        lines[name] = [name, *labels, "done", results.metric, *(values[number] for number in numbers), *on_front]
    for failure in results.failures:
        labels = [failure.point.labels[axis] for axis in axes]
        empty = [""] * (len(header) - len(labels) - 2)
        lines[failure.point.name] = [failure.point.name, *labels, "failed", *empty]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines[point.name] for point in results.sweep.points if point.name in lines)
    return text.getvalue()


def render(template: str, results: Results) -> str:
    """A page for readers."""
    shown = {group: hover_text(results, row) for group, row in group_ids(results).items()}
    seconds = sum(sum(row.report["seconds"].values()) for row in results.rows)
    hardware = results.hardware
    return (
        template_environment(Path(__file__).parent)
        .get_template(template)
        .render(
            name=results.sweep.name,
            verdict=verdict(results),
            dense=f"{_quality(results, None)}, {format_bytes(results.dense_bytes)} in float16",
            table=_table(results),
            failures=results.failures,
            points=[(row.point.name, _overrides(row)) for row in results.rows],
            plot=Markup(to_svg(sweep_figure(results), "sweep", shown)),
            plot_colours=COLOURS,
            hardware=f"{hardware['cpu']}, {hardware['cores']} cores, {format_bytes(hardware['memory_bytes'])}",
            seconds=format_seconds(seconds),
        )
    )


def hover_text(results: Results, row: Row) -> str:
    """What a browser shows over a point: its figures and what its recipe has of its own."""
    return "\n".join(
        [
            row.point.name,
            _quality(results, row),
            f"{row.stored_bits:.2f} stored bits, {row.paper_bits:.2f} paper bits, {format_bytes(row.artifact_bytes)}",
            f"{row.speed:.2f} {speed_label(results)}",
            _overrides(row),
        ]
    ).strip()


def verdict(results: Results) -> str:
    """The best and the smallest point in one line."""
    best = min(results.rows, key=lambda row: row.loss)
    smallest = min(results.rows, key=lambda row: row.artifact_bytes)
    return (
        f"Best: {best.point.name}, {_quality(results, best)} in {format_bytes(best.artifact_bytes)}. Smallest: "
        f"{smallest.point.name}, {_quality(results, smallest)} in {format_bytes(smallest.artifact_bytes)}."
    )


def _quality(results: Results, row: Row | None) -> str:
    """Of a point, or of the dense model (None)."""
    value, error = (results.dense, results.dense_error) if row is None else (row.value, row.error)
    if results.metric == "accuracy":
        return f"accuracy {format_percent(value)} ± {100 * error:.1f}"
    text = "perplexity {} ± {}".format(*format_perplexity(value, error))
    return text if row is None else f"{text}, {format_ratio(1 + row.loss, row.loss_error)} × dense"


def _table(results: Results) -> Table:
    is_text = results.metric == "perplexity"
    fronts = {kind: {row.point.name for row in results.front(kind)} for kind in SIZES}
    rows = []
    for row in results.rows:
        on_front = [
            name
            for name, kind in zip(("stored", "paper", "bytes"), SIZES, strict=True)
            if row.point.name in fronts[kind]
        ]
        if is_text:
            value = "{} ± {}".format(*format_perplexity(row.value, row.error))
            loss = format_ratio(1 + row.loss, row.loss_error)
        else:
            value = f"{format_percent(row.value)} ± {100 * row.error:.1f}"
            loss = format_points(row.loss)
        rows.append(
            (
                row.point.name,
                value,
                loss,
                f"{row.stored_bits:.2f}",
                f"{row.paper_bits:.2f}",
                format_bytes(row.artifact_bytes),
                f"{row.speed:.2f}",
                format_bytes(row.report["memory"]["load_rss_bytes"]),
                format_seconds(sum(row.report["seconds"].values())),
                ", ".join(on_front) or "–",
            )
        )
    header = (
        "point",
        results.metric,
        "× dense (paired)" if is_text else "loss (points)",
        "stored bits",
        "paper bits",
        "artefact",
        speed_label(results),
        "load RSS",
        "time",
        "Pareto front of",
    )
    return Table(header, tuple(rows))


def _overrides(row: Row) -> str:
    """What a point's recipe has in place of the base recipe's values, as YAML."""
    if not row.point.overrides:
        return "the base recipe as it is"
    text: str = yaml.safe_dump(row.point.overrides, default_flow_style=None, sort_keys=False, width=100)
    return text.rstrip()


def _save_png(results: Results, path: Path) -> None:
    with matplotlib.style.context(["default", STYLE]):
        sweep_figure(results).savefig(
            path, format="png", dpi=_PIXELS_PER_INCH, facecolor="white", metadata={"Software": None}
        )
