"""Speed of sessions beside each other: interleaved runs, medians."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from torch import nn

from exporters.image_classifier import export_image_classifier
from exporters.nbits import with_nbits
from fips_ort.load import load
from pipeline.evaluation.measurements import NATIVE
from pipeline.evaluation.turns import interleave
from pipeline.plumbing.errors import first_line

DENSE_FLOAT32 = "dense float32, onnxruntime"
DENSE_INT4 = "dense MatMulNBits 4 bit, onnxruntime"
INT4_BLOCK = 64
"""Block size of its MatMulNBits, at most."""
PORTABLE = "artefact, portable functions"


def seconds_per_run(
    sessions: Mapping[str, onnxruntime.InferenceSession], pixel_values: NDArray[np.float32], seconds: float
) -> dict[str, float]:
    """Measure the median wall time of one run of each session on ``pixel_values`` [batch, 3, H, W]. The sessions take
    turns, for about ``seconds`` in all."""
    runs = {
        name: partial(session.run, ["logits"], {"pixel_values": pixel_values}) for name, session in sessions.items()
    }
    for run in runs.values():
        run()  # allocates what later runs find
    return {name: median(values) for name, values in interleave(runs, seconds).items()}


def artefact_sessions(folder: Path, threads: int) -> dict[str, onnxruntime.InferenceSession]:
    """Load the artefact twice: with native kernels, and with portable functions only."""
    return {
        NATIVE: load(folder, session_options(threads), native=True, verify=False),
        PORTABLE: load(folder, session_options(threads), native=False, verify=False),
    }


def dense_sessions(
    dense: nn.Module, pixel_values: NDArray[np.float32], threads: int
) -> tuple[dict[str, onnxruntime.InferenceSession], dict[str, str]]:
    """Load the dense model into ONNX Runtime twice: in float32, and with its linear layers (not the classifier) as
    MatMulNBits of 4 bits, accuracy_level 4 and blocks of 64 at most.

    Returns the sessions that ran on ``pixel_values`` [batch, 3, H, W], and why others did not: whatever is wrong with a
    baseline, the artefact is measured.
    """
    models: dict[str, Callable[[], nn.Module]] = {
        DENSE_FLOAT32: lambda: dense,
        DENSE_INT4: lambda: with_nbits(dense, INT4_BLOCK, accuracy_level=4, skip=["classifier"]),
    }
    height, width = pixel_values.shape[2:]
    sessions, left_out = {}, {}
    for name, make in models.items():
        try:
            graph = export_image_classifier(make(), (3, height, width))
            session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), session_options(threads))
            session.run(["logits"], {"pixel_values": pixel_values})
            sessions[name] = session
        except Exception as error:
            left_out[name] = first_line(error)
    return sessions, left_out


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Make options for a session that computes with so many ``threads``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return options
