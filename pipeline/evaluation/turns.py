"""Wall times of runs that take turns, so that drifts of the machine's speed hit all alike.

ONNX Runtime's threads go on spinning for some 25 ms after a run, on the cores that the next session needs.
"""

import time
from collections.abc import Callable, Mapping

_LEAST_ROUNDS = 5
_TURN_SECONDS = 0.02
"""A turn repeats its run for about so long, and counts the mean of the repetitions."""
_LONG_SECONDS = 0.5
"""A run of this length needs no other before it: the time that threads take to wake up is nothing beside it."""
_SAMPLE_SECONDS = 0.02
"""Whether threads are idle is judged over so long: several ticks of the kernel's clock (4 to 10 ms), at which it counts
the time of those that are running."""
_IDLE_SHARE = 0.1
"""A process that uses less than this share of one core is idle."""


def wait_until_idle() -> None:
    """Return once this process uses less than a tenth of a core."""
    while True:
        begin, used = time.perf_counter(), time.process_time()
        time.sleep(_SAMPLE_SECONDS)
        if time.process_time() - used < _IDLE_SHARE * (time.perf_counter() - begin):
            return


def interleave(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Measure the seconds of one run, by name, one entry a round; in a round each name has its turn, in the same order.

    ``runs``: each has to have run once before. Rounds go on for ``seconds``, and there are at least five. A turn waits
    for the threads of the others to sleep, wakes its own by a run that is not counted, and counts as many runs as fill
    20 ms. Waking takes milliseconds in a virtual machine, which a text, token after token, pays once.
    """
    lengths = {name: _seconds(run, 1) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() < end:
        for name, run in runs.items():
            wait_until_idle()
            if lengths[name] < _LONG_SECONDS:
                run()
            times[name].append(_seconds(run, max(1, round(_TURN_SECONDS / lengths[name]))))
        rounds += 1
    return times


def _seconds(run: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats
