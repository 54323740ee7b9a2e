"""Running a sweep: every point is ``fips run`` in a folder of its own, stages that points have in common are shared."""

import os
import shutil
from pathlib import Path

import yaml

from pipeline.plumbing.engines import Command, Engine, run_on_ray, run_side_by_side
from pipeline.plumbing.errors import StageError
from pipeline.plumbing.files import digest, write_text, writing
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.records import Record, find_record, read_record, write_record
from pipeline.plumbing.run_folder import code_digest, only_one, versions
from pipeline.report.schema import Report
from pipeline.sweep.definition import Point, Sweep
from pipeline.sweep.page import write_results
from pipeline.sweep.results import Results, gather

POINTS, SHARED = "points", "shared"
COMMAND = "pipeline.cli"
"""The module that runs a point, as ``python -m``."""


class _Finished(Record):
    """Content of ``finished.json``, which stands beside the report of a point."""

    key: str


def run_sweep(
    sweep: Sweep,
    folder: Path,
    progress: Progress,
    *,
    at_once: int = 1,
    engine: Engine = "local",
    fresh: bool = False,
) -> Results:
    """Run every point that is not finished yet, and write ``sweep.json``, ``.csv``, ``.md``, ``.html`` and ``.png``.

    ``at_once``: points side by side on this machine; Ray has as many as fit. A point that fails is reported and does
    not stop the others. Finished points are kept while recipe, code and library versions stay as they are; data and
    models are taken to be unchanged (``fresh`` starts anew). Raises InputError if the folder cannot be used, and
    StageError if no point could be run.
    """
    threads = sweep.threads or max(1, (os.cpu_count() or 1) // at_once)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder / "lock", f"--out {folder}: another sweep works in this folder"):
        if fresh:
            for name in (POINTS, SHARED):
                shutil.rmtree(folder / name, ignore_errors=True)
        endings: dict[str, Report | str] = {}
        commands = []
        for point in sweep.points:
            report = finished_report(folder, point)
            if report is None:
                commands.append(_prepare(folder, point))
            else:
                endings[point.name] = report
        progress.say(f"{sweep.name}: {len(sweep.points)} points, {len(endings)} finished before")
        if engine == "ray":
            running = run_on_ray(commands, threads, progress.say)
        else:
            running = run_side_by_side(commands, at_once, threads, progress.say)
        points = {point.name: point for point in sweep.points}
        for outcome in running:
            point_folder = folder / POINTS / outcome.name
            if outcome.status == 0:
                endings[outcome.name] = read_record(Report, point_folder / "report.json")
                write_record(point_folder / "finished.json", _Finished(key=point_key(points[outcome.name])))
            else:
                endings[outcome.name] = outcome.message
                progress.say(f"{outcome.name}: failed; the others go on. {outcome.message}")
        if not any(isinstance(ending, Report) for ending in endings.values()):
            complaints = "\n".join(f"{point.name}: {endings[point.name]}" for point in sweep.points)
            raise StageError(f"no point of the sweep could be run\n{complaints}")
        results = gather(sweep, endings)
        write_results(results, folder)
    return results


def point_key(point: Point) -> str:
    """Hash what a finished point depends on."""
    return digest({"recipe": point.recipe.model_dump(mode="json"), "code": code_digest(), "versions": versions()})


def finished_report(folder: Path, point: Point) -> Report | None:
    """The report of a point that is finished and would come out the same; None if there is none, or a damaged one."""
    point_folder = folder / POINTS / point.name
    if find_record(_Finished, point_folder / "finished.json") != _Finished(key=point_key(point)):
        return None
    return find_record(Report, point_folder / "report.json")


def _prepare(folder: Path, point: Point) -> Command:
    """Write a point's recipe into its folder, where anybody can repeat it; returns the command ``fips run`` on it."""
    point_folder = folder / POINTS / point.name
    (point_folder / "finished.json").unlink(missing_ok=True)
    recipe = point_folder / "recipe.yaml"
    write_text(recipe, yaml.safe_dump(point.content, sort_keys=False, allow_unicode=True, width=120))
    arguments = ["run", recipe, "--out", point_folder, "--shared", folder / SHARED]
    return Command(point.name, (COMMAND, *map(str, arguments)), point_folder / "log.txt")
