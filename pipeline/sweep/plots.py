"""The picture of a sweep: quality against three sizes and against speed, with error bars and Pareto fronts."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.report.figure_style import (
    FACTORIZED,
    FINETUNED,
    FITTED,
    INK,
    MUTED,
    PACKAGING,
    QAT,
    ROUNDED,
    WIDTH,
    padded,
    perplexity_axis,
    styled,
)
from pipeline.report.units import BYTE_UNITS, format_bytes
from pipeline.sweep.results import SIZES, Results, Row, Size, pareto_front

_COLOURS = (FITTED, FACTORIZED, FINETUNED, QAT, PACKAGING, ROUNDED)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_TITLES: dict[Size, str] = {
    "stored_bits": "Stored bits per MLP weight",
    "paper_bits": "Paper bits per MLP weight",
    "artifact_bytes": "Whole artefact",
}
_SPEED = "Speed"
_DASHED = (0, (4, 3))


@styled
def sweep_figure(results: Results) -> Figure:
    """Draw four panels. Colour tells the labels of the last axis with several of them, markers those of the first."""
    coloured, marked = _axes_shown(results)
    figure = Figure(figsize=(WIDTH, 7.4), layout=ConstrainedLayoutEngine(hspace=0.08))
    panels = figure.subplots(2, 2, sharey=True)
    points = [(row, *_style(results, row, coloured, marked)) for row in results.points]
    for axes, kind in zip(panels.flat, SIZES, strict=False):
        costs = [getattr(row, kind) for row in results.points]
        _panel(axes, results, points, costs, _TITLES[kind])
        if kind == "artifact_bytes":
            _bytes(axes, max(costs))
        else:
            axes.set_xlabel(
                "bits, less is better" + (", bases, patterns and scales included" * (kind == "stored_bits"))
            )
    speeds = [_speed(results, row) for row in results.points]
    _panel(panels[1, 1], results, points, speeds, _SPEED, rising=True)
    threads = results.points[0].speed.threads
    panels[1, 1].set_xlabel(f"{speed_label(results)}, {threads} thread{'s' * (threads > 1)}, more is better")
    for axes in panels[:, 0]:
        axes.set_ylabel(_quality_label(results))
    handles = _legend(results, coloured, marked)
    # Filled column by column: colours in the first row, markers in the second.
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles) // 2, columnspacing=1.6)
    return figure


def speed_label(results: Results) -> str:
    """Say what speeds are relative to; where a point has no baseline they are relative to nothing."""
    is_text = results.metric == "perplexity"
    if not _all_have_baselines(results):
        return "decoding, tokens/s" if is_text else "images/s"
    return "decoding, × dense at int4" if is_text else "images/s, × dense at float32"


def speed_text(results: Results, row: Row) -> str:
    """Write a point's speed in the unit of :func:`speed_label`."""
    return f"{_speed(results, row):.2f}" if _all_have_baselines(results) else f"{row.speed.rate:,.0f}"


def _speed(results: Results, row: Row) -> float:
    ratio = row.speed.ratio_to_dense
    return ratio if ratio is not None and _all_have_baselines(results) else row.speed.rate


def _all_have_baselines(results: Results) -> bool:
    return all(row.speed.ratio_to_dense is not None for row in results.points)


def group_id(row: Row, panel: str) -> str:
    """Name the SVG group that a point is drawn in."""
    return f"point-{panel}-{row.point}".replace(" ", "-")


def group_ids(results: Results) -> dict[str, Row]:
    """Map every group of :func:`sweep_figure` to its point."""
    titles = [*_TITLES.values(), _SPEED]
    return {group_id(row, title): row for row in results.points for title in titles}


Drawn = tuple[Row, str, str]
"""A point with its colour and marker."""


