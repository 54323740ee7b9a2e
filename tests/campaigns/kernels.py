"""A fuzz campaign of the native kernels, to run for as long as wanted (docs/campaigns.md).

    python tests/campaigns/kernels.py driver [--calls 1000000] [--sanitize]
    python tests/campaigns/kernels.py sessions [--nodes 10000]

``driver`` calls the kernels of every instruction set of this CPU without ONNX Runtime (tests/runtime/native),
``sessions`` through it, malformed nodes among them. Both compare with the numpy reference within the bounds of
tests/samples/kernel_bounds.py, print counts, and go on after a failure, whose case they name: ``--only SEED`` is that
case again. Exit status 1 if anything failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/samples")]

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from isa import available_isas  # noqa: E402
from kernel_bounds import expected_outputs  # noqa: E402
from kernel_cases import fuzzed_case, random_activations, random_bias, random_case, random_node  # noqa: E402
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException  # noqa: E402
from op_samples import op_model, session_options  # noqa: E402

import fips_ort  # noqa: E402

BATCH = 100
"""Sound cases in a file of the driver; half as many of anything follow them."""
SECONDS_PER_BATCH = 900


@dataclass
class Counts:
    """What a campaign has done so far."""

    cases: int = 0
    calls: int = 0
    refused: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def failed(self, campaign: str, seed: int, what: str) -> None:
        self.failures.append(f"{campaign} --only {seed}: {what}")
        print(f"FAILED {self.failures[-1]}", flush=True)

    def line(self) -> str:
        seconds = time.monotonic() - self.started
        return (f"{self.cases} cases, {self.calls} calls, {self.refused} refused, worst {self.worst:.2f} of what is "
                f"allowed, {len(self.failures)} failures, {seconds:.0f} s")


def build_driver(folder: Path, sanitize: bool) -> Path:
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if not cmake:
        raise SystemExit("cmake is needed (pip install cmake)")
    source, option = ROOT / "tests/runtime/native", f"-DFIPS_ORT_SANITIZE={'ON' if sanitize else 'OFF'}"
    subprocess.run([cmake, "-S", source, "-B", folder, option], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", folder, "--target", "driver", "-j", "2"], check=True, stdout=subprocess.DEVNULL)
    return folder / "driver"


def run_driver(driver: Path, cases: Path, seeds: list[int], counts: Counts) -> None:
    """Adds what the driver says about a file with a case of each seed, and others after them."""
    try:
        result = subprocess.run([driver, cases, *available_isas()], capture_output=True, text=True, check=False,
                                timeout=SECONDS_PER_BATCH)
    except subprocess.TimeoutExpired:
        return counts.failed("driver", seeds[0], f"hangs, or a case of the {len(seeds)} after it")
    for number, what in re.findall(r"^case (\d+): (.*)$", result.stderr, re.M):
        counts.failed("driver", seeds[min(int(number), len(seeds) - 1)], what)
    for line in result.stdout.splitlines():
        _, sound, calls, refused, worst = line.split()
        counts.cases += int(sound)
        counts.calls += int(calls)
        counts.refused += int(refused)
        counts.worst = max(counts.worst, float(worst))
    if result.returncode not in (0, 1):
        where = f"there or in a case of the {len(seeds)} after it"
        counts.failed("driver", seeds[0], f"status {result.returncode} {where}: {result.stderr[-2000:]}")
    return None


def driver_campaign(options: argparse.Namespace) -> Counts:
    counts = Counts()
    with tempfile.TemporaryDirectory() as temporary:
        driver = options.driver or build_driver(Path(temporary) / "build", options.sanitize)
        cases = Path(temporary) / "cases"
        for seeds in batches(options):
            rng = np.random.default_rng(seeds[0])
            others = [] if options.only is not None else [fuzzed_case(rng) for _ in range(len(seeds) // 2)]
            cases.write_bytes(b"".join([*(random_case(seed) for seed in seeds), *others]))
            run_driver(driver, cases, seeds, counts)
            print(f"seeds to {seeds[-1]}: {counts.line()}", flush=True)
            if counts.calls >= options.calls:
                break
    return counts


def batches(options: argparse.Namespace) -> Iterator[list[int]]:
    if options.only is not None:
        yield [options.only]
        return
    first = options.seed
    while True:
        yield list(range(first, first + BATCH))
        first += BATCH


# --- through ONNX Runtime ------------------------------------------------------------------------------------------


def sessions_campaign(options: argparse.Namespace) -> Counts:
    counts = Counts()
    if options.only is not None:
        seeds = range(options.only, options.only + 1)
    else:
        seeds = range(options.seed, options.seed + options.nodes)
    for seed in seeds:
        try:
            one_node(seed, counts)
        except Exception as error:  # whatever it is, it is what the campaign looks for
            counts.failed("sessions", seed, f"{type(error).__name__}: {error}")
        if (seed - seeds.start) % 500 == 499:
            print(f"seeds to {seed}: {counts.line()}", flush=True)
    return counts


def native_session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = session_options()
    options.intra_op_num_threads = threads
    fips_ort.register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def one_node(seed: int, counts: Counts) -> None:
    """One session: products of a sound node with several numbers of rows, or one malformed node."""
    rng = np.random.default_rng([seed, 1])
    isas = available_isas()
    os.environ["FIPS_ORT_ISA"] = isas[rng.integers(len(isas))]
    weight, trans_b, accuracy_level = random_node(rng)
    layout = weight.layout
    k, n = (layout.columns, layout.rows) if trans_b else (layout.rows, layout.columns)
    bias = random_bias(rng, n) if rng.random() < 0.7 else None
    constant = bool(rng.random() < 0.7)
    model = op_model(weight, trans_b, accuracy_level, bias, functions=[], constant=constant)
    feeds = {"codes": weight.codes, "pattern": weight.pattern, "scales": weight.scales, "bias": bias}
    counts.cases += 1
    if rng.random() < 0.3:
        return malformed_node(rng, model, feeds, k, constant, counts)
    names = {value.name for value in model.graph.input}
    feeds = {name: value for name, value in feeds.items() if name in names}
    session = native_session(model, int(rng.integers(1, 4)))
    for m in rng.choice((0, 1, 2, 3, 4, 5, 16, 33), 3, replace=False):
        a = random_activations(rng, int(m), k, layout.block_size)
        (y,) = session.run(None, {"A": a, **feeds})
        excess = expected_outputs(a, weight, trans_b=trans_b, bias=bias, accuracy_level=accuracy_level).excess(y)
        counts.calls += 1
        counts.worst = max(counts.worst, float(excess.max(initial=0)))
        if excess.max(initial=0) > 1:
            row, column = np.unravel_index(excess.argmax(), excess.shape)
            raise AssertionError(f"{os.environ['FIPS_ORT_ISA']}, {m} rows: Y[{row}, {column}] is {y[row, column]}, "
                                 f"{excess.max():.3g} of what is allowed")
    return None


def malformed_node(rng: np.random.Generator, model: onnx.ModelProto, feeds: dict[str, np.ndarray | None], k: int,
                   constant: bool, counts: Counts) -> None:
    """Attributes of other values or kinds, or missing, and streams of other lengths: refused with a message, or run."""
    (node,) = model.graph.node
    for _ in range(rng.integers(1, 3)):
        place = int(rng.integers(len(node.attribute)))
        attribute, kind = node.attribute[place], rng.random()
        if kind < 0.7 and attribute.type == onnx.AttributeProto.INT:
            choices = (-1, 0, 1, 2, 3, 4, 8, 16, 63, 64, 2**31, 2**40, -(2**62), attribute.i + 1, attribute.i - 1)
            attribute.i = choices[rng.integers(len(choices))]
        elif kind < 0.8:
            node.attribute.remove(attribute)
        elif kind < 0.9:
            node.attribute[place].CopyFrom(onnx.helper.make_attribute(attribute.name, 1.5))
    arrays = {name: value for name, value in feeds.items() if name in node.input and value is not None}
    if rng.random() < 0.5:
        name = list(arrays)[rng.integers(len(arrays))]
        shape = [int(size) for size in rng.integers(0, 40, rng.integers(1, 4))]
        arrays[name] = np.resize(arrays[name] if arrays[name].size else np.zeros(1, arrays[name].dtype), shape)
    if constant:
        for proto in model.graph.initializer:
            proto.CopyFrom(onnx.numpy_helper.from_array(arrays[proto.name], proto.name))
    for declared in [*model.graph.input, *model.graph.output]:
        declared.type.tensor_type.ClearField("shape")
    names = {value.name for value in model.graph.input}
    fed = {name: value for name, value in arrays.items() if name in names}
    try:
        native_session(model, 2).run(None, {"A": np.ones((3, k), np.float32), **fed})
    except (RuntimeException, InvalidArgument, Fail) as error:
        counts.refused += 1
        if f"ai.fips.{node.op_type}: " not in str(error):
            raise
    counts.calls += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    campaigns = parser.add_subparsers(dest="campaign", required=True)
    driver, sessions = campaigns.add_parser("driver"), campaigns.add_parser("sessions")
    driver.add_argument("--calls", type=int, default=1_000_000, help="products to compute, of all instruction sets")
    driver.add_argument("--sanitize", action="store_true", help="address and undefined-behaviour sanitizers; slower")
    driver.add_argument("--driver", type=Path, help="a driver that was built before")
    sessions.add_argument("--nodes", type=int, default=10_000)
    for campaign in (driver, sessions):
        campaign.add_argument("--seed", type=int, default=0, help="of the first case")
        campaign.add_argument("--only", type=int, metavar="SEED", help="this one case")
    options = parser.parse_args()
    counts = driver_campaign(options) if options.campaign == "driver" else sessions_campaign(options)
    print(counts.line())
    return 1 if counts.failures else 0


if __name__ == "__main__":
    sys.exit(main())
