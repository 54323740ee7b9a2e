"""How the plots of reports look, and how a matplotlib figure becomes a picture in a page.

The SVG carries text as text and names its colours as CSS variables with a fallback (``var(--plot-ink, #…)``), so
that one picture is readable on light and on dark pages. The bytes depend on the figure only: no dates, no
random ids, no settings of the user's matplotlib.
"""

import io
import re
from collections.abc import Callable, Mapping
from functools import wraps
from html import escape
from typing import Literal, ParamSpec

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.report.units import format_tick

INK, MUTED, GRID, BAND = "#23272f", "#646b78", "#dfe2e8", "#f3f4f7"
FACTORIZED, FITTED, FINETUNED, ROUNDED, QAT = "#c45100", "#0068b0", "#007a58", "#8a6a00", "#a2407f"
REST, PACKAGING = "#8b93a1", "#c99100"
COLOURS = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "band": BAND,
    "factorized": FACTORIZED,
    "fitted": FITTED,
    "finetuned": FINETUNED,
    "rounded": ROUNDED,
    "qat": QAT,
    "rest": REST,
    "packaging": PACKAGING,
}
"""Name of the CSS variable (after ``--plot-``) → colour on a light page. Hues after Okabe and Ito."""

WIDTH = 8.6
"""Width of a figure, in inches."""
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "fips",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
}


_Arguments = ParamSpec("_Arguments")


def styled(draw: Callable[_Arguments, Figure]) -> Callable[_Arguments, Figure]:
    """A function that draws a figure, in our style."""

    @wraps(draw)
    def drawn(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Figure:
        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


def to_svg(figure: Figure, name: str, hover: Mapping[str, str] | None = None) -> str:
    """The figure as an ``<svg>`` element to put into a page, its colours as CSS variables.

    ``name`` begins every id, so that several figures can share a page. ``hover``: group id (``set_gid``) → text that a
    browser shows over what is drawn with that id; such groups get the class ``point``.
    """
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    for group, shown in (hover or {}).items():
        text = text.replace(f'<g id="{group}">', f'<g class="point"><title>{escape(shown)}</title>')
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    text = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(f": {colour}", f": var(--plot-{variable}, {colour})")
    return text


def padded(low: np.ndarray, high: np.ndarray, least: float) -> tuple[float, float]:
    """Limits around all values, with a margin of at least ``least``."""
    first, last = float(low.min()), float(high.max())
    margin = max(0.06 * (last - first), least)
    return first - margin, last + margin


def perplexity_axis(axes: Axes, axis: Literal["x", "y"], values: np.ndarray, errors: np.ndarray) -> None:
    """Linear while the largest perplexity is less than three times the smallest, else logarithmic."""
    low, high = np.maximum(values - errors, 0.5 * values), values + errors
    span = float(high.max() / low.min())
    ticks = getattr(axes, f"{axis}axis")
    if span < 3:
        axes.set(**{f"{axis}lim": padded(low, high, 0.005 * float(values[0]))})
        ticks.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    else:
        first, last = padded(np.log(low), np.log(high), 0.0)
        axes.set(**{f"{axis}scale": "log", f"{axis}lim": (np.exp(first), np.exp(last))})
        steps = ((10, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)), (30, (1.0, 2.0, 5.0)), (100, (1.0, 3.0)))
        subs = next((subs for limit, subs in steps if span < limit), (1.0,))
        ticks.set_major_locator(LogLocator(10, subs=subs, numticks=6))
        ticks.set_minor_locator(NullLocator())
    ticks.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value, exponents=span >= 100)))
