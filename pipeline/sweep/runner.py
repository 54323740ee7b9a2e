"""Running a sweep: every point is ``fips run`` in a folder of its own, stages that points have in common are shared."""

import os
from pathlib import Path

import yaml

from fips_ort.manifest import sha256
from pipeline.plumbing.engines import Command, Engine, Outcome, run_on_ray, run_side_by_side
from pipeline.plumbing.errors import InputError, StageError
from pipeline.plumbing.files import digest, write_text, writing
from pipeline.plumbing.ownership import MARK, claim
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.records import Record, find_record, write_record
from pipeline.plumbing.run_folder import RunFolder, clear_shared, code_digest, only_one, versions
from pipeline.report.schema import Report
from pipeline.sweep.definition import Point, Sweep
from pipeline.sweep.page import SWEEP_FILES, write_results
from pipeline.sweep.results import Results, gather

POINTS, SHARED = "points", "shared"
_FINISHED, _REPORT = "finished.json", "report.json"
COMMAND = "pipeline.cli"
"""The module that runs a point, as ``python -m``."""


class _Finished(Record):
    """Content of ``finished.json``, which stands beside the report of a point. ``report_sha256``: of that report."""

    key: str
    report_sha256: str


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
    claim(folder, f"--out {folder}", (POINTS, SHARED, *SWEEP_FILES))
    with only_one(folder / "lock", f"--out {folder}: another sweep works in this folder"):
        for point in sweep.points:
            _check_place(folder, point)
        if fresh:
            _forget_results(folder, progress)
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
            ending = _ending(point_folder, points[outcome.name], outcome)
            endings[outcome.name] = ending
            if isinstance(ending, str):
                progress.say(f"{outcome.name}: failed; the others go on. {ending}")
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
    finished = find_record(_Finished, point_folder / _FINISHED)
    if finished is None or finished.key != point_key(point):
        return None
    report = _own_report(point_folder, point)
    return report if report is not None and finished.report_sha256 == sha256(point_folder / _REPORT) else None


def _own_report(point_folder: Path, point: Point) -> Report | None:
    """The report in a point's folder, if it is whole and speaks of the point's recipe."""
    report = find_record(Report, point_folder / _REPORT)
    return report if report is not None and report.recipe == point.recipe else None


def _ending(point_folder: Path, point: Point, outcome: Outcome) -> Report | str:
    """The report that a point's command has left, which is then marked as finished; or what went wrong."""
    if outcome.status:
        return outcome.message
    report = _own_report(point_folder, point)
    if report is None:
        return f"{point_folder / _REPORT} is damaged, or is another recipe's; run the sweep again"
    key = point_key(point)
    write_record(point_folder / _FINISHED, _Finished(key=key, report_sha256=sha256(point_folder / _REPORT)))
    return report


def _check_place(folder: Path, point: Point) -> None:
    """Raise InputError if the folder of a point is not one, or leads elsewhere."""
    for path in (folder / POINTS, folder / SHARED, folder / POINTS / point.name):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InputError(f"--out {folder}: {path} is no folder of its own; it is left untouched: move it away")


def _forget_results(folder: Path, progress: Progress) -> None:
    """Delete what earlier sweeps have computed, and nothing else."""
    points = folder / POINTS
    for point_folder in sorted(points.iterdir()) if points.is_dir() else ():
        if (point_folder / "work" / MARK).is_file():
            with writing(point_folder):
                (point_folder / _FINISHED).unlink(missing_ok=True)
            run_folder = RunFolder(point_folder, progress, fresh=True)
            with run_folder.lock():
                pass
    clear_shared(folder / SHARED)


def _prepare(folder: Path, point: Point) -> Command:
    """Write a point's recipe into its folder, where anybody can repeat it; returns the command ``fips run`` on it."""
    point_folder = folder / POINTS / point.name
    (point_folder / _FINISHED).unlink(missing_ok=True)
    recipe = point_folder / "recipe.yaml"
    write_text(recipe, yaml.safe_dump(point.content, sort_keys=False, allow_unicode=True, width=120))
    arguments = ["run", recipe, "--out", point_folder, "--shared", folder / SHARED]
    return Command(point.name, (COMMAND, *map(str, arguments)), point_folder / "log.txt")
