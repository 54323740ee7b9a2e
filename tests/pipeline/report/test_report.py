"""The report: JSON as given, Markdown and HTML that say the same, plots that are deterministic."""

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import RECIPES
from pydantic import ValidationError

from pipeline.plumbing.files import read_json
from pipeline.plumbing.records import read_record, write_record
from pipeline.recipe.reading import load_recipe
from pipeline.report import render
from pipeline.report.figure_style import to_svg
from pipeline.report.plots import bytes_figure, reconstruction_figure, spectrum_figure, stages_figure
from pipeline.report.render import render_html, render_markdown, write_report
from pipeline.report.schema import Report
from pipeline.report.sections import (
    format_blocks,
    key_figures,
    sections,
    subtitle,
    verdict,
    verdict_detail,
    warning_lines,
)
from pipeline.report.units import (
    format_bytes,
    format_error,
    format_percent,
    format_perplexity,
    format_points,
    format_rate,
    format_ratio,
    format_seconds,
)

FIGURES = (stages_figure, reconstruction_figure, spectrum_figure, bytes_figure)
REMOVED = object()
"""Stands for the value of a key that is taken out of a report."""


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
    content = {
        "schema_version": 4,
        "recipe": shipped_recipe("vit-digits"),
        "model": {
            "name": "vit-digits",
            "model_type": "vit",
            "source": "trained in the run",
            "parameters": parameters,
            "mlp_parameters": mlp_parameters,
        },
        "compression": {"method": "fips", "start": "nearest"},
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
            "peak_rss_by_stage": {
                "load": 410_000_000,
                "calibrate": 822_000_000,
                "fit": 931_000_000,
                "qat": 1_340_000_000,
                "export": 705_000_000,
            },
        },
        "warnings": ["block 12 was left dense", "the 4-bit reference covers <MLPs> only | not attention"],
        "seconds": {"load": 61.2, "calibrate": 2.1, "fit": 55.0, "qat": 3721.4, "export": 9.6},
        "disk_bytes": 212_400_000,
        "reused_stages": ["load", "calibrate"],
    }
    return parse(content)


def _group(index: int, blocks: int, width: int, columns: int, rank: int, random: np.random.Generator) -> dict[str, Any]:
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


