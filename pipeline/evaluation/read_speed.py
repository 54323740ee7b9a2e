"""How fast this machine reads memory: what bounds every kernel that reads weights once."""

import threading
import time

import numpy as np
from numpy.typing import NDArray

READ_METHOD = "numpy.bitwise_or.reduce over uint64, in as many equal parts as threads, one thread a part, best of 5"


def read_bandwidth(threads: int, size: int) -> float:
    """Measure the bytes per second of a plain read loop over about ``size`` bytes of memory (:data:`READ_METHOD`).

    Of few bytes, a part is in the cache, as it is for a model of that size which runs again and again.
    """
    parts = np.array_split(np.ones(max(size // 8, threads), np.uint64), threads)
    return sum(part.nbytes for part in parts) / min(_read_seconds(parts) for _ in range(5))


def _read_seconds(parts: list[NDArray[np.uint64]]) -> float:
    started = threading.Barrier(len(parts) + 1)

    def read(part: NDArray[np.uint64]) -> None:
        started.wait()
        np.bitwise_or.reduce(part)  # without the interpreter's lock

    workers = [threading.Thread(target=read, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    started.wait()
    begin = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begin
