"""What a report says in words and tables: pure functions from a report to sections, the same for every format."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import yaml

from pipeline.evaluation.measurements import (
    FACTOR_STAGES,
    Agreement,
    ImageSpeed,
    LogitDifference,
    PerplexityByStage,
    Stage,
    TextDivergence,
    TextSamples,
    TokenSpeed,
)
from pipeline.report.measures import Measure, measure_of
from pipeline.report.schema import Report, RestWeight
from pipeline.report.units import (
    format_bytes,
    format_error,
    format_percent,
    format_rate,
    format_ratio,
    format_seconds,
)

Plot = Literal["stages", "bytes", "spectrum", "reconstruction"]

_STAGE_NAMES: dict[Stage, str] = {
    "dense": "dense",
    "factorized": "factorized",
    "fitted": "fitted",
    "finetuned": "finetuned",
    "rounded": "rounded",
    "qat": "quantized (QAT)",
    "onnx_native": "ONNX, native kernels",
    "onnx_portable": "ONNX, portable functions",
}
_LIKE_TRAINING_TEXT = 0.8
"""Part of the test text that the training text's frequent tokens make up, at least, if both are alike: of the training
text itself they make up 0.9."""
_START_NAMES = {"nearest": "nearest", "gptq": "GPTQ"}
_METHOD_NAMES = {
    "fips": "FiPS (shared bases and projections)",
    "dense": "dense MLPs (quantized without factorization)",
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
class PageSection:
    """A section of the page. ``notes`` follow the tables; ``plot`` is shown between the introduction and the tables."""

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


def stage_name(report: Report, stage: Stage) -> str:
    """Name a stage; codes before training are named by how they were found."""
    name = _STAGE_NAMES[stage]
    return f"{name} ({_START_NAMES[report.compression.start]})" if stage == "rounded" else name


def subtitle(report: Report) -> str:
    """The method and the model in one line."""
    compression, model = report.compression, report.model
    bits = {int(bits) for group in report.groups for bits in (*group.basis_bits, *group.projection_bits)}
    width = f"{min(bits)}-bit" if len(bits) == 1 else f"{min(bits)}- to {max(bits)}-bit"
    return (
        f"{_METHOD_NAMES[compression.method]}, {width} codes, {_START_NAMES[compression.start]} start · "
        f"{model.model_type}, {model.parameters:,} parameters, {model.source}"
    )


def verdict(report: Report) -> str:
    """The run in one line: share of the dense float16 model's bytes, quality before and after."""
    sizes, measure = report.bytes, measure_of(report)
    share = format_percent(sizes.artifact / sizes.dense_float16, 0)
    return f"{share} of the float16 bytes, {measure.name} {measure.value('dense')} → {measure.value('onnx_native')}"


def verdict_detail(report: Report) -> str:
    """The verdict's difference beside the standard error it was measured with."""
    measure = measure_of(report)
    return f"Measured on the artefact itself with {measure.extent}: {measure.against_dense('onnx_native')}."


def key_figures(report: Report) -> list[KeyFigure]:
    sizes, bits, measure = report.bytes, report.bits_per_weight, measure_of(report)
    return [
        KeyFigure(
            "Artefact", format_bytes(sizes.artifact), f"dense float16: {format_bytes(sizes.dense_float16)}"
        ),
        KeyFigure(measure.name.capitalize(), measure.value("onnx_native"), measure.context("onnx_native")),
        KeyFigure("Bits per MLP weight", f"{bits.stored:.2f}", f"stored; paper bits: {bits.paper:.2f}"),
        _speed_figure(report),
        KeyFigure("Cost of the run", format_seconds(sum(report.seconds.values())), _resources(report)),
    ]


def _speed_figure(report: Report) -> KeyFigure:
    speed = report.speed
    if isinstance(speed, ImageSpeed):
        if speed.ratio_to_dense is None:
            return KeyFigure("Speed, images/s", f"{speed.rate:,.0f}", "dense float32 was not measured")
        return KeyFigure("Speed", f"{speed.ratio_to_dense:.2f} ×", "of dense float32")
    row = speed.rows[0]
    beside = f"{_times(speed.ratio_to_dense)} onnxruntime-genai int4"
    prefill = f"prefill: {format_rate(row.prefill_tokens_per_second)} tokens/s"
    return KeyFigure("Decoding, tokens/s", format_rate(row.decode_tokens_per_second), f"{beside}; {prefill}")


