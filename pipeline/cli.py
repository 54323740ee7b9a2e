"""The command ``fips``. Exit status 0: done; 1: failed; 2: bad input, with one clear message."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fips_ort.errors import ArtifactError
from pipeline.plumbing.console import table_console
from pipeline.plumbing.engines import Engine
from pipeline.plumbing.environment import prepare_process
from pipeline.plumbing.errors import InputError, StageError, UnforeseenError, describe_unforeseen
from pipeline.plumbing.output import forgiving_output
from pipeline.plumbing.progress import Progress
from pipeline.recipe.reading import load_recipe
from pipeline.recipe.schema import user_path

app = typer.Typer(
    name="fips",
    help="Compress a transformer's MLPs by fine-grained parameter sharing, train the factors at 2 to 4 bits, "
    "export to ONNX with custom ops, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _path(text: str) -> Path:
    """A path; shells leave the ``~`` of ``--out=~/runs`` as it is."""
    try:
        return Path(user_path(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}") from None


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", parser=_path, help="recipe file (YAML)")]
ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTEFACT", parser=_path, help="folder of an artefact")]
SetOptions = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a recipe's key")]
EngineName = Annotated[Engine, typer.Option(help="ray: the cluster at RAY_ADDRESS, or one on this machine")]
TrustLibraries = Annotated[
    bool,
    typer.Option(
        "--trust-libraries",
        help="load the native libraries that a folder's genai_config.json names, which runs their code; else the "
        "installed one takes their place",
    ),
]
Threads = Annotated[int, typer.Option(min=0, help="threads of ONNX Runtime; 0: all cores")]


@app.command()
def plan(recipe: RecipePath, overrides: SetOptions = None) -> None:
    """Show ranks, bytes, memory, disk and time of a run, without computing any weight."""
    loaded = load_recipe(recipe, overrides)
    from pipeline.estimate import estimate
    from pipeline.estimate.printing import print_estimate

    print_estimate(loaded, estimate(loaded, fetch=True))


@app.command()
def run(
    recipe: RecipePath,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", parser=_path, help="folder for artefact and report; default runs/NAME"),
    ] = None,
    overrides: SetOptions = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="use no result of an earlier run")] = False,
    shared: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=_path,
            help="folder in which runs leave results for others that have stages in common",
        ),
    ] = None,
    engine: EngineName = "local",
) -> None:
    """Run a recipe: from the model to a validated ONNX artefact and a report. Resumes where it was stopped."""
    loaded = load_recipe(recipe, overrides)
    from pipeline.run import ARTIFACT
    from pipeline.run import run as run_recipe

    folder = out or Path("runs") / loaded.name
    try:
        report = run_recipe(loaded, folder, Progress(), fresh=fresh, shared=shared, engine=engine)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        raise
    from pipeline.report.sections import verdict, verdict_detail

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{verdict(report)}\n{verdict_detail(report)}")
    console.print(f"artefact  {folder / ARTIFACT}\nreport    {folder / 'report.html'}")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", parser=_path, help="sweep file (YAML)")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", parser=_path, help="folder for points and results; default runs/sweeps/NAME"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="points side by side; 0: as many as the sweep's threads allow")] = 0,
    engine: EngineName = "local",
    fresh: Annotated[bool, typer.Option("--fresh", help="use no result of an earlier sweep")] = False,
) -> None:
    """Run every point of a sweep: bit-widths, sizes and methods against quality, as table and picture. Resumes."""
    from pipeline.sweep.definition import load_sweep

    loaded = load_sweep(file)
    at_once = jobs or max(1, (os.cpu_count() or 1) // loaded.threads if loaded.threads else 1)
    from pipeline.sweep.runner import run_sweep

    folder = out or Path("runs") / "sweeps" / loaded.name
    try:
        results = run_sweep(loaded, folder, Progress(), at_once=at_once, engine=engine, fresh=fresh)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        raise
    from pipeline.sweep.page import verdict

    console = Console(highlight=False, soft_wrap=True)
    console.print(verdict(results))
    console.print(f"{folder / 'sweep.html'}, and the same as .png, .md, .csv and .json", markup=False)
    if results.failures:
        failed = ", ".join(failure.point for failure in results.failures)
        raise StageError(f"points that could not be run: {failed}; why is in {folder / 'sweep.md'}")


@app.command()
def choose(
    sweep: Annotated[
        Path, typer.Argument(metavar="SWEEP", parser=_path, help="folder of a finished sweep, or its sweep.json")
    ],
    max_bytes: Annotated[str | None, typer.Option(help="of the whole artefact: 150MB, 1.2GB, 800kB")] = None,
    max_loss: Annotated[
        str | None, typer.Option(help="2%: points of accuracy, or per cent of the dense perplexity")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", parser=_path, help="recipe file to write; default POINT.yaml")
    ] = None,
) -> None:
    """Print the best point of a sweep within limits, and write its recipe: the best quality under --max-bytes; without
    it, the smallest artefact under --max-loss."""
    from pipeline.sweep.choose import choose_point

    chosen = choose_point(sweep, max_bytes, max_loss)
    path = out or Path(f"{chosen.recipe['name']}.yaml")
    chosen.write_recipe(path)
    print(f"{chosen.description}\n{path}: run it with `fips run {path}`")


@app.command()
def validate(artifact: ArtifactPath) -> None:
    """Prove an artefact complete, unchanged and right: manifest, hashes, golden outputs on both backends."""
    from fips_ort.validate import main as validate_main

    raise typer.Exit(validate_main([str(artifact)]))


@app.command()
def inspect(artifact: ArtifactPath) -> None:
    """List an artefact's files and packed weights: shape, bits, pattern, bytes."""
    from fips_ort.layout import BIT_WIDTHS
    from fips_ort.manifest import read_manifest

    manifest = read_manifest(artifact)
    manifest.check_files(artifact)
    table = Table("weight", "rows × columns", "bits", "pattern", "block", "bytes", "bits/entry", box=None)
    for weight in manifest.weights:
        bits = " + ".join(f"{bits}×{size}" for bits, size in zip(BIT_WIDTHS, weight.segments, strict=True) if size)
        stored = 8 * weight.bytes / (weight.rows * weight.columns)
        shape = f"{weight.rows} × {weight.columns}"
        block = str(weight.block_size)
        table.add_row(escape(weight.name), shape, bits, weight.pattern, block, f"{weight.bytes:,}", f"{stored:.2f}")
    files = Table("file", "bytes", "sha256", box=None)
    for file in manifest.files:
        files.add_row(escape(file.path), f"{file.bytes:,}", file.sha256[:16])
    console = table_console()
    console.print(table)
    console.print(files)
    console.print(f"{sum(file.bytes for file in manifest.files):,} bytes in all")


