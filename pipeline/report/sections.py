"""What a report says in words and tables: pure functions from a report to sections, the same for every format."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import yaml

from pipeline.report.schema import Report, Stage, stages_of, trained_stages_of
from pipeline.report.units import (
    accuracy_decimals,
    format_bytes,
    format_error,
    format_percent,
    format_points,
    format_seconds,
)

Plot = Literal["stages", "bytes", "spectrum", "reconstruction"]

STAGE_NAMES: dict[Stage, str] = {
    "dense": "dense",
    "factorized": "factorized",
    "fitted": "fitted",
    "finetuned": "finetuned",
    "qat": "quantized (QAT)",
    "onnx_native": "ONNX, native kernels",
    "onnx_portable": "ONNX, portable functions",
}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``text_columns`` hold words, the others numbers. ``total``: the last row sums up."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    total: bool = False

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows)


@dataclass(frozen=True)
class Section:
    """``notes`` follow the table; ``plot`` is shown between the introduction and the table."""

    title: str
    introduction: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    plot: Plot | None = None
    plot_description: str = ""


@dataclass(frozen=True)
class KeyFigure:
    label: str
    value: str
    context: str


def verdict(report: Report) -> str:
    """The run in one line: share of the dense float16 model's bytes, accuracy before and after."""
    sizes, quality = report["bytes"], report["quality"]
    decimals = accuracy_decimals(quality["samples"])
    share = format_percent(sizes["artifact"] / sizes["dense_float16"], 0)
    before = format_percent(quality["dense"], decimals)
    after = format_percent(quality["onnx_native"], decimals)
    return f"{share} of the float16 bytes, accuracy {before} → {after}"


def verdict_detail(report: Report) -> str:
    """The verdict's difference in points beside the standard error it was measured with."""
    quality = report["quality"]
    decimals = accuracy_decimals(quality["samples"])
    change, error = quality["onnx_native"] - quality["dense"], quality["standard_error"]["onnx_native"]
    within = "within one standard error" if abs(change) <= error else "more than one standard error"
    points = format_points(change, decimals)
    return (
        f"Measured on the artefact itself with {quality['samples']:,} test samples: {points} points against the dense "
        f"model, {within} (±{100 * error:.{decimals}f} points)."
    )


def key_figures(report: Report) -> list[KeyFigure]:
    sizes, quality, bits = report["bytes"], report["quality"], report["bits_per_weight"]
    decimals = accuracy_decimals(quality["samples"])
    error = 100 * quality["standard_error"]["onnx_native"]
    return [
        KeyFigure(
            "Artefact", format_bytes(sizes["artifact"]), f"dense float16: {format_bytes(sizes['dense_float16'])}"
        ),
        KeyFigure(
            "Accuracy",
            format_percent(quality["onnx_native"], decimals),
            f"±{error:.{decimals}f} points; dense: {format_percent(quality['dense'], decimals)}",
        ),
        KeyFigure("Stored bits per MLP weight", f"{bits['stored']:.2f}", f"paper bits: {bits['paper']:.2f}"),
        KeyFigure("Speed", f"{report['speed']['rows'][0]['ratio_to_float32']:.2f} ×", "of dense float32"),
    ]


def sections(report: Report) -> list[Section]:
    """All sections in the order of the page."""
    return [
        _quality(report),
        _size(report),
        _groups(report),
        _reconstruction(report),
        _parity(report),
        _speed(report),
        _run(report),
    ]


def recipe_text(report: Report) -> str:
    """The whole recipe as YAML."""
    return yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True).rstrip()


def warning_lines(report: Report) -> list[str]:
    """The run's warnings, and what the figures themselves warn of."""
    lines = list(report["warnings"])
    if not report["parity"]["same_predictions"]:
        lines.append("The artefact's native kernels and portable functions do not give the same predictions.")
    lines += [f"{name}: the logits differ by more than the tolerance." for name in _parity_failures(report)]
    if report["bytes"]["artifact"] >= report["bytes"]["dense_float16"]:
        lines.append("The artefact is not smaller than the dense model stored as float16.")
    return lines


# --- sections --------------------------------------------------------------------------------------------------


