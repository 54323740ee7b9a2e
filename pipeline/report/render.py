"""The report of a run: ``report.json``, and the same for readers as ``report.md`` and ``report.html``."""

import re
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.plumbing.files import write_text
from pipeline.plumbing.records import write_record
from pipeline.report.figure_style import COLOURS, to_svg
from pipeline.report.plots import bytes_figure, reconstruction_figure, spectrum_figure, stages_figure
from pipeline.report.schema import Report
from pipeline.report.sections import (
    Plot,
    key_figures,
    recipe_text,
    sections,
    subtitle,
    verdict,
    verdict_detail,
    warning_lines,
)

_FIGURES: dict[Plot, Callable[[Report], Figure]] = {
    "stages": stages_figure,
    "bytes": bytes_figure,
    "spectrum": spectrum_figure,
    "reconstruction": reconstruction_figure,
}

REPORT_FILES = _JSON, _MARKDOWN, _HTML = "report.json", "report.md", "report.html"


def write_report(report: Report, folder: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``folder``.

    The HTML is one file without scripts or anything to fetch. Equal reports give equal bytes.
    """
    markdown, html = render_markdown(report), render_html(report)
    write_record(folder / _JSON, report)
    write_text(folder / _MARKDOWN, markdown)
    write_text(folder / _HTML, html)


def remove_report(folder: Path) -> None:
    """Remove what :func:`write_report` wrote, if it is there."""
    for name in REPORT_FILES:
        (folder / name).unlink(missing_ok=True)


def render_markdown(report: Report) -> str:
    return _render("report.md.j2", report)


def render_html(report: Report) -> str:
    wanted = [section.plot for section in sections(report) if section.plot is not None]
    plots = {name: Markup(to_svg(_FIGURES[name](report), name)) for name in wanted}
    return _render("report.html.j2", report, plots=plots, plot_colours=COLOURS)


def _render(template: str, report: Report, **more: object) -> str:
    return template_environment().get_template(template).render(
        name=report.recipe.name,
        subtitle=subtitle(report),
        verdict=verdict(report),
        detail=verdict_detail(report),
        figures=key_figures(report),
        warnings=warning_lines(report),
        sections=sections(report),
        recipe=recipe_text(report),
        **more,
    )


def template_environment(*folders: Path) -> Environment:
    """Jinja with our filters, on the templates in ``folders`` and, after them, those of this package."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = _escape_markdown
    environment.filters["nobreak"] = _keep_units
    return environment


def _escape_markdown(text: str) -> str:
    """``text`` on one line, shown as it is, also within a table."""
    return re.sub(r"([\\`*<\[\]|])", r"\\\1", " ".join(text.split()))


def _keep_units(text: str) -> str:
    """``text`` with no line break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(?:%|[kMG]?B|points|nats|tokens/s)(?!\w))", "\N{NO-BREAK SPACE}", text)