def sample_language_report(method: Literal["fips", "dense"] = "fips", *, portable: bool = True) -> Report:
    """A report of a made-up run on a language model shaped like Gemma-3-270M."""
    random = np.random.default_rng(1)
    blocks, width, hidden, block_size = 18, 640, 2048, 64
    size, rank = (6, 576) if method == "fips" else (1, width)
    columns = 3 * hidden * size
    mlp_parameters, parameters = 3 * hidden * width * blocks, 268_098_176
    dense_nll, tokens, windows = 2.668, 102_200, 200
    nll = {"dense": dense_nll}
    if method == "fips":
        nll |= {"factorized": 5.1, "fitted": 2.751}
    nll |= {"rounded": 3.02, "qat": 2.8512, "onnx_native": 2.8513}
    if portable:
        nll["onnx_portable"] = 2.8513
    perplexity = {stage: math.exp(value) for stage, value in nll.items()}
    unquantized = 2 * (parameters - mlp_parameters + (blocks // size) * rank * (columns + width))
    entries = (blocks // size) * rank * columns
    parts = {
        "basis codes": (blocks // size) * rank * width // 2 if method == "fips" else 0,
        "projection codes": 3 * entries // 8 if method == "fips" else 0,
        "weight codes": 0 if method == "fips" else 3 * entries // 8,
        "sparsity patterns": 0,
        "scales": 2 * entries // block_size,
        "token table": 85_196_800,
        "rest of the model": 12_615_680,
        "graph": 311_337,
        "native library": 183_904,
        "tokenizer": 33_384_568,
        "other files": 9_801,
    }
    artifact = sum(parts.values())
    mlp_stored = sum(parts[name] for name in ("basis codes", "projection codes", "weight codes", "scales"))
    stage_bytes = dict.fromkeys(nll, artifact) | {"dense": 2 * parameters}
    if method == "fips":
        stage_bytes |= {"factorized": unquantized, "fitted": unquantized}
    levels = {"factorized": 0.3, "fitted": 0.011, "rounded": 0.095, "qat": 0.021}
    backends = ("artefact, native kernels", "onnxruntime-genai builder, int4")
    content = {
        "schema_version": 4,
        "recipe": shipped_recipe("gemma3-270m-w3"),
        "model": {
            "name": "Gemma3ForCausalLM",
            "model_type": "gemma3_text",
            "source": "packaged_gguf",
            "parameters": parameters,
            "mlp_parameters": mlp_parameters,
        },
        "compression": {"method": method, "start": "gptq"},
        "data": {
            "source": "packaged_text",
            "hash": "3c" * 32,
            "train_samples": 3100,
            "calibration_samples": 256,
            "test_samples": windows,
            "context": 512,
            "train_tokens": 1_587_200,
            "calibration_tokens": 131_072,
            "test_tokens": 102_400,
        },
        "versions": {"fips-onnx": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.32.0", "onnxruntime-genai": "0.9.0"},
        "hardware": {"cpu": "Example CPU @ 2.10GHz", "cores": 2, "memory_bytes": 16 * 2**30},
        "groups": [
            {
                "name": f"group_{index}",
                "blocks": list(range(index * size, (index + 1) * size)),
                "width": width,
                "columns": columns,
                "rank": rank if method == "fips" else None,
                "basis_bits": {"4": rank} if method == "fips" else {},
                "projection_bits": {"4": 192, "3": 192, "2": 192} if method == "fips" else {"3": width},
                "pattern": "dense",
                "singular_values": [float(9e3 * np.exp(-0.012 * k)) for k in range(width)] if method == "fips" else [],
            }
            for index in range(blocks // size)
        ],
        "dense_blocks": [],
        "bytes": {
            "dense_float16": 2 * parameters,
            "artifact": artifact,
            "mlp_dense_float16": 2 * mlp_parameters,
            "mlp_stored": mlp_stored,
            "by_part": parts,
        },
        "bits_per_weight": {"paper": 2.71, "stored": 8 * mlp_stored / mlp_parameters},
        "quality": {
            "metric": "perplexity",
            "unit": "perplexity",
            "tokens": tokens,
            "context": 512,
            "stride": 512,
            "windows": windows,
            "bytes": 4 * tokens,
            "bits_per_byte": {stage: value / math.log(2) / 4 for stage, value in nll.items()},
            "frequent_tokens": 90_000,
            "by_frequency": {
                stage: {"frequent": 0.6 * value, "rare": 40 * value} for stage, value in perplexity.items()
            },
            "standard_error": {stage: 0.0145 * value for stage, value in perplexity.items()},
            "difference_to_dense": {
                stage: {
                    "nll": value - dense_nll,
                    "standard_error": 0.02 * (value - dense_nll) + 0.001,
                    "ratio": perplexity[stage] / perplexity["dense"],
                }
                for stage, value in nll.items()
                if stage != "dense"
            },
            **perplexity,
        },
        "stage_bytes": stage_bytes,
        "divergence": {
            "tokens": tokens,
            "kl_mean": 0.213,
            "kl_median": 0.081,
            "kl_p90": 0.55,
            "kl_p99": 1.92,
            "kl_p999": 4.4,
            "kl_max": 12.7,
            "same_top1": 0.7713,
        },
        "reconstruction_error": {
            stage: {str(block): level * float(np.exp(0.4 * random.normal())) for block in range(blocks)}
            for stage, level in levels.items()
            if stage in nll
        },
        "parity": {
            "native_vs_torch": {"max_abs": 2.1e-4, "relative": 5.4e-6},
            "portable_vs_torch": {"max_abs": 2.6e-4, "relative": 6.6e-6},
            "native_vs_portable": {"max_abs": 2.0e-4, "relative": 4.9e-6},
            "tolerance": 1e-3,
            "same_predictions": True,
        },
        "speed": {
            "unit": "tokens/s",
            "prompt_tokens": 512,
            "generated_tokens": 128,
            "threads": 2,
            "rows": [
                {
                    "backend": backends[0],
                    "prefill_tokens_per_second": 412.3,
                    "decode_tokens_per_second": 43.1,
                    "prefill_ratio_to_int4": 0.913,
                    "decode_ratio_to_int4": 1.121,
                    "load_seconds": 0.82,
                    "weight_bytes": 133_000_000,
                    "read_fraction": 0.468,
                },
                {
                    "backend": backends[1],
                    "prefill_tokens_per_second": 451.6,
                    "decode_tokens_per_second": 38.45,
                    "prefill_ratio_to_int4": 1.0,
                    "decode_ratio_to_int4": 1.0,
                    "load_seconds": None,
                    "weight_bytes": 152_000_000,
                    "read_fraction": 0.477,
                },
            ],
            "read_bytes_per_second": 12.25e9,
        },
        "memory": {
            "load_rss_bytes": 236_000_000,
            "peak_rss_bytes": 412_000_000,
            "pipeline_peak_rss_bytes": 6_340_000_000,
            "peak_rss_by_stage": {
                "model": 1_710_000_000,
                "calibrate": 2_904_000_000,
                "factorize": 3_310_000_000,
                "qat": 6_340_000_000,
                "export": 2_200_000_000,
            },
            "load_rss_by_backend": {backends[0]: 236_000_000, backends[1]: 391_000_000},
            "run_rss_by_backend": {backends[0]: 297_000_000},
            "base_rss_bytes": 61_400_000,
        },
        "warnings": [],
        "seconds": {"model": 21.2, "calibrate": 52.1, "factorize": 35.0, "qat": 1921.4, "export": 19.6},
        "disk_bytes": 3_212_400_000,
        "reused_stages": [],
    }
    return parse(content)


def parse(content: dict[str, Any]) -> Report:
    return Report.model_validate_json(json.dumps(content))


@cache
def shipped_recipe(name: str) -> dict[str, Any]:
    return load_recipe(RECIPES / f"{name}.yaml").model_dump(mode="json")


def content_of(report: Report) -> dict[str, Any]:
    return report.model_dump(mode="json", exclude_unset=True)


def changed(report: Report, changes: dict[str, Any]) -> Report:
    """A report with other values at dotted keys, or without them if REMOVED; in lists, parts are indices."""
    content = content_of(report)
    for key, value in changes.items():
        node: Any = content
        *outer, last = key.split(".")
        for part in outer:
            node = node[int(part) if isinstance(node, list) else part]
        if value is REMOVED:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = value
    return parse(content)


SAMPLES: dict[str, Callable[[], Report]] = {
    "images": sample_report,
    "language, FiPS": sample_language_report,
    "language, dense": partial(sample_language_report, "dense", portable=False),
}
LANGUAGE = content_of(sample_language_report())


@pytest.fixture(scope="module")
def report() -> Report:
    return sample_report()


@pytest.fixture(scope="module", params=SAMPLES)
def any_report(request: pytest.FixtureRequest) -> Report:
    return SAMPLES[request.param]()


@pytest.fixture(scope="module")
def any_html(any_report: Report) -> str:
    return render_html(any_report)


def notes_of(report: Report, title: str) -> str:
    (section,) = [section for section in sections(report) if section.title == title]
    return " ".join(section.notes)


def table_rows(report: Report, title: str, index: int = 0) -> dict[str, tuple[str, ...]]:
    """Rows of a table by their first cell."""
    (section,) = [section for section in sections(report) if section.title == title]
    return {row[0]: row[1:] for row in section.tables[index].rows}


# --- files -----------------------------------------------------------------------------------------------------


def test_writes_json_as_given_and_equal_bytes_for_equal_reports(any_report: Report, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_report(deepcopy(any_report), tmp_path / name)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["report.html", "report.json", "report.md"]
    assert read_json(tmp_path / "first" / "report.json") == content_of(any_report)
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_page_that_cannot_be_drawn_leaves_the_old_report(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(report: Report) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(render, "render_html", fail)
    with pytest.raises(ZeroDivisionError):
        write_report(changed(report, {"seconds.load": 1.0}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@settings(deadline=None, max_examples=30)
@given(
    st.builds(sample_report, groups=st.integers(1, 3), blocks=st.integers(1, 3), seed=st.integers(0), finetuned=...)
    | st.builds(sample_language_report, st.sampled_from(["fips", "dense"]), portable=...)
)
def test_a_report_read_back_is_the_same(report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        write_record(path, report)
        read = read_record(Report, path)
        assert read == report
        before = path.read_bytes()
        write_record(path, read)
        assert path.read_bytes() == before


def test_reading_a_report_needs_no_pytorch() -> None:
    heavy = "{'torch', 'transformers', 'onnxruntime'}"
    code = f"import sys, pipeline.report.schema; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


@settings(deadline=None)
@given(data=st.data(), value=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_numbers_that_are_not_finite_are_refused_by_their_key(data: st.DataObject, value: float) -> None:
    report = SAMPLES[data.draw(st.sampled_from(sorted(SAMPLES)))]()
    numbers = [key for key in _numbers(content_of(report)) if not key.startswith("recipe.")]
    key = data.draw(st.sampled_from(numbers))
    with pytest.raises(ValidationError) as refused:
        changed(report, {key: value})
    parts = key.split(".")
    # Where there are alternatives, pydantic names in between the one that it tried.
    assert any(
        [str(part) for part in problem["loc"] if str(part) in parts] == parts and problem["type"] == "finite_number"
        for problem in refused.value.errors()
    )


def _numbers(value: Any, key: str = "") -> Iterator[str]:
    """Dotted keys of all numbers with a fraction."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in entries:
        yield from _numbers(entry, f"{key}.{name}" if key else str(name))
    if isinstance(value, float):
        yield key


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", 1, r"schema_version\n  Input should be 4 .*input_value=1"),
        ("bytes.by_part.graph", 0, r"bytes\n.*by_part adds up to \d+, artifact is \d+"),
        ("quality.finetuned", REMOVED, r"quality\.accuracy\n.*standard_error has the stages .*'finetuned'"),
        ("stage_bytes.finetuned", REMOVED, "stage_bytes has the stages .*, quality has .*'finetuned'"),
        ("quality.standard_error.qat", REMOVED, r"quality\.accuracy\n.*standard_error has the stages"),
        ("quality.qat", REMOVED, r"quality\.accuracy\.qat\n  Field required"),
        ("quality.qat", 1.01, r"quality\.accuracy\.qat\n  Input should be less than or equal to 1 .*input_value=1\.01"),
        ("reconstruction_error.fitted.3", REMOVED, r"reconstruction_error\.fitted has the blocks"),
        ("reconstruction_error.fitted", REMOVED, "reconstruction_error has the stages"),
        ("groups", [], r"groups\n  Tuple should have at least 1 item"),
        ("groups.1.blocks", [], r"groups\.1\.blocks\n  Tuple should have at least 1 item"),
        ("groups.1.rank", None, "group_1: rank, basis_bits and singular_values go with method fips"),
        ("compression.method", "dense", r"stages \['factorized', 'finetuned', 'fitted'\], which method dense"),
        ("data.context", 512, r"data\.Samples\.context\n  Extra inputs are not permitted"),
        ("divergence.kl_max", 1.0, r"divergence\.ImageDivergence\.kl_max\n  Extra inputs are not permitted"),
        ("speed.unit", "tokens/s", r"speed\.tokens/s\.batch\n  Extra inputs are not permitted"),
        ("speed.rows", [], r"speed\.images/s\.rows\n  Tuple should have at least 1 item"),
        ("data", LANGUAGE["data"], "of text: data; of images: metric, divergence, speed; expected one kind"),
        ("divergence", LANGUAGE["divergence"], "of text: divergence; of images: metric, data, speed"),
        ("speed", LANGUAGE["speed"], "of text: speed; of images: metric, data, divergence; expected one kind"),
        ("disk_byte", 3, r"disk_byte\n  Extra inputs are not permitted"),
        ("recipe.seed", "0", r"recipe\.seed\n  Input should be a valid integer .*input_value='0'"),
    ],
)
def test_refuses_a_report_that_contradicts_itself(report: Report, key: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(report, {key: value})


def test_method_fips_has_factors(report: Report) -> None:
    parts = ("quality", "quality.standard_error", "stage_bytes", "reconstruction_error")
    with pytest.raises(ValidationError, match="quality lacks the stage factorized of method fips"):
        changed(report, {f"{part}.factorized": REMOVED for part in parts})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.test_tokens", REMOVED, r"data\.TextSamples\.test_tokens\n  Field required"),
        ("divergence.kl_p999", REMOVED, r"divergence\..*TextDivergence.*\.kl_p999\n  Field required"),
        ("divergence.kl_p90", 2.0, r"kl_p999 and kl_max do not rise: \(0\.081, 2\.0, 1\.92"),
        ("quality.difference_to_dense.qat", REMOVED, r"quality\.perplexity\n.*difference_to_dense has the stages"),
        ("quality.difference_to_dense.qat.nll", 0.2, r"to_dense\.qat\.nll is 0\.2, its ratio .* say 0\.1832"),
        ("quality.difference_to_dense.qat.nll", 1e9, r"difference_to_dense\.qat\.nll is 1e\+09, its ratio"),
        ("quality.qat", 17.0, r"its ratio and the perplexities say 0\.1832 and 0\.165"),
        ("quality.bits_per_byte.qat", 1.1, r"bits_per_byte\.qat is 1\.1, the perplexity says 1\.02835"),
        ("quality.bits_per_byte.qat", REMOVED, "bits_per_byte has the stages"),
        ("quality.by_frequency.qat", REMOVED, "by_frequency has the stages"),
        ("quality.frequent_tokens", 102_201, "frequent_tokens is 102201, of 102200 tokens"),
        (
            "data.vocabulary",
            {"tokens": 9, "kept": 10, "respelled": 0.1, "respelled_in_test": 0.1},
            "kept is 10, the vocabulary has 9 tokens",
        ),
        ("quality.tokens", 102_401, "tokens is 102401, 200 windows of 512 tokens have at most 102400"),
        ("quality.stride", 1024, r"stride is 1024, expected 1 to 512"),
        ("speed.unit", "images/s", r"speed\.images/s\.prompt_tokens\n  Extra inputs are not permitted"),
        ("speed.rows.1.decode_ratio_to_int4", REMOVED, r"rows\.1\.decode_ratio_to_int4\n  Field required"),
        ("memory.load_rss_by_backend.torch", 1, r"load_rss_by_backend has \['torch'\], the rows of speed have"),
    ],
)
def test_refuses_a_language_report_that_contradicts_itself(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(sample_language_report(), {key: value})


def test_dense_method_has_no_factors() -> None:
    report = sample_language_report("dense")
    with pytest.raises(ValidationError, match="group_4: rank, basis_bits and singular_values go with method"):
        changed(report, {"groups.4.rank": 640})
    changes = {
        "quality.fitted": LANGUAGE["quality"]["fitted"],
        "quality.standard_error.fitted": 0.1,
        "quality.difference_to_dense.fitted": LANGUAGE["quality"]["difference_to_dense"]["fitted"],
        "quality.bits_per_byte.fitted": LANGUAGE["quality"]["bits_per_byte"]["fitted"],
        "quality.by_frequency.fitted": LANGUAGE["quality"]["by_frequency"]["fitted"],
    }
    with pytest.raises(ValidationError, match=r"quality has the stages \['fitted'\], which method dense has not"):
        changed(report, changes)


# --- words and tables ------------------------------------------------------------------------------------------


def test_verdict_and_its_error(report: Report) -> None:
    share = report.bytes.artifact / report.bytes.dense_float16
    assert verdict(report) == f"{100 * share:.0f} % of the float16 bytes, accuracy 97.8 % → 97.5 %"
    assert "−0.3 points against the dense model, within one standard error (±0.6 points)" in verdict_detail(report)
    worse = changed(report, {"quality.onnx_native": 0.95})
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
    report = changed(sample_report(finetuned=False), {"quality.onnx_native": 0.5})
    rows = table_rows(report, "Accuracy and bytes per stage")
    assert rows["ONNX, native kernels"][2] == "−47.5"
    assert rows["ONNX, portable functions"][2] == "0.0"
    assert "finetuned" not in rows
    assert "finetuned" not in render_html(report).replace("--plot-finetuned", "")


def test_parts_add_up_and_bits_stand_side_by_side(report: Report) -> None:
    bits = table_rows(report, "Size", 0)
    assert bits["paper bits"][1] == f"{report.bits_per_weight.paper:.2f}"
    assert bits["stored bits"][1] == f"{report.bits_per_weight.stored:.2f}"
    parts = table_rows(report, "Size", 1)
    assert parts["artefact"][1] == "100.0 %"
    assert set(parts) == {*report.bytes.by_part, "artefact"}
    assert sum(float(row[1].split()[0]) for name, row in parts.items() if name != "artefact") == pytest.approx(
        100, abs=0.5
    )


def test_warnings_include_what_the_figures_show(report: Report) -> None:
    assert warning_lines(report) == list(report.warnings)
    changes = {"parity.portable_vs_torch.relative": 2e-3, "parity.same_predictions": False}
    bad = changed(report, {"warnings": [], **changes, "bytes.dense_float16": report.bytes.artifact})
    assert warning_lines(bad) == [
        "The artefact's native kernels and portable functions do not give the same predictions.",
        "ONNX Runtime, portable functions, against PyTorch: the logits differ by more than the tolerance.",
        "The artefact is not smaller than the dense model stored as float16.",
    ]
    assert [row[0] for row in table_rows(bad, "Parity").values()] == ["yes", "no", "yes"]


def test_reused_stages_are_marked(report: Report) -> None:
    rows = table_rows(report, "Cost of the run", 1)
    assert rows["calibrate"] == ("earlier run", "2.1 s", "822 MB")
    assert rows["qat"] == ("this run", "1 h 02 min", "1.34 GB")
    assert rows["whole run"] == ("", "1 h 04 min", "1.34 GB")


def test_cost_is_time_memory_and_disk_together(report: Report) -> None:
    assert table_rows(report, "Cost of the run") == {
        "time": ("1 h 04 min",),
        "peak of resident memory": ("1.34 GB",),
        "disk, the work folder": ("212 MB",),
    }
    assert (key_figures(report)[-1].value, key_figures(report)[-1].context) == (
        "1 h 04 min",
        "1.34 GB memory, 212 MB disk",
    )


# --- language models -------------------------------------------------------------------------------------------


def test_perplexity_in_words() -> None:
    report = sample_language_report()
    assert verdict(report) == "29 % of the float16 bytes, perplexity 14.41 → 17.31"
    assert verdict_detail(report) == (
        "Measured on the artefact itself with 102,200 tokens in 200 windows (context 512, stride 512): 1.201 ± 0.006 "
        "times the dense model's perplexity (paired over windows), more than one standard error worse."
    )
    (introduction,) = sections(report)[0].introduction
    assert introduction == (
        "Where the perplexity went: sharing × 1.087, quantization × 1.105 (codes before training × 1.309, "
        "training × 0.845), export × 1.000."
    )
    assert verdict_detail(_change_nll(report, "onnx_native", -0.05)).endswith(
        "0.951 ± <0.001 times the dense model's perplexity (paired over windows), more than one standard error better."
    )
    equal = _change_nll(report, "onnx_native", 0.0005)
    assert verdict_detail(equal).endswith("within one standard error of equal.")


def test_perplexity_at_the_top() -> None:
    figure = key_figures(sample_language_report())[1]
    assert (figure.label, figure.value, figure.context) == ("Perplexity", "17.31", "±0.25; 1.201 × dense (14.41)")


def _change_nll(report: Report, stage: str, nll: float) -> Report:
    """Let ``stage`` differ from dense by ``nll`` nats."""
    difference = {"nll": nll, "standard_error": 0.001 if nll > 0 else 0.0001, "ratio": math.exp(nll)}
    value = report.quality.dense * math.exp(nll)
    changes = {f"quality.{stage}": value, f"quality.difference_to_dense.{stage}": difference}
    return changed(report, {**changes, f"quality.bits_per_byte.{stage}": math.log2(value) / 4})


def test_perplexity_per_stage() -> None:
    rows = table_rows(sample_language_report(), "Perplexity and bytes per stage")
    assert list(rows) == [
        "dense",
        "factorized",
        "fitted",
        "rounded (GPTQ)",
        "quantized (QAT)",
        "ONNX, native kernels",
        "ONNX, portable functions",
    ]
    assert rows["dense"][:4] == ("14.41", "±0.21", "–", "–")
    assert rows["factorized"][:4] == ("164.0", "±2.4", "11.4", "11.4 ± 0.6")
    assert rows["rounded (GPTQ)"][:4] == ("20.49", "±0.30", "1.309", "1.422 ± 0.011")
    assert rows["ONNX, native kernels"][:4] == ("17.31", "±0.25", "1.000", "1.201 ± 0.006")
    assert rows["ONNX, portable functions"][2] == "1.000"
    divergence = table_rows(sample_language_report(), "Perplexity and bytes per stage", 1)
    assert divergence == {"nats per token": ("0.21", "0.081", "0.55", "1.9", "4.4", "13")}


def test_frequent_and_rare_tokens_apart() -> None:
    report = sample_language_report()
    rows = table_rows(report, "Perplexity and bytes per stage", 2)
    assert rows["dense"] == ("0.9623", "8.647", "–", "576.4", "–")
    assert rows["ONNX, native kernels"] == ("1.0284", "10.39", "1.201", "692.4", "1.201")
    notes = notes_of(report, "Perplexity and bytes per stage")
    assert "make up 90 % of it, and 88.1 % of the test text" in notes
    assert "whole vocabulary" not in notes
    without = changed(report, {"quality.by_frequency": {}, "quality.frequent_tokens": 102_200})
    assert table_rows(without, "Perplexity and bytes per stage", 2)["dense"] == ("0.9623",)


def test_a_cut_vocabulary_is_told() -> None:
    report = sample_language_report()
    cut = changed(report, {"recipe.vocabulary": {"scripts": ["Latin"]}, "divergence.tokens": 100_000})
    notes = notes_of(cut, "Perplexity and bytes per stage")
    assert "count tokens of the whole vocabulary at every stage" in notes
    assert "over the kept tokens, at 100,000 of 102,200 tokens" in notes


def test_weights_outside_the_mlps_are_listed_by_kind_and_bits() -> None:
    report = sample_language_report()
    title = "Weights outside the MLPs"
    assert title not in {section.title for section in sections(report)}
    layers = [
        {"name": f"model.layers.{layer}.self_attn.q_proj", "bits": {bits: 640}, "bytes": 300_000}
        for layer, bits in enumerate(["4", "4", "3", "4"])
    ]
    table = {"name": "model.embed_tokens", "bits": {"8": 16_384, "3": 245_760}, "bytes": 72_100_000}
    packed = changed(report, {"rest_weights": [*layers, table]})
    (section,) = [section for section in sections(packed) if section.title == title]
    assert section.tables[0].rows == (
        ("model.embed_tokens", "8 × 16,384, 3 × 245,760", "–", "1", "72.1 MB"),
        ("model.layers.*.self_attn.q_proj", "3", "2", "1", "300 kB"),
        ("model.layers.*.self_attn.q_proj", "4", "0–1, 3", "3", "900 kB"),
    )
    assert "bits × rows" in notes_of(packed, title)
    without_tiers = changed(report, {"rest_weights": layers})
    assert notes_of(without_tiers, title) == ""


def test_text_unlike_the_training_text_is_a_warning() -> None:
    report = sample_language_report()
    assert warning_lines(report) == []
    (line,) = warning_lines(changed(report, {"quality.frequent_tokens": 51_100}))
    assert line.startswith("The test text is unlike the training text: tokens that make up 90 % of the one make up 50")


def test_dense_method_in_words() -> None:
    report = sample_language_report("dense", portable=False)
    assert subtitle(report) == (
        "dense MLPs (quantized without factorization), 3-bit codes, GPTQ start · gemma3_text, 268,098,176 parameters, "
        "packaged_gguf"
    )
    (introduction,) = sections(report)[0].introduction
    assert introduction.startswith("Where the perplexity went: quantization × 1.201 (codes before training × 1.422, ")
    rows = table_rows(report, "Perplexity and bytes per stage")
    assert list(rows) == ["dense", "rounded (GPTQ)", "quantized (QAT)", "ONNX, native kernels"]
    assert "portable" not in " ".join(sections(report)[0].notes)
    assert table_rows(report, "Quantized MLPs") == {"0–17": ("3", "640", "6,144")}
    html = render_html(report)
    assert "Groups and their spectra" not in html
    assert "shared bases" not in html
    parts = table_rows(report, "Size", 1)
    assert "basis codes" not in parts
    assert "weight codes" in parts


def test_method_is_named_at_the_top_of_both_pages(any_report: Report) -> None:
    assert subtitle(any_report) in render_html(any_report).split("<h1>")[0]
    assert subtitle(any_report).split(" · ")[0] in render_markdown(any_report).splitlines()[2]
    assert subtitle(sample_language_report()).startswith("FiPS (shared bases and projections), 2- to 4-bit codes, GPTQ")


def test_rounded_codes_of_images_are_told_from_trained_ones(report: Report) -> None:
    changes = {
        "quality.rounded": 0.9,
        "quality.standard_error.rounded": 0.012,
        "stage_bytes.rounded": report.stage_bytes["qat"],
        "reconstruction_error.rounded": report.reconstruction_error["factorized"],
    }
    with_rounded = changed(report, changes)
    rows = table_rows(with_rounded, "Accuracy and bytes per stage")
    assert rows["rounded (nearest)"][:4] == ("90.0 %", "±1.2", "−7.6", "−7.8")
    assert rows["quantized (QAT)"][2] == "+7.5"
    (introduction,) = sections(with_rounded)[0].introduction
    assert "quantization −0.2 points (codes before training −7.6 points, training +7.5 points)" in introduction


def test_speed_and_memory_beside_int4() -> None:
    report = sample_language_report()
    rows = table_rows(report, "Speed and memory")
    assert rows == {
        "artefact, native kernels": ("412", "0.91 ×", "43.1", "1.12 ×", "236 MB"),
        "onnxruntime-genai builder, int4": ("452", "1.00 ×", "38.5", "1.00 ×", "391 MB"),
    }
    figure = key_figures(report)[3]
    assert (figure.label, figure.value) == ("Decoding, tokens/s", "43.1")
    assert figure.context == "1.12 × onnxruntime-genai int4; prefill: 412 tokens/s"
    assert table_rows(report, "Speed and memory", 1) == {
        "artefact, native kernels": ("0.8 s", "297 MB", "133 MB", "47 %"),
        "onnxruntime-genai builder, int4": ("–", "–", "152 MB", "48 %"),
    }
    assert table_rows(report, "Speed and memory", 2) == {
        "after loading the artefact": ("236 MB",),
        "peak while running the artefact": ("412 MB",),
        "a process with onnxruntime-genai and no model": ("61.4 MB",),
    }
    alone = changed(report, {"memory.load_rss_by_backend": REMOVED})
    assert table_rows(alone, "Speed and memory") == {name: row[:4] for name, row in rows.items()}


def test_speed_of_a_report_of_an_earlier_version() -> None:
    """It says neither what loading takes nor what a token reads."""
    keys = ("load_seconds", "weight_bytes", "read_fraction")
    removed = {f"speed.rows.{row}.{key}": REMOVED for row in (0, 1) for key in keys}
    removed |= {"speed.read_bytes_per_second": REMOVED, "memory.base_rss_bytes": REMOVED}
    removed["memory.run_rss_by_backend"] = REMOVED
    report = changed(sample_language_report(), removed)
    assert table_rows(report, "Speed and memory", 1) == {
        "after loading the artefact": ("236 MB",),
        "peak while running the artefact": ("412 MB",),
    }
    (section,) = [section for section in sections(report) if section.title == "Speed and memory"]
    assert section.notes == ()


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


def test_html_is_well_formed_and_self_contained(any_report: Report, any_html: str) -> None:
    page = _Page()
    page.feed(any_html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "<script" not in any_html
    assert "@import" not in any_html
    assert {match for match in re.findall(r"url\(([^)]*)\)", any_html) if not match.startswith("#")} == set()
    assert any_html.count("<svg") == sum(section.plot is not None for section in sections(any_report))


def test_html_and_markdown_hold_every_cell(any_report: Report, any_html: str) -> None:
    page = _Page()
    page.feed(any_html)
    markdown = render_markdown(any_report).replace("\\", "")
    expected = [
        cell
        for section in sections(any_report)
        for table in section.tables
        for row in (table.header, *table.rows)
        for cell in row
    ]
    assert page.cells == expected
    for cell in expected:
        assert cell in markdown


def test_text_from_outside_is_escaped(report: Report) -> None:
    hostile = changed(report, {"warnings": ["<b>a | b</b>\n# not a heading"], "hardware.cpu": "x86 | <i>"})
    assert "&lt;b&gt;a | b&lt;/b&gt;" in render_html(hostile)
    markdown = render_markdown(hostile)
    assert "> - \\<b>a \\| b\\</b> # not a heading\n" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| machine")]
    assert rows == ["| machine | x86 \\| \\<i>, 2 cores, 8.59 GB memory |"]


def test_markdown_tables_are_rectangular(any_report: Report) -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", render_markdown(any_report), flags=re.M)
    assert len(tables) == sum(len(section.tables) for section in sections(any_report))
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


# --- plots -----------------------------------------------------------------------------------------------------


def figures_of(report: Report) -> list[Any]:
    """All but the spectrum, which goes with a factorization."""
    return [draw for draw in FIGURES if draw is not spectrum_figure or report.compression.method == "fips"]


@pytest.mark.parametrize(("make", "draw"), [(make, draw) for make in SAMPLES.values() for draw in figures_of(make())])
def test_plots_are_deterministic_themed_svg(make: Callable[[], Report], draw: Any) -> None:
    report = make()
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


def _plots(kind: str, shape: dict[str, Any]) -> list[Any]:
    make = sample_report if kind == "images" else sample_language_report
    draws = figures_of(make(**shape))
    return [pytest.param(draw, partial(make, **shape), id=f"{kind}-{shape}-{draw.__name__}") for draw in draws]


@pytest.mark.parametrize(
    ("draw", "make"),
    [
        *_plots("images", {"groups": 1, "blocks": 1}),
        *_plots("images", {"groups": 12, "blocks": 2, "finetuned": False}),
        *_plots("images", {"groups": 3}),
        *_plots("language", {"method": "fips"}),
        *_plots("language", {"method": "dense"}),
        *_plots("language", {"method": "dense", "portable": False}),
    ],
)
def test_no_texts_overlap_or_leave_the_figure(draw: Any, make: Callable[[], Report]) -> None:
    figure = draw(make())
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
    values = [*report.groups[0].singular_values[:40], *[0.0] * 24]
    axes = spectrum_figure(changed(report, {"groups.0.singular_values": values})).axes[0]
    values = axes.lines[0].get_ydata()
    assert values[0] == 1.0
    assert np.isnan(values[40:]).all()
    assert axes.lines[1].get_xdata() == [96, 96]


def test_reconstruction_leaves_a_gap_at_dense_blocks() -> None:
    report = sample_report(groups=2, blocks=2)
    errors = {
        stage: {block: by_block[old] for block, old in zip("0134", "0123", strict=True)}
        for stage, by_block in report.reconstruction_error.items()
    }
    (axes,) = reconstruction_figure(changed(report, {"groups.1.blocks": [3, 4], "reconstruction_error": errors})).axes
    assert len(axes.lines) == 4
    for line in axes.lines:
        assert list(line.get_xdata()) == [0, 1, 2, 3, 4]
        assert list(np.isnan(line.get_ydata())) == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("largest", "scale", "labels"),
    [
        (20.5, "linear", ["14", "16", "18", "20"]),
        (60.0, "log", ["15", "20", "30", "50"]),
        (164.0, "log", ["20", "50", "100"]),
        (900.0, "log", ["30", "100", "300", "1,000"]),
        (2e6, "log", ["10", "100", "1,000", "1e4", "1e5", "1e6"]),
    ],
)
def test_axis_of_perplexities_suits_their_range(largest: float, scale: str, labels: list[str]) -> None:
    report = sample_language_report()
    nll = math.log(largest / report.quality.dense)
    report = changed(_change_nll(report, "factorized", nll), {"quality.standard_error.factorized": 0.01 * largest})
    figure = stages_figure(report)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_xscale() == scale
    low, high = axes.get_xlim()
    shown = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert shown == labels


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
    assert [format_perplexity(*pair) for pair in ((17.316, 0.213), (14.4, 0.0031), (164.2, 12.4), (9.0, 0.0))] == [
        ("17.32", "0.21"),
        ("14.4000", "0.0031"),
        ("164", "12"),
        ("9.00", "0.00"),
    ]
    assert format_perplexity(3.24e7, 1.5e6) == ("3.2e7", "1.5e6")
    assert [format_ratio(value) for value in (0.98765, 9.9996, 23.44, 12_345.6, 2.5e6)] == [
        "0.988",
        "10.0",
        "23.4",
        "12,346",
        "2.5e6",
    ]
    assert [format_ratio(1.2, error) for error in (0.006, 0.0001, 0.0)] == [
        "1.200 ± 0.006",
        "1.200 ± <0.001",
        "1.200 ± 0.000",
    ]
    assert [format_rate(value) for value in (2104.2, 99.96, 43.06, 3.14159)] == ["2,104", "100", "43.1", "3.14"]