def _resources(report: Report) -> str:
    peak = format_bytes(report.memory.pipeline_peak_rss_bytes)
    return f"{peak} memory, {format_bytes(report.disk_bytes)} disk"


def sections(report: Report) -> list[PageSection]:
    """All sections in the order of the page."""
    return [
        _quality(report),
        _size(report),
        _groups(report),
        *([_rest_weights(report)] if report.rest_weights else []),
        _reconstruction(report),
        _parity(report),
        _speed(report),
        _cost(report),
        _origin(report),
    ]


def recipe_text(report: Report) -> str:
    """The whole recipe as YAML."""
    return yaml.safe_dump(report.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip()


def warning_lines(report: Report) -> list[str]:
    """The run's warnings, and what the figures themselves warn of."""
    lines = list(report.warnings)
    lines += [f"Left out of the measurements: {name} ({why})." for name, why in report.speed.left_out.items()]
    if not report.parity.same_predictions:
        lines.append("The artefact's native kernels and portable functions do not give the same predictions.")
    lines += [f"{name}: the logits differ by more than the tolerance." for name in _parity_failures(report.parity)]
    quality = report.quality
    if isinstance(quality, PerplexityByStage) and quality.frequent_tokens < _LIKE_TRAINING_TEXT * quality.tokens:
        share = format_percent(quality.frequent_tokens / quality.tokens)
        lines.append(
            f"The test text is unlike the training text: tokens that make up 90 % of the one make up {share} of the "
            "other. The model was compressed for other text than it was measured on."
        )
    if report.bytes.artifact >= report.bytes.dense_float16:
        lines.append("The artefact is not smaller than the dense model stored as float16.")
    return lines


# --- sections --------------------------------------------------------------------------------------------------


def _quality(report: Report) -> PageSection:
    sizes, measure = report.stage_bytes, measure_of(report)
    stages = report.stages
    rows = [
        (
            stage_name(report, stage),
            *measure.cells(stage, _stage_before(stage, stages)),
            format_bytes(sizes[stage]),
            format_percent(sizes[stage] / sizes["dense"]),
        )
        for stage in stages
    ]
    notes = [
        f"{measure.note} {_both_forms(stages)}Before quantization, bytes are counted as stored in float16; from then "
        "on the rest of the model, too, is as it is stored."
    ]
    tables = [Table(("stage", *measure.header, "whole model", "of dense"), tuple(rows))]
    divergence = report.divergence
    same = format_percent(divergence.same_top1)
    if isinstance(divergence, TextDivergence):
        header = ("KL divergence from the dense model", "mean", "median", "90 %", "99 %", "99.9 %", "largest")
        nats = (format_error(value) for value in (divergence.kl_mean, *divergence.percentiles))
        tables.append(Table(header, (("nats per token", *nats),)))
        notes.append(f"The artefact and the dense model have the same most likely next token for {same} of the tokens.")
        assert isinstance(report.quality, PerplexityByStage)
        tables.append(_by_frequency(report, report.quality))
        notes += _about_tokens(report, report.quality, divergence)
    else:
        notes.append(
            f"Against the dense model the artefact gives the same top label for {same} of the samples; KL divergence "
            f"{format_error(divergence.kl_mean)} nats on average, {format_error(divergence.kl_p99)} nats at the "
            "99th percentile."
        )
    return PageSection(
        f"{measure.name.capitalize()} and bytes per stage",
        (_where_it_went(measure, stages, _is_sparse(report)),),
        tuple(tables),
        tuple(notes),
        "stages",
        f"{measure.name.capitalize()} with its standard error and bytes of the whole model, per stage",
    )


def _by_frequency(report: Report, quality: PerplexityByStage) -> Table:
    """Bits per byte, and perplexities of the training text's frequent tokens and of all others."""
    rows = []
    for stage in report.stages:
        row = [stage_name(report, stage), f"{quality.bits_per_byte[stage]:.4f}"]
        if quality.by_frequency:
            own, dense = quality.by_frequency[stage], quality.by_frequency["dense"]
            for value, of_dense in ((own.frequent, dense.frequent), (own.rare, dense.rare)):
                row += [f"{value:.4g}", "–" if stage == "dense" else format_ratio(value / of_dense)]
        rows.append(tuple(row))
    columns = ("frequent tokens", "× dense", "rare tokens", "× dense") if quality.by_frequency else ()
    return Table(("stage", "bits per byte", *columns), tuple(rows))


def _about_tokens(report: Report, quality: PerplexityByStage, divergence: TextDivergence) -> list[str]:
    """Say which tokens are frequent, and what tokens are where the vocabulary was cut."""
    notes = []
    if quality.by_frequency:
        share = format_percent(quality.frequent_tokens / quality.tokens)
        notes.append(
            "Frequent tokens are the most frequent ones of the training text, which make up 90 % of it, and "
            f"{share} of the test text; all others are rare. Text unlike the training text, in another script or code, "
            "is mostly of rare ones."
        )
    if report.recipe.vocabulary is not None:
        notes.append(
            "Perplexities and their ratios count tokens of the whole vocabulary at every stage. KL divergence is from "
            f"the dense model's distribution over the kept tokens, at {divergence.tokens:,} of {quality.tokens:,} "
            "tokens: those that both models predict at the same place."
        )
    return notes


def _where_it_went(measure: Measure, stages: list[Stage], sparse: bool) -> str:
    """Say what factorization, quantization and export each changed."""
    unquantized = [stage for stage in stages if stage in ("dense", *FACTOR_STAGES)][-1]
    quantization = measure.change("qat", unquantized)
    if "rounded" in stages:
        start, training = measure.change("rounded", unquantized), measure.change("qat", "rounded")
        quantization += f" (codes before training {start}, training {training})"
    steps = [f"quantization {quantization}", f"export {measure.change('onnx_native', 'qat')}"]
    if unquantized != "dense":
        steps.insert(0, f"sharing{' and sparsity' if sparse else ''} {measure.change(unquantized, 'dense')}")
    return f"Where the {measure.name} went: {', '.join(steps)}."


def _is_sparse(report: Report) -> bool:
    return any(group.pattern != "dense" for group in report.groups)


def _both_forms(stages: list[Stage]) -> str:
    return "Both ONNX rows are compared with the quantized model. " if "onnx_portable" in stages else ""


def _stage_before(stage: Stage, stages: list[Stage]) -> Stage | None:
    """The stage that ``stage`` started from: both forms of the artefact come from QAT."""
    if stage == "onnx_portable":
        return "qat"
    index = stages.index(stage)
    return stages[index - 1] if index else None


def _size(report: Report) -> PageSection:
    sizes, bits = report.bytes, report.bits_per_weight
    total = sizes.artifact
    factorized = report.compression.method == "fips"
    parts = parts_of(report)
    rows = [(name, format_bytes(size), format_percent(size / total)) for name, size in (*parts, ("artefact", total))]
    mlp_share = format_percent(sizes.mlp_stored / sizes.mlp_dense_float16)
    return PageSection(
        "Size",
        (
            f"The MLPs take {format_bytes(sizes.mlp_stored)} instead of {format_bytes(sizes.mlp_dense_float16)} "
            f"in float16 ({mlp_share}), the whole artefact {format_bytes(total)} instead of "
            f"{format_bytes(sizes.dense_float16)} ({format_percent(total / sizes.dense_float16)}).",
        ),
        (
            Table(
                ("bits per weight of the dense MLPs", "what is counted", "bits"),
                (
                    (
                        "paper bits",
                        "Values only, as the paper counts: "
                        + (
                            "the codes of the shared bases and of the kept entries of the projections; neither scales "
                            "nor which entries are kept."
                            if factorized
                            else "the codes, without their scales."
                        ),
                        f"{bits.paper:.2f}",
                    ),
                    (
                        "stored bits",
                        "Every byte the file spends on these weights: codes"
                        + (", scales, sparsity patterns and the shared bases." if factorized else " and scales."),
                        f"{bits.stored:.2f}",
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


def parts_of(report: Report) -> list[tuple[str, int]]:
    """The parts of the artefact that it has, largest first."""
    parts = [(name, size) for name, size in report.bytes.by_part.items() if size]
    return sorted(parts, key=lambda part: (-part[1], part[0]))


def _groups(report: Report) -> PageSection:
    if report.compression.method == "dense":
        return _quantized_blocks(report)
    rows = [
        (
            group.name,
            format_blocks(group.blocks),
            _bits_text(group.basis_bits),
            _bits_text(group.projection_bits),
            group.pattern,
            f"{group.width:,}",
            f"{group.columns:,}",
            f"{rank:,}",
            f"{rank / group.width:.2f}",
        )
        for group in report.groups
        if (rank := group.rank) is not None
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
    notes += _left_dense(report)
    return PageSection(
        "Groups and their spectra",
        (
            "The blocks of a group share one basis U [d, r]; each MLP matrix has its own "
            f"{'sparse ' if _is_sparse(report) else ''}projection. The spectra are those of the concatenated MLP "
            "matrices W of a group, before the fit.",
        ),
        (Table(header, tuple(rows), text_columns=5),),
        tuple(notes),
        "spectrum",
        "Singular values of every group, its rank marked",
    )


def _quantized_blocks(report: Report) -> PageSection:
    """Describe the blocks of method dense, those that are alike in one row."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for group in report.groups:
        cells = (", ".join(group.projection_bits), f"{group.width:,}", f"{group.columns:,}")
        alike.setdefault(cells, []).extend(group.blocks)
    return PageSection(
        "Quantized MLPs",
        ("No factorization: every MLP matrix of a block is quantized as it is.",),
        (
            Table(
                ("blocks", "bits", "width", "columns"),
                tuple((format_blocks(blocks), *cells) for cells, blocks in alike.items()),
            ),
        ),
        ("Columns: those of all MLP matrices of a block together.", *_left_dense(report)),
    )


def _left_dense(report: Report) -> list[str]:
    return [f"Left dense: {name_blocks(report.dense_blocks)}."] if report.dense_blocks else []


def _rest_weights(report: Report) -> PageSection:
    """Describe the packed weights outside the MLPs, those of one kind and equal bits in one row."""
    alike: dict[tuple[str, str], list[RestWeight]] = {}
    for weight in report.rest_weights:
        kind = re.sub(r"\.\d+(?=\.)", ".*", weight.name)
        bits = ", ".join(weight.bits) if len(weight.bits) == 1 else _bits_text(weight.bits)
        alike.setdefault((kind, bits), []).append(weight)
    rows = tuple(
        (kind, bits, _numbers_of(weights), f"{len(weights):,}", format_bytes(sum(weight.bytes for weight in weights)))
        for (kind, bits), weights in sorted(alike.items())
    )
    return PageSection(
        "Weights outside the MLPs",
        ("What is stored as codes outside the MLPs, scales counted.",),
        (Table(("weight", "bits", "layers", "weights", "size"), rows, text_columns=3),),
        ("Of a table in tiers: bits × rows (tokens).",) if any(len(w.bits) > 1 for w in report.rest_weights) else (),
    )


def _numbers_of(weights: Iterable[RestWeight]) -> str:
    """The numbers in the names of weights of one kind, the first of each, as ranges; a dash where there are none."""
    found = (re.search(r"\.(\d+)\.", weight.name) for weight in weights)
    return format_blocks(int(match[1]) for match in found if match) or "–"


def _reconstruction(report: Report) -> PageSection:
    errors = report.reconstruction_error
    stages = report.trained_stages
    blocks = sorted(int(block) for block in errors["qat"])
    rows = [(str(block), *(_error_percent(errors[stage][str(block)]) for stage in stages)) for block in blocks]
    means = (sum(errors[stage].values()) / len(errors[stage]) for stage in stages)
    rows.append(("mean", *(_error_percent(mean) for mean in means)))
    return PageSection(
        "Reconstruction error per block",
        (
            "Squared error of each compressed MLP's output on calibration data, relative to the mean square of the "
            "dense output: 100 % is as bad as an output of zeros.",
        ),
        (Table(("block", *(stage_name(report, stage) for stage in stages)), tuple(rows), total=True),),
        plot="reconstruction",
        plot_description="Relative reconstruction error per block, one line per stage, logarithmic axis",
    )


def _parity(report: Report) -> PageSection:
    parity = report.parity
    failures = _parity_failures(parity)
    rows = [
        (
            name,
            "no" if name in failures else "yes",
            format_error(difference.max_abs),
            format_error(difference.relative),
        )
        for name, difference in _comparisons(parity).items()
    ]
    same = "All" if parity.same_predictions else "Not all"
    predictions = "predictions" if report.quality.metric == "accuracy" else "most likely next tokens"
    return PageSection(
        "Parity",
        (
            f"The same model run three ways. Allowed difference: {format_error(parity.tolerance)} of the largest "
            f"logit. {same} {predictions} are the same with and without the native library.",
        ),
        (
            Table(
                ("comparison", "within tolerance", "largest difference of logits", "of the largest logit"),
                tuple(rows),
                2,
            ),
        ),
    )


def _comparisons(parity: Agreement) -> dict[str, LogitDifference]:
    return {
        "ONNX Runtime, native kernels, against PyTorch": parity.native_vs_torch,
        "ONNX Runtime, portable functions, against PyTorch": parity.portable_vs_torch,
        "native kernels against portable functions": parity.native_vs_portable,
    }


def _parity_failures(parity: Agreement) -> list[str]:
    return [
        name for name, difference in _comparisons(parity).items() if difference.relative > parity.tolerance
    ]


def _speed(report: Report) -> PageSection:
    speed, memory = report.speed, report.memory
    load, comparison, table = _image_speed(speed) if isinstance(speed, ImageSpeed) else _token_speed(speed)
    threads = _count(speed.threads, "thread")
    if resident := memory.load_rss_by_backend:
        cells = (format_bytes(resident[name]) if (name := row[0]) in resident else "–" for row in table.rows)
        rows = tuple((*row, cell) for row, cell in zip(table.rows, cells, strict=True))
        table = Table((*table.header, "memory after loading"), rows)
    tables, notes = [table], []
    if isinstance(speed, TokenSpeed) and speed.read_bytes_per_second is not None:
        tables.append(_token_reads(speed, memory.run_rss_by_backend or {}))
        notes.append(
            "Weights of a token: the stored bytes that it needs, each once, of a table that is only looked up in one "
            f"row. A plain read loop over the artefact's reads {format_bytes(speed.read_bytes_per_second)} a second on "
            "as many threads; the last column is its time for these bytes as a share of the token's time."
        )
    resident_rows = [
        ("after loading the artefact", format_bytes(memory.load_rss_bytes)),
        ("peak while running the artefact", format_bytes(memory.peak_rss_bytes)),
    ]
    if memory.base_rss_bytes is not None:
        resident_rows.append(("a process with onnxruntime-genai and no model", format_bytes(memory.base_rss_bytes)))
        notes.append(
            "Memory after loading and while generating, by backend: on top of a process with onnxruntime-genai. "
            "Weights that are mapped from files count once they have been read."
        )
    tables.append(Table(("resident memory", "size"), tuple(resident_rows)))
    return PageSection(
        "Speed and memory",
        (f"{load}, {threads}, on {report.hardware.cpu}. A ratio below 1 is slower than {comparison}.",),
        tuple(tables),
        tuple(notes),
    )


def _times(ratio: float | None) -> str:
    """Write a ratio to a baseline, a dash where there is none."""
    return "–" if ratio is None else f"{ratio:.2f} ×"


def _image_speed(speed: ImageSpeed) -> tuple[str, str, Table]:
    """Return what was run, what it is compared with, and the table."""
    rows = [
        (row.backend, f"{row.images_per_second:,.0f}", _times(row.ratio_to_float32))
        for row in speed.rows
    ]
    table = Table(("backend", speed.unit, "of dense float32"), tuple(rows))
    return f"Batches of {speed.batch}", "the dense float32 model", table


def _token_speed(speed: TokenSpeed) -> tuple[str, str, Table]:
    """Return what was run, what it is compared with, and the table."""
    rows = [
        (
            row.backend,
            format_rate(row.prefill_tokens_per_second),
            _times(row.prefill_ratio_to_int4),
            format_rate(row.decode_tokens_per_second),
            _times(row.decode_ratio_to_int4),
        )
        for row in speed.rows
    ]
    load = f"A prompt of {speed.prompt_tokens:,} tokens, then {speed.generated_tokens:,} generated"
    table = Table(("backend", "prefill, tokens/s", "of int4", "decode, tokens/s", "of int4"), tuple(rows))
    return load, "the same model exported by onnxruntime-genai's builder at int4", table


def _token_reads(speed: TokenSpeed, run_rss: Mapping[str, int]) -> Table:
    """What loading takes, and how near a token comes to a plain read of its weights."""
    rows = [
        (
            row.backend,
            "–" if row.load_seconds is None else format_seconds(row.load_seconds),
            format_bytes(run_rss[row.backend]) if row.backend in run_rss else "–",
            "–" if row.weight_bytes is None else format_bytes(row.weight_bytes),
            "–" if row.read_fraction is None else format_percent(row.read_fraction, 0),
        )
        for row in speed.rows
    ]
    header = ("backend", "loading", "memory while generating", "weights of a token", "of a plain read")
    return Table(header, tuple(rows))


def _cost(report: Report) -> PageSection:
    reused = set(report.reused_stages)
    memory = report.memory
    stages = [
        (
            stage,
            "earlier run" if stage in reused else "this run",
            format_seconds(seconds),
            format_bytes(memory.peak_rss_by_stage[stage]),
        )
        for stage, seconds in report.seconds.items()
    ]
    total, peak = format_seconds(sum(report.seconds.values())), format_bytes(memory.pipeline_peak_rss_bytes)
    stages.append(("whole run", "", total, peak))
    return PageSection(
        "Cost of the run",
        (),
        (
            Table(
                ("cost", "amount"),
                (
                    ("time", total),
                    ("peak of resident memory", peak),
                    ("disk, the work folder", format_bytes(report.disk_bytes)),
                ),
            ),
            Table(("stage", "computed in", "time", "peak of resident memory"), tuple(stages), 2, total=True),
        ),
    )


def _origin(report: Report) -> PageSection:
    model, data, hardware = report.model, report.data, report.hardware
    if isinstance(data, TextSamples):
        samples = (
            f"windows of {data.context:,} tokens",
            f"{data.train_samples:,} to train ({data.train_tokens:,} tokens), {data.calibration_samples:,} to "
            f"calibrate ({data.calibration_tokens:,}), {data.test_samples:,} to test ({data.test_tokens:,})",
        )
    else:
        samples = (
            "samples",
            f"{data.train_samples:,} to train, {data.calibration_samples:,} to calibrate, "
            f"{data.test_samples:,} to test",
        )
    origin = (
        ("model", f"{model.name} ({model.model_type}), {model.source}"),
        ("parameters", f"{model.parameters:,}, of them {model.mlp_parameters:,} in MLPs"),
        ("method", _METHOD_NAMES[report.compression.method]),
        ("data", data.source),
        samples,
        ("hash of the data", data.hash),
        (
            "machine",
            f"{hardware.cpu}, {_count(hardware.cores, 'core')}, {format_bytes(hardware.memory_bytes)} memory",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    )
    return PageSection("Where it comes from", (), (Table(("origin", ""), origin, 2),))


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
    """Write a relative error in per cent with two significant digits, never in exponents."""
    decimals = next((digits for digits, limit in enumerate((0.0995, 0.00995, 0.000995)) if value >= limit), 3)
    return format_percent(value, decimals)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
