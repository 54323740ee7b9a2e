"""Mutated artefacts: each is loaded and run in a process of its own, and what comes of it is counted.

    python tests/campaigns/mutated_artefacts.py [--count 10000] [--seed 0] [--jobs 2] [--samples FOLDER] [--only TRY]

A try is a tiny artefact, damaged once or several times, by chance or with a purpose, and loaded in one of these ways:

- ``verified``: as everybody does. It must be refused with ArtifactError, or compute what it did before.
- ``unverified``: without hashes. Other numbers are no fault then; crashes, endless loops and other errors than
  ArtifactError are.
- ``signed``: the manifest is given the hashes of what was changed, as one would do who means harm. As ``unverified``.
- ``validated``: the same, in ``fips_ort.validate``. It must be refused, or found wrong, or its golden outputs be right.

Tries follow from seed and number, so ``--only`` repeats one and says all about it. Exit status 1 if one has failed.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fips_ort.causal_lm import complete_inputs
from fips_ort.errors import ArtifactError
from fips_ort.golden import read_array
from fips_ort.load import load, onnxruntime
from fips_ort.manifest import MANIFEST, read_manifest, sha256
from fips_ort.validate import validate

WAYS = ("verified", "unverified", "signed", "validated")
SECONDS, MEMORY = 60, 8 << 30
"""What a try may take: wall time, and address space."""
ACCEPTED = {
    "verified": {"refused", "same output"},
    "unverified": {"refused", "same output", "other output", "fails when run"},
    "signed": {"refused", "same output", "other output", "fails when run"},
    "validated": {"refused", "found wrong", "found right"},
}
MAKE_SAMPLES = """
import sys
from pathlib import Path
from causal_lm_samples import language_sample, write_language_sample
from packed_samples import sample, write_sample
folder = Path(sys.argv[1])
write_sample(folder / "vit-1to4", sample("vit", "1:4"), max_shard_size=8192)
write_sample(folder / "deit-dense-int8", sample("deit", "dense", graded=True, accuracy_level=4))
write_sample(folder / "dinov2-bitmap-int8", sample("dinov2", "bitmap", accuracy_level=4))
for kind, level in (("gemma3", 0), ("gemma2", 4), ("qwen2", 0), ("llama", 0)):
    write_language_sample(folder / f"{kind}-level{level}", language_sample(kind, level))
"""
NASTY = (
    0, 1, -1, 2**31, 2**63, -(2**63), 10**300, 0.5, 1e308, float("inf"), float("nan"), True, None, "", "x", "../x",
    "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "model.onnx", "fips.json", [], {}, [[]], {"a": 1},
)  # fmt: skip
SCRAPS = (b"", b'"', b"}", b"[", b"9", b"-", b",", b"e9", b"\\u0000", b"\xc3")
LOCATIONS = ("../secret", "/etc/passwd", "config.json", "model.onnx", "*/_ORT_MEM_ADDR_/*", "", "x" * 5000)
HOSTILE = (
    b"", b"{", b"[]", b"null", b"[" * 200_000, b'{"schema_version": 1, "schema_version": 1}', b"\xff" * 100,
    b'{"schema_version": ' + b"1" * 6000 + b"}", b"\xef\xbb\xbf{}",
)  # fmt: skip


# --- ways to damage an artefact -----------------------------------------------------------------------------------


def replace(path: Path, content: bytes) -> None:
    """Write a file anew; what it is linked with stays."""
    path.unlink()
    path.write_bytes(content)


def is_plain(path: Path) -> bool:
    """Whether it can be read by us: no pipe, no link to a device, nothing huge."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24


def read(path: Path) -> bytes:
    if not is_plain(path):
        raise ValueError(f"{path.name} was damaged before")
    return path.read_bytes()


def any_file(rng: random.Random, folder: Path) -> Path:
    """Not the native library: it is the same in all, never loaded from there, and most of the bytes."""
    return rng.choice(sorted(path for path in folder.rglob("*") if is_plain(path) and path.suffix != ".so"))


