"""Waiting for one's own threads before something is timed.

ONNX Runtime's threads go on spinning for some 25 ms after a run, on the cores that the next session needs.
"""

import time

_SAMPLE_SECONDS = 0.002
_IDLE_SHARE = 0.1
"""Of one core."""


def wait_until_idle() -> None:
    """Return once this process uses less than a tenth of a core."""
    while True:
        begin, used = time.perf_counter(), time.process_time()
        time.sleep(_SAMPLE_SECONDS)
        if time.process_time() - used < _IDLE_SHARE * (time.perf_counter() - begin):
            return
