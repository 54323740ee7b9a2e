"""Sessions that can be timed."""

from pathlib import Path

import numpy as np
import onnxruntime

import fips_ort


def open_session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a session with our kernels and with ONNX Runtime's defaults, except for the number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    fips_ort.register(options)
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


class BoundRun:
    """A session's run on random activations [rows, K]; outputs of one shape share one piece of memory."""

    def __init__(self, session: onnxruntime.InferenceSession, rows: int) -> None:
        columns = session.get_inputs()[0].shape[1]
        values = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
        self._session = session
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("X", onnxruntime.OrtValue.ortvalue_from_numpy(values))
        self._outputs: dict[tuple[int, int], onnxruntime.OrtValue] = {}
        for output in session.get_outputs():
            shape = (rows, output.shape[1])
            if shape not in self._outputs:
                self._outputs[shape] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
            self._binding.bind_ortvalue_output(output.name, self._outputs[shape])

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def finite(self) -> bool:
        """Whether all outputs of the last run are finite."""
        return all(np.isfinite(output.numpy()).all() for output in self._outputs.values())