def flip(rng: random.Random, folder: Path) -> str:
    path = any_file(rng, folder)
    content = bytearray(read(path))
    if not content:
        return f"{path.name} is empty"
    places = [rng.randrange(8 * len(content)) for _ in range(rng.choice((1, 1, 2, 16, 200)))]
    for place in places:
        content[place // 8] ^= 1 << place % 8
    replace(path, bytes(content))
    return f"{len(places)} bits of {path.name}"


def cut(rng: random.Random, folder: Path) -> str:
    path = any_file(rng, folder)
    content = read(path)
    size = rng.randint(0, len(content))
    replace(path, content[:size])
    return f"{path.name} cut to {size} bytes"


def shift(rng: random.Random, folder: Path) -> str:
    path = any_file(rng, folder)
    content = read(path)
    place, count = rng.randint(0, len(content)), rng.choice((1, 4, 64, 4096))
    more = rng.random() < 0.5
    replace(path, content[:place] + (rng.randbytes(count) + content[place:] if more else content[place + count :]))
    return f"{count} bytes {'put into' if more else 'taken from'} {path.name} at {place}"


def overwrite(rng: random.Random, folder: Path) -> str:
    path = any_file(rng, folder)
    content = read(path)
    place, count = rng.randint(0, len(content)), rng.choice((1, 2, 8, 64, 1024))
    value = rng.choice((bytes(count), b"\xff" * count, rng.randbytes(count)))
    replace(path, content[:place] + value[: len(content) - place] + content[place + count :])
    return f"{count} bytes of {path.name} at {place} overwritten"


def swap(rng: random.Random, folder: Path) -> str:
    first, second = any_file(rng, folder), any_file(rng, folder)
    one, other = read(first), read(second)
    replace(first, other)
    replace(second, one)
    return f"{first.name} and {second.name} swapped"


def take(rng: random.Random, folder: Path) -> str:
    path = any_file(rng, folder)
    path.unlink()
    return f"{path.name} removed"


def special(rng: random.Random, folder: Path) -> str:
    path = any_file(rng, folder)
    target = rng.choice(("/etc/passwd", "/dev/zero", path.name, "../secret", "model.onnx", "pipe", "folder", "sparse"))
    path.unlink()
    if target == "pipe":
        os.mkfifo(path)
    elif target == "folder":
        path.mkdir()
    elif target == "sparse":
        path.touch()
        os.truncate(path, 1 << rng.randint(20, 40))
    else:
        path.symlink_to(target)
    return f"{path.name} is {target}"


def edit_json(rng: random.Random, folder: Path) -> str:
    path = folder / MANIFEST
    content = json.loads(read(path))
    at, keys = content, []
    while True:
        places = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(places)
        keys.append(key)
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.15:
            break
        at = at[key]
    what = rng.choice(("set", "set", "set", "drop", "double", "add"))
    value = rng.choice(NASTY)
    if isinstance(at[key], int) and rng.random() < 0.5:
        value = at[key] + rng.choice((-1, 1, 64, -64))
    if what == "drop":
        del at[key]
    elif what == "double" and isinstance(at, list):
        at.append(at[key])
    elif what == "add" and isinstance(at, dict):
        at[rng.choice(("x", "path", "../x", "\ud800"))] = value
    else:
        at[key] = value
    replace(path, json.dumps(content).encode("utf-8"))
    return f"manifest: {what} {'.'.join(map(str, keys))}: {value!r:.60}"


def edit_text(rng: random.Random, folder: Path) -> str:
    path = folder / MANIFEST
    if rng.random() < 0.2:
        content = rng.choice(HOSTILE)
        replace(path, content)
        return f"manifest: {content[:40]!r}"
    text = bytearray(read(path))
    for _ in range(rng.choice((1, 1, 3, 30))):
        place = rng.randrange(len(text))
        text[place : place + rng.randint(0, 3)] = rng.choice(SCRAPS)
    replace(path, bytes(text))
    return "manifest: changed text"


def edit_graph(rng: random.Random, folder: Path) -> str:
    path = folder / "model.onnx"
    model = onnx.load_from_string(read(path))
    graph = model.graph
    external = [tensor for tensor in graph.initializer if tensor.external_data]
    what = rng.choice(("location", "place", "dims", "type", "attribute", "attribute", "input", "drop", "op", "inline"))
    if what == "location":
        entry = next(entry for entry in rng.choice(external).external_data if entry.key == "location")
        entry.value = rng.choice(LOCATIONS)
    elif what == "place":
        entry = rng.choice([entry for entry in rng.choice(external).external_data if entry.key != "location"])
        entry.value = rng.choice(("0", "-1", "1", "64", str(2**31), str(2**63 - 1), "x", ""))
    elif what == "dims":
        tensor = rng.choice(graph.initializer)
        if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, 3, 2**20, 2**40, 2**62, -1))
        else:
            tensor.dims.append(rng.choice((0, 2)))
    elif what == "type":
        rng.choice(graph.initializer).data_type = rng.randint(0, 27)
    elif what == "attribute":
        integers = [a for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.INT]
        if integers:
            rng.choice(integers).i = rng.choice((0, 1, -1, 4, 7, 8, 64, 2**31, 2**62, -(2**63)))
    elif what == "input":
        node = rng.choice([node for node in graph.node if node.input])
        node.input[rng.randrange(len(node.input))] = rng.choice([tensor.name for tensor in graph.initializer])
    elif what == "drop":
        del graph.node[rng.randrange(len(graph.node))]
    elif what == "op":
        rng.choice(graph.node).op_type = rng.choice(("Identity", "MatMul", "QMatMul", "SparseQMatMul", "Nothing"))
    else:
        inline = [tensor for tensor in graph.initializer if tensor.raw_data]
        if inline:
            tensor = rng.choice(inline)
            tensor.raw_data = rng.randbytes(len(tensor.raw_data) + rng.choice((0, 0, -1, 4)))
    replace(path, model.SerializeToString())
    return f"graph: {what}"