@app.command()
def bench(
    artifact: ArtifactPath,
    batch: Annotated[int | None, typer.Option(min=1, help="images in a run; default 1")] = None,
    threads: Threads = 0,
    seconds: Annotated[float | None, typer.Option(help="about how long to measure images; default 10")] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", parser=_path, help="another onnxruntime-genai folder to measure in the same run; repeatable"
        ),
    ] = None,
    trust_libraries: TrustLibraries = False,
) -> None:
    """Time an artefact, interleaved, medians: an image classifier's native kernels beside its portable functions, a
    language model beside the dense one at int4 as onnxruntime-genai's builder exports it, and other folders; with
    memory, time of loading, and how near a token comes to a plain read of its weights."""
    from fips_ort.manifest import MANIFEST, read_manifest
    from pipeline.recipe.reading import parse_recipe

    threads = threads or os.cpu_count() or 1
    manifest = read_manifest(artifact)
    manifest.check_files(artifact)
    if parse_recipe(manifest.recipe, str(artifact / MANIFEST)).is_language_model:
        if given := [name for name, value in (("--batch", batch), ("--seconds", seconds)) if value is not None]:
            raise InputError(f"{', '.join(given)}: {artifact} is a language model; only images have such options")
        _bench_tokens(artifact, threads, beside or [], trust_libraries)
    elif given := [name for name, value in (("--beside", beside), ("--trust-libraries", trust_libraries)) if value]:
        raise InputError(f"{', '.join(given)}: {artifact} is an image classifier; only language models have that")
    else:
        _bench_images(artifact, batch or 1, threads, 10.0 if seconds is None else seconds)


