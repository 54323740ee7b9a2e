"""The report's plots: pure functions from a report to a matplotlib figure."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import blended_transform_factory

from pipeline.evaluation.measurements import TrainedStage
from pipeline.report.figure_style import (
    BAND,
    FACTORIZED,
    FINETUNED,
    FITTED,
    MUTED,
    PACKAGING,
    QAT,
    REST,
    ROUNDED,
    WIDTH,
    padded,
    perplexity_axis,
    styled,
)
from pipeline.report.measures import measure_of
from pipeline.report.schema import MLP_PARTS, PACKAGING_PARTS, Group, Report
from pipeline.report.sections import block_runs, name_blocks, parts_of, stage_name
from pipeline.report.units import BYTE_UNITS, format_bytes, format_percent

_PART_KINDS = {FITTED: "MLPs", REST: "rest of the model", PACKAGING: "graph, library, other files"}

_EXACT = 1e-6
"""Relative errors and singular values below this are float32 rounding."""
_STAGE_STYLE: dict[TrainedStage, tuple[str, str]] = {
    "factorized": (FACTORIZED, "^"),
    "fitted": (FITTED, "o"),
    "finetuned": (FINETUNED, "D"),
    "rounded": (ROUNDED, "v"),
    "qat": (QAT, "s"),
}


@styled
def stages_figure(report: Report) -> Figure:
    """Quality with its standard error, and bytes of the whole model, one row per stage."""
    stages = report.stages
    quality, sizes, measure = report.quality, report.stage_bytes, measure_of(report)
    rows = np.arange(len(stages))
    values = np.array([quality.by_stage[stage] for stage in stages])
    errors = np.array([quality.standard_error[stage] for stage in stages])
    size = np.array([sizes[stage] for stage in stages])

    figure = Figure(figsize=(WIDTH, 1.25 + 0.36 * len(stages)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    left.errorbar(values, rows, xerr=errors, fmt="o", color=FITTED, ecolor=FITTED, elinewidth=1.6, capsize=3)
    left.axvline(quality.dense, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
    left.set_title(f"{measure.name.capitalize()} ± standard error")
    left.set_xlabel(f"{measure.name}, {measure.better} (dashed: dense)")
    if quality.metric == "accuracy":
        left.set_xlim(*padded(values - errors, values + errors, 0.005))
        left.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    else:
        perplexity_axis(left, "x", values, errors)
    left.set_yticks(rows, [stage_name(report, stage) for stage in stages])
    left.set_ylim(len(stages) - 0.5, -0.5)
    left.grid(axis="x")
    _column(left, rows, [measure.measured(stage) for stage in stages])

    colours = [REST if stage == "dense" else FITTED for stage in stages]
    right.barh(rows, size, height=0.56, color=colours)
    right.set_title("Bytes of the whole model")
    _bytes_axis(right, float(size.max()), "before quantization as float16")
    _column(right, rows, [f"{format_bytes(value)} ({format_percent(value / size[0], 0)})" for value in size])
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(axes is right)
    return figure


@styled
def reconstruction_figure(report: Report) -> Figure:
    """Relative reconstruction error of every compressed block after each stage, log axis; groups as bands."""
    errors = report.reconstruction_error
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    axes = figure.subplots()
    blocks = sorted(block for group in report.groups for block in group.blocks)
    every = range(blocks[0], blocks[-1] + 1)
    for stage in report.trained_stages:
        found = errors[stage]
        # A gap where a block was left dense, or reproduced up to rounding (an overcomplete basis before sparsity),
        # which would stretch the axis over ten empty decades.
        values = [error if (error := found.get(str(block), 0.0)) >= _EXACT else np.nan for block in every]
        label = stage_name(report, stage) + (f" (below {100 * _EXACT:g} %)" if np.isnan(values).all() else "")
        colour, marker = _STAGE_STYLE[stage]
        axes.plot(every, values, color=colour, marker=marker, label=label)
    if report.compression.method == "fips":
        _mark_groups(axes, report.groups)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    _few_log_labels(axes)
    axes.set_xlim(every[0] - 0.5, every[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(min(len(every), 25), integer=True))
    axes.set_xlabel("block")
    axes.set_ylabel("squared error / mean square of\nthe dense MLP's output")
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=5, handlelength=1.8, columnspacing=1.8)
    return figure


@styled
def spectrum_figure(report: Report) -> Figure:
    """Singular values of every group relative to its largest, log axis, the rank marked; one panel a group.

    For method fips: without a factorization there is no spectrum.
    """
    groups = report.groups
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.2 * lines), layout=ConstrainedLayoutEngine(wspace=0.04))
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    ranks = [group.rank or 0 for group in groups]
    last = max(*ranks, *(len(group.singular_values) for group in groups))
    for axes, group, rank in zip(panels.flat, groups, ranks, strict=False):
        _spectrum(axes, group, rank, last)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for index, axes in enumerate(panels.flat[: len(groups)]):
        if index + columns >= len(groups):
            axes.set_xlabel("rank entry")
            axes.tick_params(labelbottom=True)
        if index % columns == 0:
            axes.set_ylabel("singular value\n(largest = 1)")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            _few_log_labels(axes)
    return figure


@styled
def bytes_figure(report: Report) -> Figure:
    """The dense float16 model and the artefact as stacked bars, then every part of the artefact on its own."""
    sizes = report.bytes
    parts = parts_of(report)
    dense_mlp = sizes.mlp_dense_float16
    by_colour = dict.fromkeys(_PART_KINDS, 0)
    for name, size in parts:
        by_colour[_part_colour(name)] += size
    wholes = [
        ("dense model, float16", [(FITTED, dense_mlp), (REST, sizes.dense_float16 - dense_mlp)]),
        ("artefact", list(by_colour.items())),
    ]
    bars = wholes + [(name, [(_part_colour(name), size)]) for name, size in parts]
    # A little space parts the two wholes from the parts.
    rows = np.array([0.0, 1.0, *(2.5 + np.arange(len(parts)))])

    figure = Figure(figsize=(WIDTH, 1.15 + 0.33 * (len(bars) + 0.5)), layout="constrained")
    axes = figure.subplots()
    for row, (_, segments) in zip(rows, bars, strict=True):
        start = 0
        for colour, size in segments:
            axes.barh(row, size, left=start, height=0.62, color=colour, linewidth=0)
            start += size
    axes.set_yticks(rows, [name for name, _ in bars])
    for label in axes.get_yticklabels()[: len(wholes)]:
        label.set_fontweight("bold")
    axes.set_ylim(rows[-1] + 0.6, -0.6)
    axes.tick_params(axis="y", length=0)
    totals = [sum(size for _, size in segments) for _, segments in bars]
    _bytes_axis(axes, max(totals), "in brackets: share of the dense float16 model")
    dense = sizes.dense_float16
    _column(axes, rows, [f"{format_bytes(total)} ({format_percent(total / dense)})" for total in totals])
    handles = [Patch(color=colour, label=label) for colour, label in _PART_KINDS.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.2)
    return figure


def _column(axes: Axes, rows: np.ndarray, texts: Sequence[str]) -> None:
    """Write texts in a column right of the axes, one a row."""
    transform = blended_transform_factory(axes.transAxes, axes.transData)
    for row, text in zip(rows, texts, strict=True):
        axes.text(1.02, row, text, transform=transform, va="center", ha="left")


def _bytes_axis(axes: Axes, largest: float, note: str) -> None:
    unit, power = next((unit, power) for unit, power in BYTE_UNITS if largest >= power or power == 1)
    axes.set_xlim(0, 1.02 * largest)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / power:g}"))
    axes.set_xlabel(f"size in {unit}; {note}")
    axes.grid(axis="x")


def _few_log_labels(axes: Axes) -> None:
    """Label 1, 2, 5 of each decade where the axis spans less than two decades, else the decades."""
    low, high = axes.get_ylim()
    short = high / low < 100
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if short else (1.0,)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_groups(axes: Axes, groups: Sequence[Group]) -> None:
    """Name each run of neighbouring blocks of one group above the axes, and shade every second one."""
    top = blended_transform_factory(axes.transData, axes.transAxes)
    for index, group in enumerate(groups):
        for first, last in block_runs(group.blocks):
            if index % 2 == 0:
                axes.axvspan(first - 0.5, last + 0.5, color=BAND, linewidth=0, zorder=0)
            name = group.name if len(groups) <= 8 else group.name.removeprefix("group_")
            axes.text((first + last) / 2, 1.01, name, transform=top, ha="center", va="bottom", color=MUTED, fontsize=8)


def _spectrum(axes: Axes, group: Group, rank: int, last: int) -> None:
    values = np.array(group.singular_values, dtype=np.float64)
    relative = values / (values.max() or 1.0)  # of a group that was pruned altogether, all are zero
    # Rounding noise of a matrix without full rank would stretch the axis over ten empty decades.
    relative[relative < _EXACT] = np.nan
    axes.plot(np.arange(1, len(values) + 1), relative, color=FITTED)
    if rank > len(values):
        axes.axvspan(len(values), rank, color=BAND, linewidth=0, zorder=0)
    axes.axvline(rank, color=FACTORIZED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1.06 * last)
    side = "right" if rank > 0.4 * last else "left"
    transform = blended_transform_factory(axes.transData, axes.transAxes)
    axes.annotate(
        f"rank {rank}",
        (rank, 0.97),
        xycoords=transform,
        xytext=(-4 if side == "right" else 4, 0),
        textcoords="offset points",
        ha=side,
        va="top",
        color=FACTORIZED,
    )
    axes.set_yscale("log")
    axes.set_title(f"{group.name}: {name_blocks(group.blocks)}, d = {group.width}")
    axes.grid(axis="y")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _part_colour(name: str) -> str:
    return FITTED if name in MLP_PARTS else PACKAGING if name in PACKAGING_PARTS else REST
