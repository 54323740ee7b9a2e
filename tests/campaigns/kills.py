"""Tiny recipes are run again and again, disturbed in every way we know of, and must come out the same.

    python tests/campaigns/kills.py --kills 200 --seed 0

Needs what the tests need. A round is one run in a fresh folder that is killed ``--kills-per-round`` times; what else
happens between and during its attempts is drawn from the seed and the round's number, so ``--first N`` goes on with
round N. At the end of a round, ``artifact/`` and all of ``report.json`` that is not timed must equal, byte by byte,
those of an undisturbed run. Every process is forked from this one, which has imported everything.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))

from pipeline.plumbing.environment import prepare_process

prepare_process()

import sklearn.datasets  # noqa: E402
import sklearn.model_selection  # noqa: E402, F401
import torch  # noqa: E402
import transformers.models.gemma3.modeling_gemma3  # noqa: E402
import transformers.models.vit.image_processing_pil_vit  # noqa: E402
import transformers.models.vit.modeling_vit  # noqa: E402, F401
from causal_lm_samples import tiny_language_model  # noqa: E402
from language_samples import byte_level_tokenizer  # noqa: E402
from run_samples import TINY, hashes, language_recipe, no_bench, write_recipe  # noqa: E402

import pipeline.run  # noqa: E402, F401
from pipeline import cli  # noqa: E402
from pipeline.evaluation.measurements import (  # noqa: E402
    NATIVE,
    ArtifactMemory,
    Benchmark,
    TokenSpeed,
    TokenSpeedRow,
)
from pipeline.plumbing import training_loop  # noqa: E402
from pipeline.plumbing.ownership import MARK  # noqa: E402
from pipeline.tasks.causal_lm import CausalLMTask  # noqa: E402
from pipeline.tasks.image_classification import ImageClassificationTask  # noqa: E402

MEASURED = ("seconds", "speed", "memory", "reused_stages", "disk_bytes")
"""Keys of a report that two runs do not share."""
BUSY, FULL = "another run works in this folder", r"cannot be written|cannot write|bytes of disk, [0-9,]+ are free"
EVENTS = ["kill", "kill", "kill", "terminate", "damage", "clock", "two", "full"]
YEAR = 365 * 24 * 3600


class CampaignError(Exception):
    """A run that did not end as it must."""


def no_text_bench(*_: Any) -> Benchmark:
    row = TokenSpeedRow(
        backend=NATIVE,
        prefill_tokens_per_second=1.0,
        decode_tokens_per_second=1.0,
        prefill_ratio_to_int4=1.0,
        decode_ratio_to_int4=1.0,
    )
    speed = TokenSpeed(unit="tokens/s", prompt_tokens=1, generated_tokens=1, threads=1, rows=(row,))
    return Benchmark(speed=speed, memory=ArtifactMemory(load_rss_bytes=1, peak_rss_bytes=1))


# --- recipes ---------------------------------------------------------------------------------------------------


def image_recipe(folder: Path) -> Path:
    folder.mkdir()
    return write_recipe(folder, {**TINY, "name": "image"})


def text_recipe(folder: Path) -> Path:
    """A tiny Gemma 3 with random weights, and sentences."""
    (folder / "text").mkdir(parents=True)
    draw = random.Random(0)
    words = ["the", "cat", "owl", "river", "hill", "sleeps", "hunts", "near", "in"]
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(150)]
    (folder / "text/train.txt").write_text("\n".join(lines[:120]), encoding="utf-8")
    tests = "\n".join(json.dumps({"text": line}) for line in lines[120:])
    (folder / "text/test.jsonl").write_text(tests, encoding="utf-8")
    kinds = ["sliding_attention", "full_attention"]
    model = tiny_language_model(
        "gemma3", num_hidden_layers=2, layer_types=kinds, hidden_size=32, intermediate_size=64, initializer_range=0.1
    )
    model.save_pretrained(folder / "model")
    byte_level_tokenizer().save_pretrained(folder / "model")
    content = language_recipe(folder / "model", folder / "text").model_dump(mode="json")
    return write_recipe(folder, content)


# --- processes -------------------------------------------------------------------------------------------------


def start(recipe: Path, out: Path, log: Path, clock: float = 0.0) -> int:
    """Fork ``fips run``; returns its process id. ``clock``: seconds by which its clock is wrong."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        if clock:
            now = time.time
            time.time = lambda: now() + clock
        sys.argv = ["fips", "run", str(recipe), "--out", str(out)]
        try:
            cli.main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
    finally:
        os._exit(status)


