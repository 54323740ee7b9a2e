"""The files of a sweep: ``sweep.json`` with everything, ``sweep.csv``, and for readers ``.md``, ``.html``, ``.png``."""

import csv
import io
from pathlib import Path

import matplotlib.style
import yaml
from markupsafe import Markup

from pipeline.plumbing.files import write_aside, write_text
from pipeline.plumbing.records import write_record
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
from pipeline.sweep.plots import group_ids, speed_label, speed_text, sweep_figure
from pipeline.sweep.results import SIZES, Failure, Results, Row

SWEEP_FILES = ("sweep.json", "sweep.csv", "sweep.md", "sweep.html", "sweep.png")
_PIXELS_PER_INCH = 200
_NUMBERS = (
    "value",
    "standard_error",
    "loss",
    "loss_standard_error",
    "kl_mean",
    "same_top1",
    "paper_bits",
    "stored_bits",
    "artifact_bytes",
    "mlp_bytes",
)
"""Fields of a :class:`Row` that go into the CSV: two runs of a point on one machine agree on them."""


def write_results(results: Results, folder: Path) -> None:
    """Write all files into ``folder``. Equal results give equal bytes, but for what was timed, which is not in the
    CSV."""
    json, table, markdown, html, picture = (folder / name for name in SWEEP_FILES)
    write_record(json, results)
    write_text(table, render_csv(results))
    write_text(markdown, render("sweep.md.j2", results))
    write_text(html, render("sweep.html.j2", results))
    write_aside(picture, lambda path: _save_png(results, path))


def render_csv(results: Results) -> str:
    """Write a line per point, failed ones included, with only what two runs agree on, so nothing that was timed."""
    header = ["point", *results.axes, "status", "metric", *_NUMBERS, *(f"pareto_{size}" for size in SIZES)]

    def order(row: Row | Failure) -> list[int]:
        return [labels.index(row.labels[axis]) for axis, labels in results.axes.items()]

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    rows: list[Row | Failure] = [*results.points, *results.failures]
    for row in sorted(rows, key=order):
        line: list[object] = [row.point, *(row.labels[axis] for axis in results.axes)]
        if isinstance(row, Failure):
            line += ["failed", *[""] * (len(header) - len(line) - 1)]
        else:
            numbers = (getattr(row, name) for name in _NUMBERS)
            line += ["done", results.metric, *numbers, *(int(size in row.pareto) for size in SIZES)]
        writer.writerow(line)
    return text.getvalue()


def render(template: str, results: Results) -> str:
    """Fill the template of a page for readers."""
    shown = {group: hover_text(results, row) for group, row in group_ids(results).items()}
    hardware = results.hardware
    return (
        template_environment(Path(__file__).parent)
        .get_template(template)
        .render(
            name=results.name,
            verdict=verdict(results),
            dense=f"{_quality(results, None)}, {format_bytes(results.dense.bytes_float16)} in float16",
            table=_table(results),
            failures=results.failures,
            points=[(row.point, _overrides(row)) for row in results.points],
            plot=Markup(to_svg(sweep_figure(results), "sweep", shown)),
            plot_colours=COLOURS,
            hardware=f"{hardware.cpu}, {hardware.cores} cores, {format_bytes(hardware.memory_bytes)}",
            seconds=format_seconds(sum(row.seconds for row in results.points)),
        )
    )


def hover_text(results: Results, row: Row) -> str:
    """Describe a point as a browser shows it over its mark: its figures and what its recipe has of its own."""
    return "\n".join(
        [
            row.point,
            _quality(results, row),
            f"{row.stored_bits:.2f} stored bits, {row.paper_bits:.2f} paper bits, {format_bytes(row.artifact_bytes)}",
            f"{speed_text(results, row)} {speed_label(results)}",
            _overrides(row),
        ]
    ).strip()


def verdict(results: Results) -> str:
    """The best and the smallest point in one line."""
    best = min(results.points, key=lambda row: row.loss)
    smallest = min(results.points, key=lambda row: row.artifact_bytes)
    return (
        f"Best: {best.point}, {_quality(results, best)} in {format_bytes(best.artifact_bytes)}. Smallest: "
        f"{smallest.point}, {_quality(results, smallest)} in {format_bytes(smallest.artifact_bytes)}."
    )


def _quality(results: Results, row: Row | None) -> str:
    """Quality of a point, or of the dense model (None), with its standard error."""
    measured = results.dense if row is None else row
    if results.metric == "accuracy":
        return f"accuracy {format_percent(measured.value)} ± {100 * measured.standard_error:.1f}"
    text = "perplexity {} ± {}".format(*format_perplexity(measured.value, measured.standard_error))
    return text if row is None else f"{text}, {format_ratio(1 + row.loss, row.loss_standard_error)} × dense"


def _table(results: Results) -> Table:
    is_text = results.metric == "perplexity"
    rows = []
    for row in results.points:
        on_front = [name for name, size in zip(("stored", "paper", "bytes"), SIZES, strict=True) if size in row.pareto]
        if is_text:
            value = "{} ± {}".format(*format_perplexity(row.value, row.standard_error))
            loss = format_ratio(1 + row.loss, row.loss_standard_error)
        else:
            value = f"{format_percent(row.value)} ± {100 * row.standard_error:.1f}"
            loss = format_points(row.loss)
        rows.append(
            (
                row.point,
                value,
                loss,
                f"{row.stored_bits:.2f}",
                f"{row.paper_bits:.2f}",
                format_bytes(row.artifact_bytes),
                speed_text(results, row),
                format_bytes(row.memory.load_rss_bytes),
                format_seconds(row.seconds),
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
    """Write as YAML what a point's recipe has in place of the base recipe's values."""
    if not row.overrides:
        return "the base recipe as it is"
    text: str = yaml.safe_dump(row.overrides, default_flow_style=None, sort_keys=False, width=100)
    return text.rstrip()


def _save_png(results: Results, path: Path) -> None:
    with matplotlib.style.context(["default", STYLE]):
        sweep_figure(results).savefig(
            path, format="png", dpi=_PIXELS_PER_INCH, facecolor="white", metadata={"Software": None}
        )
