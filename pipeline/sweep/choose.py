"""``fips choose``: the best point of a finished sweep within limits."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.plumbing.byte_sizes import parse_bytes
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import write_text
from pipeline.plumbing.records import read_record
from pipeline.report.units import format_bytes, format_percent
from pipeline.sweep.results import Results, Row


@dataclass(frozen=True)
class Chosen:
    """The point that was chosen. ``recipe``: as nested mappings. ``description``: the point and its figures in one
    line."""

    point: str
    recipe: dict[str, Any]
    description: str

    def write_recipe(self, path: Path) -> None:
        """Write the recipe as YAML. Raises InputError rather than replace a file."""
        if os.path.lexists(path):
            raise InputError(f"--out {path}: the file is there already; give another name, or remove it")
        text = yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True, width=120)
        write_text(path, f"# {self.description}\n{text}")


def choose_point(sweep: Path, max_bytes: str | None, max_loss: str | None) -> Chosen:
    """The point of least loss within ``max_bytes``; given only ``max_loss``, the smallest one within it.

    ``sweep``: a sweep's folder or its ``sweep.json``. Of equal points the smaller, or better, is taken. Raises
    InputError if the limits make no sense or no point keeps them, naming the nearest.
    """
    results = _read(sweep)
    if max_bytes is None and max_loss is None:
        raise InputError("fips choose: give --max-bytes, --max-loss, or both")
    bytes_limit = None if max_bytes is None else _bytes_limit(max_bytes)
    loss_limit = None if max_loss is None else parse_percent(max_loss)
    fitting = [
        row
        for row in results.points
        if (bytes_limit is None or row.artifact_bytes <= bytes_limit)
        and (loss_limit is None or row.loss <= loss_limit)
    ]
    if not fitting:
        smallest = min(results.points, key=lambda row: row.artifact_bytes)
        best = min(results.points, key=lambda row: row.loss)
        raise InputError(
            f"{sweep}: no point keeps the limits; the smallest is {_describe(smallest, results.metric)}; the best is "
            f"{_describe(best, results.metric)}"
        )
    if bytes_limit is None:
        chosen = min(fitting, key=lambda row: (row.artifact_bytes, row.loss))
    else:
        chosen = min(fitting, key=lambda row: (row.loss, row.artifact_bytes))
    return Chosen(chosen.point, chosen.recipe, _describe(chosen, results.metric))


def _bytes_limit(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise InputError(f"--max-bytes {text}: {error}") from None


def parse_percent(text: str) -> float:
    """Fraction that per cent stand for: ``2%`` → 0.02. Raises InputError."""
    match = re.fullmatch(r"(-?[0-9]+(?:\.[0-9]+)?)\s*%", text.strip())
    if match is None:
        raise InputError(f"--max-loss {text}: write per cent, as in 2%")
    return float(match[1]) / 100


def _describe(row: Row, metric: str) -> str:
    if metric == "accuracy":
        quality = f"accuracy {format_percent(row.value)} ({100 * row.loss:+.1f} points lost)"
    else:
        quality = f"perplexity {row.value:.2f} ({1 + row.loss:.3f} × dense)"
    return f"{row.point}: {quality}, {format_bytes(row.artifact_bytes)}, {row.stored_bits:.2f} stored bits"


def _read(sweep: Path) -> Results:
    path = sweep / "sweep.json" if sweep.is_dir() else sweep
    try:
        return read_record(Results, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give the folder of a finished sweep") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f"{path}: is not the result of a sweep of this version ({where}: {first['msg']}); give the folder of a "
            "finished sweep, or run it again"
        ) from None