def wait(child: int, seconds: float | None = None) -> int | None:
    """The exit status of a process (negative: the signal); None if it still runs after ``seconds``."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() > until:
            return None
        time.sleep(0.005)


def check(status: int | None, allowed: tuple[int, ...], log: Path, words: str = "") -> None:
    """Raise CampaignError unless a process ended as it may, without a traceback; ``words``: pattern of a refusal."""
    text = log.read_text(encoding="utf-8", errors="replace")
    unexpected = status not in allowed or "Traceback" in text or "not foreseen" in text
    if unexpected or (status not in (0, -9, -15) and not re.search(words, text)):
        raise CampaignError(f"status {status}, allowed {allowed}: {text[-3000:]}")


# --- one round -------------------------------------------------------------------------------------------------


def result(out: Path) -> dict[str, Any]:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {"artifact": hashes(out / "artifact"), "report": {k: v for k, v in report.items() if k not in MEASURED}}


def files(out: Path) -> list[Path]:
    """What may be damaged: all but the empty files and marks that say what is ours."""
    if not out.exists():
        return []
    found = [path for path in out.rglob("*") if path.is_file() and path.name not in (MARK, "lock")]
    return sorted(path for path in found if ".stages" not in path.parts)


def damage(out: Path, draw: random.Random) -> str:
    """Truncate, empty, flip, replace or remove a file of a run."""
    candidates = files(out)
    if not candidates:
        return "nothing to damage"
    path = draw.choice(candidates)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    kind = draw.choice(["truncate", "empty", "flip", "replace", "remove"])
    path.unlink()  # not through a hard link
    if kind == "truncate":
        path.write_bytes(content[: draw.randrange(len(content) + 1)])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flip" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        os.utime(path, ns=times)
    elif kind == "replace":
        path.write_bytes(b'{"another": [1]}')
    return f"{kind} {path.relative_to(out)}"


def shift_times(out: Path, draw: random.Random) -> None:
    """Set the times of some files years back or ahead, as a clock that was set does."""
    for path in files(out):
        if draw.random() < 0.3:
            moment = time.time() + draw.uniform(-20, 20) * YEAR
            os.utime(path, (moment, moment))


def play(
    recipe: Path,
    disk: Path,
    number: int,
    kills: int,
    seed: int,
    seconds: float,
    events: list[str],
    counts: Counter[str],
) -> None:
    """One round. ``seconds``: what an undisturbed run takes."""
    draw = random.Random(f"{seed}/{number}")
    out, log, filler = disk / "run", disk.with_name(f"{disk.name}.log"), disk / "filler"
    pause = 2 * seconds / kills
    done = 0
    while done < kills:
        event = draw.choice(events)
        counts[event] += 1
        if event == "damage":
            what = damage(out, draw)
            print(f"    {what}", flush=True)
            continue
        if event == "clock":
            shift_times(out, draw)
        clock = draw.uniform(-20, 20) * YEAR if event == "clock" else 0.0
        if event == "full":
            free = shutil.disk_usage(disk).free
            with filler.open("wb") as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, free - draw.randrange(1 << 19)))
            status = wait(start(recipe, out, log))
            filler.unlink()
            check(status, (0, 2), log, FULL)
            counts["full disk met"] += status == 2
            continue
        child = start(recipe, out, log, clock)
        other = None
        if event == "two":
            time.sleep(draw.uniform(0, pause))
            second = log.with_suffix(".second")
            other = start(recipe, out, second)
        status = wait(child, draw.uniform(0, pause))
        number_of_signal = signal.SIGTERM if event == "terminate" else signal.SIGKILL
        if status is None:
            os.kill(child, number_of_signal)
            status = wait(child)
            done += 1
            counts["killed"] += 1
        check(status, (0, 2, -number_of_signal) if other else (0, -number_of_signal), log, BUSY)
        if other is not None:
            ended = wait(other)
            check(ended, (0, 2), second, BUSY)
            counts["refused as second"] += ended == 2
        if status == 0:
            counts["finished before the kill"] += 1
            print(f"    {damage(out, draw)}, after the end", flush=True)
    status = wait(start(recipe, out, log))
    check(status, (0,), log)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """``folder`` as a file system of its own, in memory; without the permission, a plain folder."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all rounds together")
    parser.add_argument("--kills-per-round", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="round to begin with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    training_loop.CHECKPOINT_SECONDS = 0.0
    ImageClassificationTask.bench = no_bench  # type: ignore[method-assign, assignment]
    CausalLMTask.bench = no_text_bench  # type: ignore[method-assign, assignment]
    counts: Counter[str] = Counter()
    base = Path(tempfile.mkdtemp(prefix="kills-"))
    recipes = [image_recipe(base / "image"), text_recipe(base / "text")]
    expected, seconds = [], []
    gc.collect()
    gc.freeze()
    for recipe in recipes:
        begin = time.monotonic()
        log = recipe.with_suffix(".log")
        check(wait(start(recipe, recipe.parent / "run", log)), (0,), log)
        seconds.append(time.monotonic() - begin)
        expected.append(result(recipe.parent / "run"))
        print(f"{recipe.parent.name}: undisturbed in {seconds[-1]:.1f} s", flush=True)
    rounds = -(-options.kills // options.kills_per_round)
    for number in range(options.first, options.first + rounds):
        which = number % 2
        begin = time.monotonic()
        with small_disk(base / f"disk{number}", 64) as is_small:
            disk = base / f"disk{number}"
            try:
                events = EVENTS if is_small else [event for event in EVENTS if event != "full"]
                play(
                    recipes[which], disk, number, options.kills_per_round, options.seed, seconds[which], events, counts
                )
                if result(disk / "run") != expected[which]:
                    raise CampaignError("other bytes than those of an undisturbed run")
            except CampaignError as error:
                kept = base / f"failed{number}"
                shutil.copytree(disk, kept, symlinks=True)
                print(f"round {number} FAILED (--seed {options.seed} --first {number}), kept in {kept}: {error}")
                print(f"{dict(counts)}", flush=True)
                sys.exit(1)
        shutil.rmtree(base / f"disk{number}")
        spent = time.monotonic() - begin
        print(f"round {number}, {recipes[which].parent.name}: same bytes, {spent:.0f} s; {dict(counts)}", flush=True)
    shutil.rmtree(base)
    print(f"{counts['killed']} kills, {rounds} rounds, all with the bytes of undisturbed runs")


if __name__ == "__main__":
    main()
