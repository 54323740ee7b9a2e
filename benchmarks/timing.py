"""Wall times of sessions that take turns, and how fast this machine reads memory."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

import fips_ort
from pipeline.idle import wait_until_idle

_LEAST_ROUNDS = 5
_BLOCK_SECONDS = 0.02
"""A measurement of warm weights repeats its run for about so long, and divides."""
BANDWIDTH_METHOD = (
    "numpy.bitwise_or.reduce over uint64, 1 GiB in as many equal parts as threads, one thread a part, best of 5"
)
_BANDWIDTH_BYTES = 1 << 30


def open_session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session with our kernels and ONNX Runtime's defaults but for the number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    fips_ort.register(options)
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


class BoundRun:
    """A session's run on random activations [rows, K] with outputs that are allocated once."""

    def __init__(self, session: onnxruntime.InferenceSession, rows: int) -> None:
        columns = session.get_inputs()[0].shape[1]
        values = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
        self._session = session
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("X", onnxruntime.OrtValue.ortvalue_from_numpy(values))
        self._outputs = []
        for output in session.get_outputs():
            shape = (rows, output.shape[1])
            self._outputs.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32))
            self._binding.bind_ortvalue_output(output.name, self._outputs[-1])

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def finite(self) -> bool:
        """Whether every output of the last run is finite."""
        return all(np.isfinite(output.numpy()).all() for output in self._outputs)


def interleave(runs: Mapping[str, Callable[[], None]], seconds: float, *, warm: bool) -> dict[str, list[float]]:
    """Seconds of one run, by name, one entry a round; in a round each name has its turn, in the same order.

    Rounds go on for ``seconds``, and there are at least five. ``warm``: a turn is one run that is not counted and as
    many counted ones as fill 20 ms; otherwise it is a single run, which finds in the caches what the turns of all
    others left there. Every turn waits for the threads of the others to sleep (:mod:`pipeline.idle`).
    """
    repeats = {name: _repeats(run) if warm else 1 for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() < end:
        for name, run in runs.items():
            wait_until_idle()
            if warm:
                run()
            times[name].append(_seconds(run, repeats[name]))
        rounds += 1
    return times


def read_bandwidth(threads: int) -> float:
    """Bytes per second of a plain read loop over memory (see :data:`BANDWIDTH_METHOD`)."""
    parts = np.array_split(np.ones(_BANDWIDTH_BYTES // 8, np.uint64), threads)
    return _BANDWIDTH_BYTES / min(_read_seconds(parts) for _ in range(5))


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


def _seconds(run: Callable[[], None], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def _repeats(run: Callable[[], None]) -> int:
    return max(1, round(_BLOCK_SECONDS / min(_seconds(run, 1), _seconds(run, 1))))

