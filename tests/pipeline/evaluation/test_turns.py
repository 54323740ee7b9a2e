import threading
import time
from functools import partial

import pytest

from pipeline.evaluation.turns import interleave, wait_until_idle


def test_it_waits_for_threads_that_spin() -> None:
    end = time.perf_counter() + 0.2
    spinning = threading.Thread(target=lambda: [None for _ in iter(lambda: time.perf_counter() < end, False)])
    spinning.start()
    wait_until_idle()
    assert time.perf_counter() >= end
    spinning.join()


def test_turns_are_times_of_single_runs() -> None:
    calls: list[str] = []

    def run(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    times = interleave({"short": partial(run, "short", 0.004), "long": partial(run, "long", 0.03)}, 0.0)
    assert {name: len(found) for name, found in times.items()} == {"short": 5, "long": 5}
    assert all(value >= 0.004 for value in times["short"])
    assert sorted(times["short"])[2] == pytest.approx(0.004, abs=0.004)
    assert sorted(times["long"])[2] == pytest.approx(0.03, abs=0.01)
    # One run to learn its length; a turn: one that is not counted, and as many as fill 20 ms.
    assert calls.count("long") == 1 + 5 * 2
    assert calls[:2] == ["short", "long"]
    turn = calls[2:].index("long")
    assert turn in range(4, 7)
    assert calls.count("short") == 1 + 5 * turn
