"""Speed of sessions beside each other: interleaved runs, medians."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from torch import nn

from exporters.image_classifier import export_image_classifier
from exporters.rest import quantize_linears
from fips_ort.load import load
from pipeline.evaluation.measurements import NATIVE
from pipeline.evaluation.turns import interleave

DENSE_FLOAT32 = "dense float32, onnxruntime"
DENSE_INT4 = "dense MatMulNBits 4 bit, onnxruntime"
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
    dense: nn.Module, pixel_shape: tuple[int, int, int], threads: int
) -> dict[str, onnxruntime.InferenceSession]:
    """Load the dense model into ONNX Runtime twice: in float32, and with its linear layers (not the classifier) as
    MatMulNBits.

    Those have 4 bits, accuracy_level 4 and blocks of 64, 32 or 16, the largest that divides all layers; the second
    session is left out if none does.
    """
    models = {DENSE_FLOAT32: dense}
    for block_size in (64, 32, 16):
        try:
            models[DENSE_INT4] = quantize_linears(dense, 4, block_size, ["classifier"], 4)
            break
        except ValueError:
            continue
    return {
        name: onnxruntime.InferenceSession(
            ir.to_proto(export_image_classifier(model, pixel_shape)).SerializeToString(), session_options(threads)
        )
        for name, model in models.items()
    }


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Make options for a session that computes with so many ``threads``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return options
