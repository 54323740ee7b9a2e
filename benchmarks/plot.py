"""The picture of a benchmark: how much faster whole MLPs run than at int4."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.measurement import Measurement
from benchmarks.variants import FIPS_DENSE, FIPS_GRADED, FIPS_SPARSE, FLOAT32, INT4_BLOCK_128
from pipeline.report.figure_style import (
    BAND,
    FACTORIZED,
    FINETUNED,
    FITTED,
    INK,
    MUTED,
    PACKAGING,
    QAT,
    REST,
    ROUNDED,
    styled,
)

_STYLES = {
    FLOAT32: (REST, "v"),
    "int4 block 32": (PACKAGING, "v"),
    "int2 block 32": (ROUNDED, "^"),
    "int2 block 128": (QAT, "^"),
    FIPS_DENSE: (FITTED, "s"),
    FIPS_GRADED: (FINETUNED, "o"),
    FIPS_SPARSE: (FACTORIZED, "D"),
}
"""Colour and marker of each variant, in the order of drawing; int4 with blocks of 128 is the line at 1."""
_PANEL_WIDTH, _PANEL_HEIGHT = 2.9, 2.3
_MARGINS = (0.8, 1.2)
"""Width and height of what surrounds the panels, in inches, as their own sizes."""
_ASIDE = 0.025
"""Marks of cold weights stand this far to the left of a variant's place, of warm ones to the right; 1 is a panel's step
from one number of rows to the next."""
_DASHED = (0, (4, 3))


@styled
def mlp_figure(measurements: Sequence[Measurement]) -> Figure:
    """Draw measurements of MLPs: a column of panels for each shape, a row for each number of threads. Full marks are of
    cold weights."""
    shapes = list(dict.fromkeys(item["shape"] for item in measurements))
    threads = sorted({item["threads"] for item in measurements})
    size = (_MARGINS[0] + _PANEL_WIDTH * len(shapes), _MARGINS[1] + _PANEL_HEIGHT * len(threads))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.04, hspace=0.06))
    panels = figure.subplots(len(threads), len(shapes), sharex=True, sharey=True, squeeze=False)
    for line, count in zip(panels, threads, strict=True):
        for axes, shape in zip(line, shapes, strict=True):
            _panel(axes, [item for item in measurements if item["shape"] == shape and item["threads"] == count])
            axes.set_title(f"{shape}, {count} thread{'s' * (count > 1)}")
        line[0].set_ylabel("speed, × int4 block 128")
    for axes in panels[-1]:
        axes.set_xlabel("M, rows of activations")
    handles = _legend({item["weights"] for item in measurements})
    columns = 5 if len(shapes) > 2 else 3 if len(shapes) > 1 else 2
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.6, handletextpad=0.5)
    return figure


def _panel(axes: Axes, measurements: Sequence[Measurement]) -> None:
    rows = sorted({item["rows"] for item in measurements})
    axes.axhline(1.0, color=INK, linewidth=1.0, linestyle=_DASHED, zorder=1.5)
    for place in range(0, len(rows), 2):
        axes.axvspan(place - 0.5, place + 0.5, color=BAND, zorder=0, linewidth=0)
    offsets = np.linspace(-0.36, 0.36, len(_STYLES))
    for (variant, (colour, marker)), offset in zip(_STYLES.items(), offsets, strict=True):
        for weights, fill, aside in (("cold", colour, -_ASIDE), ("warm", "white", _ASIDE)):
            found = [item for item in measurements if (item["variant"], item["weights"]) == (variant, weights)]
            places = [rows.index(item["rows"]) + offset + aside for item in found]
            ratios = [item["ratios"][INT4_BLOCK_128] for item in found]
            axes.plot(places, ratios, marker, color=colour, markerfacecolor=fill, markeredgewidth=1.1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(2))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}"))
    axes.set_xticks(range(len(rows)), [str(count) for count in rows])
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")


def _legend(weights: set[str]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=variant)
        for variant, (colour, marker) in _STYLES.items()
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=_DASHED, label=INT4_BLOCK_128))
    for name, fill in (("cold", MUTED), ("warm", "white")):
        if name in weights:
            handles.append(
                Line2D([], [], color=MUTED, marker="o", linestyle="none", markerfacecolor=fill, label=f"{name} weights")
            )
    return handles
