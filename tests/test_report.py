"""The report: JSON as given, Markdown and HTML that say the same, plots that are deterministic."""

import json
import re
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pipeline.report.plots import bytes_figure, reconstruction_figure, spectrum_figure, stages_figure, to_svg
from pipeline.report.render import render_html, render_markdown, write_report
from pipeline.report.schema import Group, Report, check_report
from pipeline.report.sections import format_blocks, sections, verdict, verdict_detail, warning_lines
from pipeline.report.units import format_bytes, format_error, format_percent, format_points, format_seconds

FIGURES = (stages_figure, reconstruction_figure, spectrum_figure, bytes_figure)


def sample_report(
    *, groups: int = 3, blocks: int = 4, width: int = 64, seed: int = 0, finetuned: bool = True
) -> Report:
    """A report of a made-up run: ``groups`` of ``blocks`` blocks, every number drawn from ``seed``."""
    random = np.random.default_rng(seed)
    hidden, rank, samples = 4 * width, 3 * width // 2, 594
    columns = 2 * hidden * blocks
    mlp_parameters = groups * columns * width
    parameters = int(1.5 * mlp_parameters)
    entries = groups * rank * columns
    basis_codes = groups * rank * width // 2
    parts = {
        "basis codes": basis_codes,
        "projection codes": entries // 8,
        "sparsity patterns": entries // 16,
        "scales": entries // 64,
        "rest of the model": 2 * (parameters - mlp_parameters),
        "graph": 41_337,
        "native library": 183_904,
        "other files": 9_801,
    }
    artifact = sum(parts.values())
    mlp_stored = sum(parts[name] for name in ("basis codes", "projection codes", "sparsity patterns", "scales"))
    factorized_bytes = 2 * (parameters - mlp_parameters) + mlp_parameters
    correct = {"dense": 581, "factorized": 402, "fitted": 577, "finetuned": 580, "qat": 579, "onnx_native": 579}
    if not finetuned:
        del correct["finetuned"]
    correct["onnx_portable"] = correct["onnx_native"]
    accuracy = {stage: count / samples for stage, count in correct.items()}
    stage_bytes = dict.fromkeys(correct, factorized_bytes) | {"dense": 2 * parameters}
    stage_bytes |= {"qat": artifact - 235_042, "onnx_native": artifact, "onnx_portable": artifact - 183_904}
    levels = {"factorized": 0.11, "fitted": 0.012, "finetuned": 0.015, "qat": 0.021}
    errors = {
        stage: {str(block): level * float(np.exp(0.5 * random.normal())) for block in range(groups * blocks)}
        for stage, level in levels.items()
        if stage in correct
    }
    return {
        "schema_version": 1,
        "recipe": {"name": "vit-digits", "seed": 0, "compression": {"groups": blocks, "budget": 0.5, "pattern": "1:4"}},
        "model": {
            "name": "vit-digits",
            "model_type": "vit",
            "source": "trained in the run",
            "parameters": parameters,
            "mlp_parameters": mlp_parameters,
        },
        "data": {
            "source": "digits",
            "hash": "9f" * 32,
            "train_samples": 1203,
            "calibration_samples": 1203,
            "test_samples": samples,
        },
        "versions": {"fips-onnx": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.32.0"},
        "hardware": {"cpu": "Example CPU @ 2.10GHz", "cores": 2, "memory_bytes": 8 * 2**30},
        "groups": [_group(index, blocks, width, columns, rank, random) for index in range(groups)],
        "dense_blocks": [groups * blocks],
        "bytes": {
            "dense_float16": 2 * parameters,
            "artifact": artifact,
            "mlp_dense_float16": 2 * mlp_parameters,
            "mlp_stored": mlp_stored,
            "by_part": parts,
        },
        "bits_per_weight": {
            "paper": 8 * (parts["projection codes"] + basis_codes) / mlp_parameters,
            "stored": 8 * mlp_stored / mlp_parameters,
        },
        "quality": {
            "metric": "accuracy",
            "unit": "fraction",
            "samples": samples,
            "standard_error": {stage: (p * (1 - p) / samples) ** 0.5 for stage, p in accuracy.items()},
            **accuracy,
        },
        "stage_bytes": stage_bytes,
        "divergence": {"kl_mean": 0.0041, "kl_p99": 0.083, "same_top1": 0.9916},
        "reconstruction_error": errors,
        "parity": {
            "native_vs_torch": {"max_abs": 3.1e-6, "relative": 2.4e-7},
            "portable_vs_torch": {"max_abs": 4.6e-6, "relative": 3.6e-7},
            "native_vs_portable": {"max_abs": 5.0e-6, "relative": 3.9e-7},
            "tolerance": 1e-3,
            "same_predictions": True,
        },
        "speed": {
            "unit": "images/s",
            "batch": 64,
            "threads": 2,
            "rows": [
                {"backend": "artefact, native kernels", "images_per_second": 2104.2, "ratio_to_float32": 0.81},
                {"backend": "artefact, portable functions", "images_per_second": 1498.7, "ratio_to_float32": 0.58},
                {"backend": "dense float32, onnxruntime", "images_per_second": 2590.3, "ratio_to_float32": 1.0},
                {
                    "backend": "dense MatMulNBits 4 bit, onnxruntime",
                    "images_per_second": 2380.0,
                    "ratio_to_float32": 0.92,
                },
            ],
        },
        "memory": {
            "load_rss_bytes": 61_000_000,
            "peak_rss_bytes": 84_000_000,
            "pipeline_peak_rss_bytes": 1_340_000_000,
        },
        "warnings": ["block 12 was left dense", "the 4-bit reference covers <MLPs> only | not attention"],
        "seconds": {"load": 61.2, "calibrate": 2.1, "fit": 55.0, "qat": 3721.4, "export": 9.6},
        "reused_stages": ["load", "calibrate"],
    }


def _group(index: int, blocks: int, width: int, columns: int, rank: int, random: np.random.Generator) -> Group:
    decay = 0.03 + 0.03 * random.random()
    return {
        "name": f"group_{index}",
        "blocks": list(range(index * blocks, (index + 1) * blocks)),
        "width": width,
        "columns": columns,
        "rank": rank,
        "basis_bits": {"4": rank},
        "projection_bits": {"4": rank - rank // 3, "3": rank // 3},
        "pattern": "1:4",
        "singular_values": [float(30 * np.exp(-decay * k)) for k in range(width)],
    }


@pytest.fixture(scope="module")
def report() -> Report:
    return sample_report()


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render_html(report)


def table_rows(report: Report, title: str, index: int = 0) -> dict[str, tuple[str, ...]]:
    """Rows of a table by their first cell."""
    (section,) = [section for section in sections(report) if section.title == title]
    return {row[0]: row[1:] for row in section.tables[index].rows}


# --- files -----------------------------------------------------------------------------------------------------


def test_writes_json_as_given_and_equal_bytes_for_equal_reports(report: Report, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_report(deepcopy(report), tmp_path / name)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((tmp_path / "first" / "report.json").read_text(encoding="utf-8")) == report
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_refused_report_leaves_the_old_one(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = deepcopy(report)
    broken["divergence"]["kl_mean"] = float("nan")
    with pytest.raises(ValueError, match=r"not finite: divergence\.kl_mean"):
        write_report(broken, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 2, "schema version 2, expected 1"),
        (("bytes", "by_part", "graph"), 0, r"by_part adds up to \d+, bytes\.artifact is \d+"),
        (("quality", "finetuned"), None, "stage_bytes has the stages .*'finetuned'"),
        (("quality", "standard_error", "qat"), None, r"quality\.standard_error has the stages"),
        (("reconstruction_error", "fitted", "3"), None, r"reconstruction_error\.fitted has the blocks"),
        (("groups",), [], "no compressed blocks"),
        (("speed", "rows", 1, "ratio_to_float32"), float("inf"), r"not finite: speed\.rows\.1\.ratio_to_float32"),
    ],
)
def test_refuses_a_report_that_contradicts_itself(
    report: Report, path: tuple[Any, ...], value: Any, message: str
) -> None:
    broken: Any = deepcopy(report)
    node = broken
    for key in path[:-1]:
        node = node[key]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        check_report(broken)


# --- words and tables ------------------------------------------------------------------------------------------


def test_verdict_and_its_error(report: Report) -> None:
    share = report["bytes"]["artifact"] / report["bytes"]["dense_float16"]
    assert verdict(report) == f"{100 * share:.0f} % of the float16 bytes, accuracy 97.8 % → 97.5 %"
    assert "−0.3 points against the dense model, within one standard error (±0.6 points)" in verdict_detail(report)
    worse = deepcopy(report)
    worse["quality"]["onnx_native"] = 0.95
    assert "−2.8 points against the dense model, more than one standard error" in verdict_detail(worse)


def test_what_each_stage_lost(report: Report) -> None:
    rows = table_rows(report, "Accuracy and bytes per stage")
    assert list(rows) == [
        "dense",
        "factorized",
        "fitted",
        "finetuned",
        "quantized (QAT)",
        "ONNX, native kernels",
        "ONNX, portable functions",
    ]
    assert rows["dense"][:4] == ("97.8 %", "±0.6", "–", "–")
    assert rows["factorized"][:4] == ("67.7 %", "±1.9", "−30.1", "−30.1")
    assert rows["finetuned"][:4] == ("97.6 %", "±0.6", "+0.5", "−0.2")
    assert rows["ONNX, portable functions"][:4] == ("97.5 %", "±0.6", "0.0", "−0.3")
    (introduction,) = sections(report)[0].introduction
    assert introduction.endswith("sharing and sparsity −0.2 points, quantization −0.2 points, export 0.0 points.")


def test_both_artefacts_are_compared_with_qat() -> None:
    report = sample_report(finetuned=False)
    report["quality"]["onnx_native"] = 0.5
    rows = table_rows(report, "Accuracy and bytes per stage")
    assert rows["ONNX, native kernels"][2] == "−47.5"
    assert rows["ONNX, portable functions"][2] == "0.0"
    assert "finetuned" not in rows
    assert "finetuned" not in render_html(report).replace("--plot-finetuned", "")


def test_parts_add_up_and_bits_stand_side_by_side(report: Report) -> None:
    bits = table_rows(report, "Size", 0)
    assert bits["paper bits"][1] == f"{report['bits_per_weight']['paper']:.2f}"
    assert bits["stored bits"][1] == f"{report['bits_per_weight']['stored']:.2f}"
    parts = table_rows(report, "Size", 1)
    assert parts["artefact"][1] == "100.0 %"
    assert set(parts) == {*report["bytes"]["by_part"], "artefact"}
    assert sum(float(row[1].split()[0]) for name, row in parts.items() if name != "artefact") == pytest.approx(
        100, abs=0.5
    )


def test_warnings_include_what_the_figures_show(report: Report) -> None:
    assert warning_lines(report) == report["warnings"]
    bad = deepcopy(report)
    bad["warnings"] = []
    bad["parity"]["portable_vs_torch"]["relative"] = 2e-3
    bad["parity"]["same_predictions"] = False
    bad["bytes"]["dense_float16"] = bad["bytes"]["artifact"]
    assert warning_lines(bad) == [
        "The artefact's native kernels and portable functions do not give the same predictions.",
        "ONNX Runtime, portable functions, against PyTorch: the logits differ by more than the tolerance.",
        "The artefact is not smaller than the dense model stored as float16.",
    ]
    assert [row[0] for row in table_rows(bad, "Parity").values()] == ["yes", "no", "yes"]


def test_reused_stages_are_marked(report: Report) -> None:
    rows = table_rows(report, "The run")
    assert rows["calibrate"] == ("earlier run", "2.1 s")
    assert rows["qat"] == ("this run", "1 h 02 min")
    assert rows["sum"] == ("", "1 h 04 min")


# --- formats ---------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects the text of table cells, ids, attribute names, and checks that tags are balanced."""

    void = frozenset({"meta", "br", "path", "use", "rect", "line"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_html_is_well_formed_and_self_contained(report: Report, html: str) -> None:
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "<script" not in html
    assert "@import" not in html
    assert {match for match in re.findall(r"url\(([^)]*)\)", html) if not match.startswith("#")} == set()
    assert html.count("<svg") == len(FIGURES)


def test_html_and_markdown_hold_every_cell(report: Report, html: str) -> None:
    page = _Page()
    page.feed(html)
    markdown = render_markdown(report).replace("\\", "")
    expected = [
        cell
        for section in sections(report)
        for table in section.tables
        for row in (table.header, *table.rows)
        for cell in row
    ]
    assert page.cells == expected
    for cell in expected:
        assert cell in markdown


def test_text_from_outside_is_escaped(report: Report) -> None:
    hostile = deepcopy(report)
    hostile["warnings"] = ["<b>a | b</b>\n# not a heading"]
    hostile["hardware"]["cpu"] = "x86 | <i>"
    assert "&lt;b&gt;a | b&lt;/b&gt;" in render_html(hostile)
    markdown = render_markdown(hostile)
    assert "> - \\<b>a \\| b\\</b> # not a heading\n" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| machine")]
    assert rows == ["| machine | x86 \\| \\<i>, 2 cores, 8.59 GB memory |"]


def test_markdown_tables_are_rectangular(report: Report) -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", render_markdown(report), flags=re.M)
    assert len(tables) == sum(len(section.tables) for section in sections(report))
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


# --- plots -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", FIGURES)
def test_plots_are_deterministic_themed_svg(report: Report, draw: Any) -> None:
    svg = to_svg(draw(report), "plot")
    assert svg == to_svg(draw(report), "plot")
    ElementTree.fromstring(svg)
    assert "var(--plot-ink, #23272f)" in svg
    assert re.search(r"\d{4}-\d{2}-\d{2}T", svg) is None
    # Every colour is a variable, so nothing stays dark on a dark page.
    assert set(re.findall(r"(?<!, )#[0-9a-f]{6}\b", svg)) == set()


def test_plots_ignore_the_users_matplotlib_settings(report: Report) -> None:
    import matplotlib

    expected = to_svg(stages_figure(report), "plot")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert to_svg(stages_figure(report), "plot") == expected


@pytest.mark.parametrize(
    "shape", [{"groups": 1, "blocks": 1}, {"groups": 12, "blocks": 2, "finetuned": False}, {"groups": 3}]
)
@pytest.mark.parametrize("draw", FIGURES)
def test_no_texts_overlap_or_leave_the_figure(draw: Any, shape: dict[str, Any]) -> None:
    figure = draw(sample_report(**shape))
    figure.draw_without_rendering()
    page = figure.bbox
    boxes = [
        (text.get_text(), text.get_window_extent().padded(-1))
        for axes in figure.axes
        if axes.get_visible()
        for text in _visible_texts(axes)
    ]
    assert len(boxes) > 5
    for index, (name, box) in enumerate(boxes):
        assert page.x0 <= box.x0, name
        assert box.x1 <= page.x1 + 1, name
        for other_name, other in boxes[:index]:
            assert not box.overlaps(other), (name, other_name)


def _visible_texts(axes: Any) -> list[Any]:
    (x0, x1), (y0, y1) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks() if x0 <= tick.get_loc() <= x1]
    ticks += [tick.label1 for tick in axes.yaxis.get_major_ticks() if y0 <= tick.get_loc() <= y1]
    titles = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
    return [text for text in (*axes.texts, *ticks, *titles) if text.get_text() and text.get_visible()]


def test_spectrum_marks_the_rank_and_survives_zeros(report: Report) -> None:
    changed = deepcopy(report)
    changed["groups"][0]["singular_values"][40:] = [0.0] * 24
    axes = spectrum_figure(changed).axes[0]
    values = axes.lines[0].get_ydata()
    assert values[0] == 1.0
    assert np.isnan(values[40:]).all()
    assert axes.lines[1].get_xdata() == [96, 96]


def test_reconstruction_leaves_a_gap_at_dense_blocks() -> None:
    report = sample_report(groups=2, blocks=2)
    report["groups"][1]["blocks"] = [3, 4]
    errors = report["reconstruction_error"]
    for stage in ("factorized", "fitted", "finetuned", "qat"):
        errors[stage] = {block: errors[stage][old] for block, old in zip("0134", "0123", strict=True)}
    check_report(report)
    (axes,) = reconstruction_figure(report).axes
    assert len(axes.lines) == 4
    for line in axes.lines:
        assert list(line.get_xdata()) == [0, 1, 2, 3, 4]
        assert list(np.isnan(line.get_ydata())) == [False, False, True, False, False]


# --- numbers ---------------------------------------------------------------------------------------------------


def test_units() -> None:
    assert [format_bytes(size) for size in (0, 999, 1000, 12_345, 999_499, 999_500, 9_999_999, 2_350_000_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "12.3 kB",
        "999 kB",
        "1.00 MB",
        "10.0 MB",
        "2.35 GB",
    ]
    assert [format_percent(value) for value in (-0.0123, 0.0, 0.0004, 0.9996)] == [
        "−1.2 %",
        "0.0 %",
        "<0.1 %",
        "100.0 %",
    ]
    assert [format_points(value) for value in (-0.0031, 0.0004, -0.0004, 0.012)] == ["−0.3", "0.0", "0.0", "+1.2"]
    assert [format_seconds(value) for value in (3.14, 59.94, 60.4, 3721)] == [
        "3.1 s",
        "59.9 s",
        "1 min 00 s",
        "1 h 02 min",
    ]
    assert [format_error(value) for value in (0.0, 5e-6, 0.0041, 1.5)] == ["0", "5.0e−6", "0.0041", "1.5"]
    assert format_blocks([7, 0, 2, 1]) == "0–2, 7"