def _quality(report: Report) -> Section:
    quality, sizes = report["quality"], report["stage_bytes"]
    decimals = accuracy_decimals(quality["samples"])
    stages = stages_of(report)
    rows = []
    for stage in stages:
        before = _stage_before(stage, stages)
        rows.append(
            (
                STAGE_NAMES[stage],
                format_percent(quality[stage], decimals),
                f"±{100 * quality['standard_error'][stage]:.{decimals}f}",
                "–" if before is None else format_points(quality[stage] - quality[before], decimals),
                "–" if before is None else format_points(quality[stage] - quality["dense"], decimals),
                format_bytes(sizes[stage]),
                format_percent(sizes[stage] / sizes["dense"]),
            )
        )
    trained = stages[stages.index("qat") - 1]
    factors = format_points(quality[trained] - quality["dense"], decimals)
    quantization = format_points(quality["qat"] - quality[trained], decimals)
    export = format_points(quality["onnx_native"] - quality["qat"], decimals)
    divergence = report["divergence"]
    header = (
        "stage",
        "accuracy",
        "standard error (points)",
        "change from the stage before (points)",
        "change from dense (points)",
        "whole model",
        "of dense",
    )
    return Section(
        "Accuracy and bytes per stage",
        (
            f"Where the accuracy went: sharing and sparsity {factors} points, quantization {quantization} points, "
            f"export {export} points.",
        ),
        (Table(header, tuple(rows)),),
        (
            f"Top-1 accuracy on the same {quality['samples']:,} test samples at every stage. The standard error is "
            "that of one accuracy; both ONNX rows are compared with the quantized model. Stages before quantization "
            "are counted as stored in float16.",
            "Against the dense model the artefact gives the same top label for "
            f"{format_percent(divergence['same_top1'])} of the samples; KL divergence "
            f"{format_error(divergence['kl_mean'])} nats on average, {format_error(divergence['kl_p99'])} nats at the "
            "99th percentile.",
        ),
        "stages",
        "Accuracy with its standard error and bytes of the whole model, per stage",
    )


def _stage_before(stage: Stage, stages: list[Stage]) -> Stage | None:
    """The stage that ``stage`` started from: both forms of the artefact come from QAT."""
    if stage == "onnx_portable":
        return "qat"
    index = stages.index(stage)
    return stages[index - 1] if index else None


def _size(report: Report) -> Section:
    sizes, bits = report["bytes"], report["bits_per_weight"]
    total = sizes["artifact"]
    parts = sorted(sizes["by_part"].items(), key=lambda part: (-part[1], part[0]))
    rows = [(name, format_bytes(size), format_percent(size / total)) for name, size in (*parts, ("artefact", total))]
    mlp_share = format_percent(sizes["mlp_stored"] / sizes["mlp_dense_float16"])
    return Section(
        "Size",
        (
            f"The MLPs take {format_bytes(sizes['mlp_stored'])} instead of {format_bytes(sizes['mlp_dense_float16'])} "
            f"in float16 ({mlp_share}), the whole artefact {format_bytes(total)} instead of "
            f"{format_bytes(sizes['dense_float16'])} ({format_percent(total / sizes['dense_float16'])}).",
        ),
        (
            Table(
                ("bits per weight of the dense MLPs", "what is counted", "bits"),
                (
                    (
                        "paper bits",
                        "Values only, as the paper counts: the codes of the shared bases and of the kept entries of "
                        "the projections; neither scales nor which entries are kept.",
                        f"{bits['paper']:.2f}",
                    ),
                    (
                        "stored bits",
                        "Every byte the file spends on these weights: codes, scales, sparsity patterns and the shared "
                        "bases.",
                        f"{bits['stored']:.2f}",
                    ),
                ),
                text_columns=2,
            ),
            Table(("part of the artefact", "size", "share"), tuple(rows), total=True),
        ),
        ("1 kB = 1,000 bytes. Exact bytes are in report.json.",),
        "bytes",
        "Bytes of the dense float16 model, of the artefact, and of each part of the artefact",
    )


def _groups(report: Report) -> Section:
    rows = [
        (
            group["name"],
            format_blocks(group["blocks"]),
            _bits_text(group["basis_bits"]),
            _bits_text(group["projection_bits"]),
            group["pattern"],
            f"{group['width']:,}",
            f"{group['columns']:,}",
            f"{group['rank']:,}",
            f"{group['rank'] / group['width']:.2f}",
        )
        for group in report["groups"]
    ]
    header = (
        "group",
        "blocks",
        "basis, bits",
        "projections, bits",
        "pattern",
        "width",
        "columns",
        "rank",
        "rank / width",
    )
    notes = ["Bits × entries of the rank axis. Where the rank exceeds the width the basis is overcomplete (shaded)."]
    if report["dense_blocks"]:
        notes.append(f"Left dense: {name_blocks(report['dense_blocks'])}.")
    return Section(
        "Groups and their spectra",
        (
            "The blocks of a group share one basis U [d, r]; each MLP matrix has its own sparse projection. The "
            "spectra are those of the concatenated MLP matrices W of a group, before the fit.",
        ),
        (Table(header, tuple(rows), text_columns=5),),
        tuple(notes),
        "spectrum",
        "Singular values of every group, its rank marked",
    )