def _bench_images(artifact: Path, batch: int, threads: int, seconds: float) -> None:
    import numpy as np

    from fips_ort.golden import read_array
    from fips_ort.manifest import MANIFEST, read_manifest
    from fips_ort.memory import measure_memory
    from pipeline.evaluation.image_speed import artefact_sessions, seconds_per_run
    from pipeline.evaluation.measurements import NATIVE

    inputs = read_manifest(artifact).golden.inputs
    if "pixel_values" not in inputs:
        raise InputError(f"{artifact / MANIFEST}: golden: inputs: no pixel_values, which an image classifier reads")
    golden = read_array(artifact, inputs["pixel_values"])
    pixel_values = np.resize(golden, (batch, *golden.shape[1:]))
    table = Table("backend", "images/s", "ms per run", "load RSS MB", "peak RSS MB", box=None)
    for name, value in seconds_per_run(artefact_sessions(artifact, threads), pixel_values, seconds).items():
        memory = measure_memory(artifact, native=name == NATIVE)
        table.add_row(
            name,
            f"{batch / value:.1f}",
            f"{1000 * value:.2f}",
            f"{memory['load_rss_bytes'] / 1e6:.1f}",
            f"{memory['peak_rss_bytes'] / 1e6:.1f}",
        )
    console = table_console()
    console.print(f"batch {batch}, {threads} threads")
    console.print(table)


def _bench_tokens(artifact: Path, threads: int, beside: list[Path], trust_libraries: bool) -> None:
    from fips_ort.manifest import MANIFEST, read_manifest
    from pipeline.evaluation.measurements import NATIVE
    from pipeline.evaluation.text_speed import bench_recipe
    from pipeline.recipe.reading import parse_recipe

    recipe = parse_recipe(read_manifest(artifact).recipe, str(artifact / MANIFEST))
    speed, loads = bench_recipe(artifact, recipe, threads, beside, trust_libraries=trust_libraries)
    table = Table("backend", "prefill tokens/s", "decode tokens/s", "decode ratio", box=None)
    for column in ("load s", "load RSS MB", "run RSS MB", "token MB", "of a plain read"):
        table.add_column(column)
    for row in speed.rows:
        load = loads.get(row.backend)
        assert row.weight_bytes is not None
        assert row.read_fraction is not None
        table.add_row(
            row.backend,
            f"{row.prefill_tokens_per_second:.1f}",
            f"{row.decode_tokens_per_second:.1f}",
            "–" if row.decode_ratio_to_int4 is None else f"{row.decode_ratio_to_int4:.2f}",
            "–" if load is None else f"{load.seconds:.2f}",
            "–" if load is None else f"{load.load_rss_bytes / 1e6:.1f}",
            "–" if load is None else f"{load.run_rss_bytes / 1e6:.1f}",
            f"{row.weight_bytes / 1e6:.1f}",
            f"{row.read_fraction:.2f}",
        )
    assert speed.read_bytes_per_second is not None
    console = table_console()
    console.print(f"prompt of {speed.prompt_tokens} tokens, {speed.generated_tokens} generated, {threads} threads")
    console.print(table)
    console.print(
        f"RSS after loading and after two tokens: on top of {loads[NATIVE].base_rss_bytes / 1e6:.1f} MB of a process "
        f"that has imported onnxruntime-genai; token MB: weights that a token needs, of which a plain read loop reads "
        f"{speed.read_bytes_per_second / 1e9:.1f} GB/s"
    )
    for name, reason in speed.left_out.items():
        console.print(f"left out: {name} ({reason})", markup=False)


@app.command()
def generate(
    artifact: ArtifactPath,
    prompt: Annotated[str, typer.Option(help="text to go on from")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate at most")] = 128,
    trust_libraries: TrustLibraries = False,
) -> None:
    """Go on from a prompt, greedily, with onnxruntime-genai; text is printed as it comes."""
    from pipeline.generate import generate as stream

    for piece in stream(artifact, prompt, max_new_tokens, trust_libraries=trust_libraries):
        print(piece, end="", flush=True)
    print()


@app.command("eval")
def evaluate_artifact(
    artifact: ArtifactPath,
    portable: Annotated[bool, typer.Option("--portable", help="use the functions in the model")] = False,
) -> None:
    """Measure the accuracy or perplexity of an artefact on the test data of the recipe it was made from."""
    from pipeline.evaluate_artifact import evaluate_artifact as evaluate

    print(evaluate(artifact, Progress(), native=not portable))


def main() -> None:
    """Entry point: bad input is one message and exit status 2, a failed run one message and 1. Output that cannot be
    written changes neither."""
    with forgiving_output():
        try:
            prepare_process()
            app()
        except (InputError, ArtifactError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            foreseen = isinstance(error, StageError | FloatingPointError) and not isinstance(error, UnforeseenError)
            print(f"failed: {error if foreseen else describe_unforeseen(error)}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