def _panel(
    axes: Axes, results: Results, points: Sequence[Drawn], costs: Sequence[float], title: str, *, rising: bool = False
) -> None:
    """Draw quality over ``costs``; ``rising``: more is better."""
    sign = -1.0 if rising else 1.0
    rows = results.points
    front = pareto_front(rows, [(sign * cost, row.loss) for cost, row in zip(costs, rows, strict=True)])
    where = {row.point: cost for cost, row in zip(costs, rows, strict=True)}
    axes.axhline(_quality(results, None)[0], color=MUTED, linewidth=0.9, linestyle=_DASHED, zorder=0.5)
    shown = _apart(where, {row.point: _quality(results, row)[0] for row in rows})
    line = [(where[row.point], _quality(results, row)[0]) for row in front]
    axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1.0, zorder=1)
    best = {row.point for row in front}
    for row, colour, marker in points:
        value, error = _quality(results, row)
        drawn = axes.errorbar(
            shown[row.point],
            value,
            yerr=error,
            fmt=marker,
            color=colour,
            markeredgecolor=INK if row.point in best else colour,
            markeredgewidth=1.4 if row.point in best else 0.0,
            markersize=7,
            elinewidth=1.2,
            capsize=2.5,
            zorder=2,
        )
        for cap in drawn.lines[1]:
            cap.set_markeredgewidth(1.2)
        drawn.lines[0].set_gid(group_id(row, title))
    values, errors = (np.array(part) for part in zip(*(_quality(results, row) for row in results.points), strict=True))
    dense, dense_error = _quality(results, None)
    if results.metric == "accuracy":
        axes.set_ylim(*padded(np.append(values - errors, dense), np.append(values + errors, dense), 0.3))
    else:
        perplexity_axis(axes, "y", np.append(values, dense), np.append(errors, dense_error))
    costs_array = np.array(costs)
    axes.set_xlim(*padded(costs_array, costs_array, 0.02 * float(costs_array.max())))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_title(title)
    axes.grid()


def _apart(costs: Mapping[str, float], values: Mapping[str, float]) -> dict[str, float]:
    """``costs`` with those of points that would cover each other moved apart by a little, less than a mark's width."""
    span = (max(costs.values()) - min(costs.values())) or 1.0
    height = (max(values.values()) - min(values.values())) or 1.0
    placed: dict[str, float] = {}
    for name, cost in costs.items():
        near = sum(
            abs(cost - costs[other]) < 0.012 * span and abs(values[name] - values[other]) < 0.03 * height
            for other in placed
        )
        placed[name] = cost + 0.015 * span * near
    return placed


def _quality(results: Results, row: Row | None) -> tuple[float, float]:
    """Return what is drawn of a point, or of the dense model (None), with its standard error: accuracy in per cent, or
    the ratio of perplexities, which is known far better than a perplexity."""
    if results.metric == "accuracy":
        measured = results.dense if row is None else row
        return 100 * measured.value, 100 * measured.standard_error
    return (1.0, 0.0) if row is None else (1.0 + row.loss, row.loss_standard_error)


def _quality_label(results: Results) -> str:
    if results.metric == "accuracy":
        return "accuracy in %, ± standard error"
    return f"perplexity ÷ dense ({results.dense.value:.2f}),\npaired, ± standard error"


def _bytes(axes: Axes, largest: float) -> None:
    unit, power = next((unit, power) for unit, power in BYTE_UNITS if largest >= power)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / power:g}"))
    axes.set_xlabel(f"{unit}, less is better")


def _axes_shown(results: Results) -> tuple[str | None, str | None]:
    """The last and the first axis with several labels."""
    several = [name for name, labels in results.axes.items() if len(labels) > 1]
    return several[-1] if several else None, several[0] if len(several) > 1 else None


def _style(results: Results, row: Row, coloured: str | None, marked: str | None) -> tuple[str, str]:
    """Colour and marker of a point."""

    def index(axis: str | None) -> int:
        return 0 if axis is None else results.axes[axis].index(row.labels[axis])

    return _COLOURS[index(coloured) % len(_COLOURS)], _MARKERS[index(marked) % len(_MARKERS)]


def _legend(results: Results, coloured: str | None, marked: str | None) -> list[Line2D]:
    """Make two rows of equal length, which are read column by column."""
    rows: list[list[Line2D]] = [[], []]
    for handles, axis, styles in zip(rows, (coloured, marked), (_COLOURS, _MARKERS), strict=True):
        for index, label in enumerate(results.axes[axis] if axis is not None else ()):
            style = styles[index % len(styles)]
            colour, marker = (style, "o") if styles is _COLOURS else (MUTED, style)
            text = label if any(letter.isalpha() for letter in label) else f"{axis}: {label}"
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=7, label=text))
    front = Line2D([], [], color=MUTED, linewidth=1.0, marker="o", markersize=7, label="Pareto front")
    front.set(markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.4)
    rows[0].append(front)
    dense = f"dense, {format_bytes(results.dense.bytes_float16)} in float16"
    rows[1].append(Line2D([], [], color=MUTED, linewidth=0.9, linestyle=_DASHED, label=dense))
    empty = Line2D([], [], linestyle="none", label=" ")
    return [handle for pair in zip_longest(*rows, fillvalue=empty) for handle in pair]
