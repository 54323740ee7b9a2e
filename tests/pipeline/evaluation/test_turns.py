import threading
import time
from functools import partial

import pytest

from pipeline.evaluation import turns
from pipeline.evaluation.turns import interleave, wait_until_idle


def test_it_waits_for_threads_that_spin() -> None:
    end = time.perf_counter() + 0.2
    spinning = threading.Thread(target=lambda: [None for _ in iter(lambda: time.perf_counter() < end, False)])
    spinning.start()
    wait_until_idle()
    assert time.perf_counter() >= end
    spinning.join()


class Clock:
    """Stands in for the module ``time``: only what sleeps takes time, and nothing computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_turns_are_times_of_single_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    calls: list[str] = []

    def run(name: str, seconds: float) -> None:
        calls.append(name)
        clock.sleep(seconds)

    times = interleave({"short": partial(run, "short", 0.004), "long": partial(run, "long", 0.03)}, 0.0)
    assert times == {"short": [pytest.approx(0.004)] * 5, "long": [pytest.approx(0.03)] * 5}
    # One run each to learn its length; a turn: one that is not counted, and as many as fill 20 ms.
    assert calls == ["short", "long", *(["short"] * (1 + 5) + ["long"] * (1 + 1)) * 5]


def test_a_long_run_needs_no_other_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    calls: list[float] = []

    def run() -> None:
        calls.append(clock.now)
        clock.sleep(0.6)

    assert interleave({"only": run}, 6.0) == {"only": [pytest.approx(0.6)] * 10}
    assert len(calls) == 1 + 10