def _reconstruction(report: Report) -> Section:
    errors = report["reconstruction_error"]
    stages = trained_stages_of(report)
    blocks = sorted(int(block) for block in errors["qat"])
    rows = [(str(block), *(_error_percent(errors[stage][str(block)]) for stage in stages)) for block in blocks]
    means = (sum(errors[stage].values()) / len(errors[stage]) for stage in stages)
    rows.append(("mean", *(_error_percent(mean) for mean in means)))
    return Section(
        "Reconstruction error per block",
        (
            "Squared error of each compressed MLP's output on calibration data, relative to the mean square of the "
            "dense output: 100 % is as bad as an output of zeros.",
        ),
        (Table(("block", *(STAGE_NAMES[stage] for stage in stages)), tuple(rows), total=True),),
        plot="reconstruction",
        plot_description="Relative reconstruction error per block, one line per stage, logarithmic axis",
    )


_COMPARISONS = {
    "native_vs_torch": "ONNX Runtime, native kernels, against PyTorch",
    "portable_vs_torch": "ONNX Runtime, portable functions, against PyTorch",
    "native_vs_portable": "native kernels against portable functions",
}


def _parity(report: Report) -> Section:
    parity = report["parity"]
    failures = _parity_failures(report)
    rows = []
    for key, name in _COMPARISONS.items():
        difference = parity[key]  # type: ignore[literal-required]
        agreement = "no" if name in failures else "yes"
        rows.append((name, agreement, format_error(difference["max_abs"]), format_error(difference["relative"])))
    same = "All" if parity["same_predictions"] else "Not all"
    return Section(
        "Parity",
        (
            f"The same model run three ways. Allowed difference: {format_error(parity['tolerance'])} of the largest "
            f"logit. {same} predictions are the same with and without the native library.",
        ),
        (
            Table(
                ("comparison", "within tolerance", "largest difference of logits", "of the largest logit"),
                tuple(rows),
                2,
            ),
        ),
    )


def _parity_failures(report: Report) -> list[str]:
    parity = report["parity"]
    return [name for key, name in _COMPARISONS.items() if parity[key]["relative"] > parity["tolerance"]]  # type: ignore[literal-required]


def _speed(report: Report) -> Section:
    speed, memory = report["speed"], report["memory"]
    rows = [
        (row["backend"], f"{row['images_per_second']:,.0f}", f"{row['ratio_to_float32']:.2f} ×")
        for row in speed["rows"]
    ]
    return Section(
        "Speed and memory",
        (
            f"Batches of {speed['batch']}, {_count(speed['threads'], 'thread')}, on {report['hardware']['cpu']}. "
            "A ratio below 1 is slower than the dense float32 model.",
        ),
        (
            Table(("backend", speed["unit"], "of dense float32"), tuple(rows)),
            Table(
                ("resident memory", "size"),
                (
                    ("after loading the artefact", format_bytes(memory["load_rss_bytes"])),
                    ("peak while running the artefact", format_bytes(memory["peak_rss_bytes"])),
                    ("peak of the compression run", format_bytes(memory["pipeline_peak_rss_bytes"])),
                ),
            ),
        ),
    )


def _run(report: Report) -> Section:
    model, data, hardware = report["model"], report["data"], report["hardware"]
    reused = set(report["reused_stages"])
    seconds = [
        (stage, "earlier run" if stage in reused else "this run", format_seconds(value))
        for stage, value in report["seconds"].items()
    ]
    seconds.append(("sum", "", format_seconds(sum(report["seconds"].values()))))
    origin = (
        ("model", f"{model['name']} ({model['model_type']}), {model['source']}"),
        ("parameters", f"{model['parameters']:,}, of them {model['mlp_parameters']:,} in MLPs"),
        ("data", data["source"]),
        (
            "samples",
            f"{data['train_samples']:,} to train, {data['calibration_samples']:,} to calibrate, "
            f"{data['test_samples']:,} to test",
        ),
        ("hash of the data", data["hash"]),
        (
            "machine",
            f"{hardware['cpu']}, {_count(hardware['cores'], 'core')}, {format_bytes(hardware['memory_bytes'])} memory",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    )
    return Section(
        "The run",
        (),
        (Table(("stage", "computed in", "time"), tuple(seconds), 2, total=True), Table(("origin", ""), origin, 2)),
    )


# --- text ------------------------------------------------------------------------------------------------------


def block_runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of every run of consecutive block indices, sorted."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][1] == block - 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return runs


def format_blocks(blocks: Iterable[int]) -> str:
    """Block indices as ranges: ``0–3, 7``."""
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in block_runs(blocks))


def name_blocks(blocks: Collection[int]) -> str:
    return f"block{'' if len(blocks) == 1 else 's'} {format_blocks(blocks)}"


def _bits_text(entries: dict[str, int]) -> str:
    return ", ".join(f"{bits} × {count:,}" for bits, count in entries.items() if count)


def _error_percent(value: float) -> str:
    """A relative error in per cent with two significant digits, never in exponents."""
    decimals = next((digits for digits, limit in enumerate((0.0995, 0.00995, 0.000995)) if value >= limit), 3)
    return format_percent(value, decimals)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
