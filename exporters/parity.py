"""Parity: PyTorch, ONNX Runtime with native kernels and ONNX Runtime with functions only must agree.

All three compute with the stored numbers. If they do not agree, the first MLP that differs is named.
"""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.artifact import MODEL
from exporters.modules import PackedMLPModule
from fips_ort.load import load
from fips_ort.native import register

LARGEST_BATCH = 64

Logits = NDArray[np.float32]


class ParityError(ValueError):
    """Backends disagree. ``backend``: 'native' or 'portable'; ``path``: module path of the first MLP whose output
    differs from PyTorch's, None if all MLPs agree."""

    def __init__(self, message: str, backend: str, path: str | None) -> None:
        super().__init__(message)
        self.backend = backend
        self.path = path


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest absolute difference of two backends' logits; the same relative to the largest magnitude of a logit;
    fraction of images with the same prediction."""

    absolute: float
    relative: float
    same_predictions: float


@dataclass(frozen=True, slots=True)
class Parity:
    """Differences over ``images`` images, computed in batches of several sizes."""

    native_vs_torch: Difference
    portable_vs_torch: Difference
    native_vs_portable: Difference
    images: int


def check_parity(folder: Path, model: nn.Module, pixel_values: NDArray[np.float32], tolerance: float = 1e-3) -> Parity:
    """Compare the artefact in ``folder`` with ``model``, the PyTorch model it was exported from (eval mode).

    ``pixel_values``: float32 [images, channels, height, width], run in batches of 1, 2, 4, … 64 images.
    Raises ParityError, naming the first MLP that differs, if logits differ by more than ``tolerance`` of the
    largest one.
    """
    batches = split_batches(pixel_values)
    reference = np.concatenate([_run_torch(model, batch) for batch in batches])
    computed = {}
    for backend in ("native", "portable"):
        session = load(folder, native=backend == "native", verify=False)
        computed[backend] = np.concatenate([session.run(["logits"], {"pixel_values": batch})[0] for batch in batches])
        difference = compare(computed[backend], reference)
        if not difference.relative <= tolerance:
            raise _explain(folder, model, batches, backend, difference, tolerance)
    return Parity(
        compare(computed["native"], reference),
        compare(computed["portable"], reference),
        compare(computed["native"], computed["portable"]),
        len(pixel_values),
    )


def compare(actual: Logits, expected: Logits) -> Difference:
    """Differences of two arrays of logits [images, labels]; infinite where a logit is not finite."""
    if not np.isfinite(actual).all() or not np.isfinite(expected).all():
        return Difference(float("inf"), float("inf"), 0.0)
    absolute = float(np.abs(actual - expected).max())
    largest = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    same = float((actual.argmax(axis=-1) == expected.argmax(axis=-1)).mean())
    return Difference(absolute, absolute / largest, same)


def split_batches(images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Cut ``images`` into batches of 1, 2, 4, … :data:`LARGEST_BATCH`, the last one what is left."""
    batches = []
    start, size = 0, 1
    while start < len(images):
        batches.append(np.ascontiguousarray(images[start : start + size]))
        start, size = start + size, min(2 * size, LARGEST_BATCH)
    return batches


def first_difference(
    folder: Path, model: nn.Module, batches: list[NDArray[np.float32]], backend: str, tolerance: float
) -> tuple[str, float] | None:
    """Path of the first MLP, in the order of computation, whose output differs between ``backend`` and PyTorch by
    more than ``tolerance`` of its largest element, with that difference; None if all agree."""
    taps = {module.output_node: module.path for module in model.modules() if isinstance(module, PackedMLPModule)}
    session, nodes = _tapped_session(folder, taps, native=backend == "native")
    paths = [taps[node] for node in nodes]
    for batch in batches:
        with _captured(model, paths) as expected:
            _run_torch(model, batch)
        outputs = session.run([f"{node}/output" for node in nodes], {"pixel_values": batch})
        for path, actual in zip(paths, outputs, strict=True):
            difference = compare(actual, expected[path]).relative
            if not difference <= tolerance:
                return path, difference
    return None


def _explain(
    folder: Path,
    model: nn.Module,
    batches: list[NDArray[np.float32]],
    backend: str,
    difference: Difference,
    tolerance: float,
) -> ParityError:
    message = (
        f"{folder}: logits of the {backend} backend differ from PyTorch's by {difference.relative:.2e} of the largest "
        f"({tolerance:.0e} is allowed)"
    )
    found = first_difference(folder, model, batches, backend, tolerance)
    if found is None:
        return ParityError(f"{message}; all MLPs agree, so the difference arises outside them", backend, None)
    path, relative = found
    return ParityError(f"{message}; the first block that differs is {path} ({relative:.2e})", backend, path)


def _tapped_session(folder: Path, names: Collection[str], native: bool) -> tuple[Any, list[str]]:
    """A session whose outputs are those of the nodes called ``names``, and the names in the order of computation."""
    model = ir.load(folder / MODEL)
    taps = [node for node in model.graph if node.name in names]
    model.graph.outputs.clear()
    for node in taps:
        node.outputs[0].name = f"{node.name}/output"
        model.graph.outputs.append(node.outputs[0])
    options = onnxruntime.SessionOptions()
    # The tapped graph is in memory; its weights stay in the artefact's files.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if native:
        register(options)
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session, [node.name or "" for node in taps]


@contextlib.contextmanager
def _captured(model: nn.Module, paths: list[str]) -> Iterator[dict[str, NDArray[np.float32]]]:
    """While active, the outputs of the modules at ``paths`` are put into the yielded dictionary."""
    outputs: dict[str, NDArray[np.float32]] = {}

    def capture(path: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            outputs[path] = output.detach().cpu().numpy()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(capture(path)) for path in paths]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _run_torch(model: Any, batch: NDArray[np.float32]) -> Logits:
    with torch.inference_mode():
        logits: Logits = model(pixel_values=torch.from_numpy(batch)).logits.cpu().numpy()
    return logits
