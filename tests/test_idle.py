import threading
import time

from pipeline.idle import wait_until_idle


def test_it_waits_for_threads_that_spin() -> None:
    end = time.perf_counter() + 0.2
    spinning = threading.Thread(target=lambda: [None for _ in iter(lambda: time.perf_counter() < end, False)])
    spinning.start()
    wait_until_idle()
    assert time.perf_counter() >= end
    spinning.join()
