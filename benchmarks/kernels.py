"""Speed and memory of the native kernels beside ONNX Runtime's own: ``python -m benchmarks.kernels``.

Writes ``kernels.json`` and ``kernels.png`` and prints tables. What is compared takes turns in one process, so that
drifts of the machine's speed hit all alike; ratios are medians over turns. *Warm* weights were read a moment ago, those
of one layer; *cold* ones belong to a model that is larger than the last-level cache.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import describe_machine, last_level_cache_bytes
from benchmarks.measurement import KINDS, WEIGHTS, Comparison, Settings, measure, run_overhead
from benchmarks.memory import measure_shared_basis
from benchmarks.operands import INT8_ACTIVATIONS
from benchmarks.plot import mlp_figure
from benchmarks.shapes import SHAPES
from benchmarks.table import format_memory, format_table
from benchmarks.without_avx512 import is_hidden, run_without_avx512
from pipeline.evaluation.read_speed import READ_METHOD, read_bandwidth
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import write_aside, write_json

_CACHE_SHARE = 1.25
"""Size of a model with cold weights, in sizes of the last-level cache."""
_READ_BYTES = 1 << 30
"""Memory that is read to measure how fast that is: far more than a cache holds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parse(arguments)
    try:
        if options.without_avx512 and not is_hidden():
            return run_without_avx512("benchmarks.kernels", sys.argv[1:] if arguments is None else arguments)
        _run(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="Benchmark of the native kernels")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder for kernels.json and kernels.png")
    add("--quick", action="store_true", help="MLPs only, 1 and 16 rows, fewer rounds")
    add("--only", default="", metavar="TEXT", help="cases with this in their name, such as 'gemma2-2b mlp cold'")
    add("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    add("--threads", nargs="+", type=_positive, default=[1, 2])
    add("--rows", nargs="+", type=_positive, help="M, rows of activations; default 1 16 128")
    add("--seconds", type=float, help="about how long to measure a case, five rounds at least; default 2")
    add(
        "--accuracy-level",
        type=int,
        choices=(0, INT8_ACTIVATIONS),
        default=INT8_ACTIVATIONS,
        help="of all quantized ops: activations of float32 (0) or int8 (4, the default)",
    )
    add("--without-avx512", action="store_true", help="as on a CPU with AVX2, for ONNX Runtime's kernels and ours")
    add("--cold-bytes", type=_positive, help=f"of a cold model; default {_CACHE_SHARE} times the last-level cache")
    options = parser.parse_args(arguments)
    options.rows = options.rows or ([1, 16] if options.quick else [1, 16, 128])
    if options.seconds is None:
        options.seconds = 0.8 if options.quick else 2.0
    return options


def _run(options: argparse.Namespace) -> None:
    cache = last_level_cache_bytes()
    cold_bytes = options.cold_bytes or int(_CACHE_SHARE * (cache or 0))
    if not cold_bytes:
        raise InputError("this system does not tell the size of its last-level cache: give --cold-bytes")
    cases = [
        [case for weights in WEIGHTS if options.only in str(case := Comparison(kind, shape, weights))]
        for shape in options.shapes
        for kind in (["mlp"] if options.quick else KINDS)
    ]
    largest = max(options.shapes, key=lambda name: SHAPES[name].weights)
    with_memory = options.only in f"{largest} memory"
    if not (any(cases) or with_memory):
        raise InputError(f"--only {options.only!r}: no case has this in its name")

    bandwidth = {threads: read_bandwidth(threads, _READ_BYTES) for threads in options.threads}
    for threads, speed in bandwidth.items():
        print(f"memory is read at {speed / 1e9:.1f} GB/s with {threads} thread{'s' * (threads > 1)}", flush=True)
    settings = Settings(options.rows, options.seconds, cold_bytes, bandwidth)
    measurements = []
    for alike in filter(None, cases):  # cold and warm weights of the same variants
        variants = KINDS[alike[0].kind](SHAPES[alike[0].shape], options.accuracy_level)
        for comparison in alike:
            found = measure(comparison, variants, settings)
            print(f"\n{format_table(found)}", flush=True)
            measurements += found
    with tempfile.TemporaryDirectory() as folder:
        overhead = run_overhead(Path(folder))
        memory = measure_shared_basis(Path(folder), largest, SHAPES[largest]) if with_memory else None
    if memory:
        print(format_memory(memory))
    result = {
        "machine": describe_machine(),
        "last_level_cache_bytes": cache,
        "cold_bytes": cold_bytes,
        "accuracy_level": options.accuracy_level,
        "read_bandwidth": {
            "method": f"{READ_METHOD}, {_READ_BYTES >> 30} GiB",
            "bytes_per_second": {str(threads): speed for threads, speed in bandwidth.items()},
        },
        "run_overhead_ms": 1e3 * overhead,
        "memory": memory,
        "measurements": measurements,
    }
    write_json(options.out / "kernels.json", result)
    print(options.out / "kernels.json")
    mlps = [item for item in measurements if item["comparison"] == "mlp"]
    if mlps:
        write_aside(options.out / "kernels.png", lambda path: mlp_figure(mlps).savefig(path, format="png", dpi=150))
        print(options.out / "kernels.png")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
