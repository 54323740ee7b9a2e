"""Where the time of a generated token goes, node by node: ``python -m benchmarks.decode FOLDER``.

One decode step of a language model's artefact in plain ONNX Runtime with its profiler, on caches that the step writes
into where they are, as onnxruntime-genai lets it. The profiler takes a microsecond or more of every node, which is why
the whole step is measured without it, too.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime

import fips_ort
from fips_ort.errors import ArtifactError
from fips_ort.manifest import read_manifest
from pipeline.evaluation.turns import interleave
from pipeline.plumbing.errors import InputError

_NAMED = ("MatMulNBits", "QMatMul", "SparseQMatMul", "BitmapQMatMul")
"""Ops that are told apart by what they multiply with."""
_KERNEL = "_kernel_time"
_ROOM = 1024
"""Tokens for which the caches have room, at least."""


@dataclass(frozen=True, slots=True)
class OpTime:
    """Nodes of one kind: how many a step runs, and the milliseconds that they take together, the profiler's included
    (medians over steps)."""

    kind: str
    nodes: int
    milliseconds: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """A decode step: its ``ops``, longest first, and its milliseconds with and without the profiler (medians)."""

    ops: tuple[OpTime, ...]
    profiled: float
    unprofiled: float

    @property
    def nodes(self) -> int:
        return sum(op.nodes for op in self.ops)

    @property
    def between(self) -> float:
        """Milliseconds of the profiled step in which no node runs."""
        return self.profiled - sum(op.milliseconds for op in self.ops)


class DecodeStep:
    """A session that reads one token behind ``past`` others; calling it runs the step. ``profile``: the prefix of the
    file into which it is profiled."""

    def __init__(self, model: Path, threads: int, past: int, profile: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        fips_ort.register(options)
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._binding = self.session.io_binding()
        random = np.random.default_rng(0)
        for value in self.session.get_inputs():
            if value.name == "input_ids":
                self._bind(value.name, np.zeros((1, 1), np.int64))
            elif value.name == "attention_mask":
                self._bind(value.name, np.ones((1, past + 1), np.int64))
            else:
                shape = (1, value.shape[1], max(_ROOM, past + 1), value.shape[3])
                cache = self._bind(value.name, random.standard_normal(shape, np.float32))
                self._binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), cache)
        self._binding.bind_output("logits")

    def __call__(self) -> None:
        self.session.run_with_iobinding(self._binding)

    def _bind(self, name: str, array: np.ndarray) -> onnxruntime.OrtValue:
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_input(name, value)
        return value


def profile_step(model: Path, threads: int, past: int, seconds: float) -> StepProfile:
    """Run the decode step of a graph with and without the profiler in turns, for about ``seconds``."""
    with tempfile.TemporaryDirectory() as temporary:
        steps = {
            "profiled": DecodeStep(model, threads, past, Path(temporary) / "step"),
            "unprofiled": DecodeStep(model, threads, past),
        }
        runs: dict[str, Callable[[], object]] = dict(steps)
        for run in runs.values():
            run()
        times = interleave(runs, seconds)
        events = json.loads(Path(steps["profiled"].session.end_profiling()).read_text(encoding="utf-8"))
    return StepProfile(
        op_times(events), profiled=1e3 * median(times["profiled"]), unprofiled=1e3 * median(times["unprofiled"])
    )


def op_times(events: Sequence[dict]) -> tuple[OpTime, ...]:
    """Add up ONNX Runtime's profile ``events`` of several runs by kind of node, longest first."""
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run")
    kernels = sorted((event["ts"], event["dur"], kind_of(event)) for event in events if event["name"].endswith(_KERNEL))
    in_runs: list[dict[str, list[float]]] = [{} for _ in runs]
    place = 0
    for start, duration, kind in kernels:
        while place < len(runs) - 1 and start >= runs[place][1]:
            place += 1
        in_runs[place].setdefault(kind, []).append(duration / 1e3)
    kinds = in_runs[-1] if in_runs else {}
    ops = [OpTime(kind, len(kinds[kind]), median(sum(run.get(kind, ())) for run in in_runs)) for kind in kinds]
    return tuple(sorted(ops, key=lambda op: -op.milliseconds))


def kind_of(event: dict) -> str:
    """The op of a node that was profiled, with the weight's name if it is a product."""
    op = str(event["args"]["op_name"])
    if op not in _NAMED:
        return op
    return f"{op} {re.split(r'[./]', event['name'].removesuffix(_KERNEL))[-1]}"


def format_profile(profile: StepProfile) -> str:
    """A table of the step, by kind of node, in Markdown."""
    lines = ["| | nodes | ms | µs a node |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {op.kind} | {op.nodes} | {op.milliseconds:.3f} | {1e3 * op.milliseconds / op.nodes:.1f} |"
        for op in profile.ops
    ]
    lines.append(f"| between nodes | | {profile.between:.3f} | {1e3 * profile.between / profile.nodes:.1f} |")
    lines.append(f"| whole, profiled | {profile.nodes} | {profile.profiled:.2f} | |")
    lines.append(f"| whole, not profiled | | {profile.unprofiled:.2f} | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description="Where a token's time goes")
    parser.add_argument("folder", type=Path, help="folder of a language model's artefact")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--past", type=int, default=130, help="tokens before the one that is generated")
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long to measure each number of threads")
    options = parser.parse_args(arguments)
    try:
        manifest = read_manifest(options.folder)
        if "input_ids" not in manifest.golden.inputs:
            raise InputError(f"{options.folder}: not a language model's artefact, it reads no input_ids")
    except (ArtifactError, InputError) as error:
        print(error, file=sys.stderr)
        return 2
    for threads in options.threads:
        profile = profile_step(options.folder / manifest.model, threads, options.past, options.seconds)
        print(f"\n{threads} thread{'s' * (threads > 1)}, {options.past} tokens of past\n\n{format_profile(profile)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