def edit_scales(rng: random.Random, folder: Path) -> str:
    """Values in the weights' files that are no numbers, or huge."""
    path = rng.choice(sorted(folder.glob("*.data")))
    content = bytearray(read(path))
    value = rng.choice((b"\x00\x7c", b"\x00\x7e", b"\xff\x7b", b"\x01\x00"))  # float16: inf, NaN, huge, tiny
    for _ in range(rng.choice((1, 10, 1000))):
        place = 2 * rng.randrange(len(content) // 2)
        content[place : place + 2] = value
    replace(path, bytes(content))
    return f"{path.name}: {value.hex()} here and there"


DAMAGES: tuple[Callable[[random.Random, Path], str], ...] = (
    flip, flip, cut, shift, overwrite, swap, take, special, edit_json, edit_json, edit_json, edit_text, edit_graph,
    edit_graph, edit_scales,
)  # fmt: skip


def sign(folder: Path) -> None:
    """Give every listed file the size and hash that it has now, if the manifest can be read at all."""
    path = folder / MANIFEST
    try:
        content = json.loads(read(path))
        for entry in content["files"]:
            file = folder / entry["path"]
            if is_plain(file):
                entry |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
        replace(path, json.dumps(content).encode("utf-8"))
    except Exception:
        return


# --- a try --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    number: int
    way: str
    sample: str
    damages: tuple[str, ...]
    outcome: str
    detail: str

    @property
    def failed(self) -> bool:
        return self.outcome not in ACCEPTED[self.way]


def outputs(folder: Path, inputs: dict[str, Any], *, verify: bool) -> tuple[str, str]:
    """What comes of loading and running an artefact: (outcome, the outputs' hash or an error)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = load(folder, options, verify=verify)
    except ArtifactError as error:
        return "refused", str(error)
    try:
        arrays = session.run(None, complete_inputs(session, inputs))
    except Exception as error:
        return "fails when run", str(error)
    return "output", hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def checked(folder: Path) -> tuple[str, str]:
    try:
        wrong = [str(check) for check in validate(folder) if not check.passed]
    except ArtifactError as error:
        return "refused", str(error)
    return ("found wrong", wrong[0]) if wrong else ("found right", "")


def in_process(work: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """The result of ``work`` in a forked process within the limits, or how that ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            try:
                result = work()
            except BaseException:
                result = ("other error", traceback.format_exc())
            os.write(write, json.dumps([text[:3000] for text in result]).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    deadline = time.monotonic() + SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            return "hang", f"more than {SECONDS} s"
        time.sleep(0.005)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    if os.WIFSIGNALED(status) or not content:
        return "crash", signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
    outcome, detail = json.loads(content)
    return outcome, detail


class Campaign:
    def __init__(self, samples: Path, seed: int) -> None:
        self.samples = sorted(path for path in samples.iterdir() if (path / MANIFEST).is_file())
        self.seed = seed
        self.inputs: dict[str, dict[str, Any]] = {}
        self.expected: dict[str, str] = {}
        for sample in self.samples:
            golden = read_manifest(sample).golden.inputs
            inputs = {name: read_array(sample, path) for name, path in golden.items()}
            outcome, output = in_process(lambda sample=sample, inputs=inputs: outputs(sample, inputs, verify=True))
            assert outcome == "output", (sample, outcome, output)
            self.inputs[sample.name], self.expected[sample.name] = inputs, output

    def attempt(self, number: int, scratch: Path) -> Result:
        rng = random.Random(f"{self.seed} {number}")
        sample, way = rng.choice(self.samples), rng.choice(WAYS)
        folder = scratch / f"try-{number}"
        shutil.copytree(sample, folder, copy_function=os.link)
        try:
            damages = []
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                damage = rng.choice(DAMAGES)
                try:
                    damages.append(damage(rng, folder))
                except Exception as error:  # nothing is left to damage so
                    damages.append(f"{damage.__name__}: {type(error).__name__}")
            if way in ("signed", "validated"):
                sign(folder)
            if way == "validated":
                outcome, detail = in_process(lambda: checked(folder))
            else:
                inputs = self.inputs[sample.name]
                outcome, detail = in_process(lambda: outputs(folder, inputs, verify=way != "unverified"))
            if outcome == "output":
                outcome = "same output" if detail == self.expected[sample.name] else "other output"
            return Result(number, way, sample.name, tuple(damages), outcome, detail)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


_campaign: Campaign


def _start(samples: Path, seed: int) -> None:
    global _campaign
    _campaign = Campaign(samples, seed)


def _attempt(number: int) -> Result:
    with tempfile.TemporaryDirectory(dir=_campaign.samples[0].parent.parent) as scratch:
        return _campaign.attempt(number, Path(scratch))


def run(samples: Path, seed: int, numbers: range, jobs: int) -> Iterator[Result]:
    with multiprocessing.Pool(jobs, _start, (samples, seed)) as pool:
        yield from pool.imap_unordered(_attempt, numbers, chunksize=4)


def make_samples(folder: Path) -> None:
    """In a process of its own, so that this one stays small, and without threads when it forks."""
    path = os.pathsep.join([str(Path(__file__).parents[1] / "samples"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", MAKE_SAMPLES, str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, capture_output=True)


def report(counts: Counter[tuple[str, str]], failures: list[Result], seconds: float) -> str:
    names = sorted({outcome for _, outcome in counts})
    rows = [f"| way | tries | {' | '.join(names)} |", f"| --- | ---: |{' ---: |' * len(names)}"]
    for way in WAYS:
        found = [counts[way, name] for name in names]
        rows.append(f"| {way} | {sum(found):,} | {' | '.join(f'{count:,}' for count in found)} |")
    rows.append(f"\n{sum(counts.values()):,} tries in {seconds:,.0f} s, {len(failures)} failed")
    for result in failures:
        damages = "; ".join(result.damages)
        rows.append(f"--only {result.number}: {result.way} {result.sample}: {result.outcome}: {damages}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="tries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--samples", type=Path, help="folder of sound artefacts; made where it is empty")
    parser.add_argument("--only", type=int, help="number of one try, to say all about")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        samples = given.samples or Path(temporary) / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        if not any(samples.iterdir()):
            make_samples(samples)
        if given.only is not None:
            result = Campaign(samples, given.seed).attempt(given.only, Path(temporary))
            print(result)
            return int(result.failed)
        begin = time.monotonic()
        counts: Counter[tuple[str, str]] = Counter()
        failures = []
        for done, result in enumerate(run(samples, given.seed, range(given.count), given.jobs), 1):
            counts[result.way, result.outcome] += 1
            if result.failed:
                failures.append(result)
                print(result, flush=True)
            if done % 500 == 0:
                print(f"{done:,} tries, {len(failures)} failed, {time.monotonic() - begin:,.0f} s", flush=True)
        print(f"seed {given.seed}\n{report(counts, failures, time.monotonic() - begin)}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
