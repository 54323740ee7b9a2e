"""Parity: PyTorch, ONNX Runtime with native kernels and ONNX Runtime with functions only must agree.

All three compute with the stored numbers. If they do not agree, the first MLP that differs is named.
"""

import contextlib
from collections.abc import Iterator, Sequence
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
from fips_ort.causal_lm import complete_inputs
from fips_ort.load import load
from fips_ort.native import register

_NUMBERS_AT_ONCE = 1 << 22
_ACCURACY_LEVEL = "accuracy_level"

Logits = NDArray[np.float32]


class ParityError(ValueError):
    """Raised if a backend disagrees with PyTorch. ``backend``: 'native' or 'portable'. ``path``: module path of the
    first MLP whose output differs from PyTorch's, None if all MLPs agree."""

    def __init__(self, message: str, backend: str, path: str | None) -> None:
        super().__init__(message)
        self.backend = backend
        self.path = path


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the logits of two backends differ.

    ``absolute``: the largest difference of a logit. ``relative``: that difference over the largest magnitude of a
    logit. ``same_predictions``: fraction of predictions (of images, or of next tokens) that are the same.
    """

    absolute: float
    relative: float
    same_predictions: float


@dataclass(frozen=True, slots=True)
class Parity:
    """Differences over ``samples`` images or texts, computed in several batches, all with float32 activations.

    ``rounding``: for an artefact that permits int8 activations (accuracy_level 4), how far the native kernels with
    such activations are from PyTorch: what that rounding costs, not an error of any backend. None for others.
    """

    native_vs_torch: Difference
    portable_vs_torch: Difference
    native_vs_portable: Difference
    rounding: Difference | None
    samples: int


def check_parity(folder: Path, model: nn.Module, batches: Sequence[Tensor], tolerance: float = 1e-3) -> Parity:
    """Compare the artefact in ``folder`` with ``model``, the PyTorch model it was exported from (eval mode).

    ``batches``: values of the artefact's first input, and of the model's argument of the same name: pixel values
    float32 [images, channels, height, width], or token ids int64 [texts, tokens], run without a past. Only the logits
    of one batch are held at a time. An artefact that permits int8 activations is compared with float32 ones, since
    their rounding can be larger than an error that matters. Raises ParityError, naming the first MLP that differs, if
    logits differ by more than ``tolerance`` of the largest one.
    """
    rounds = _rounds_activations(ir.load(folder / MODEL))
    sessions = {
        "native": _session(folder, native=True) if rounds else load(folder, verify=False),
        "portable": _session(folder, native=False),
    }
    if rounds:
        sessions["rounding"] = load(folder, verify=False)
    against_torch = {backend: _Comparison() for backend in sessions}
    between = _Comparison()
    for batch in batches:
        expected = _run_torch(model, _input_name(sessions["native"]), batch)
        computed = {backend: _run(session, batch, ["logits"])[0] for backend, session in sessions.items()}
        for backend, comparison in against_torch.items():
            comparison.add(computed[backend], expected)
        between.add(computed["native"], computed["portable"])
    del sessions
    differences = {backend: comparison.result() for backend, comparison in against_torch.items()}
    for backend in ("native", "portable"):
        if not differences[backend].relative <= tolerance:
            raise _explain(folder, model, batches, backend, differences[backend], tolerance)
    return Parity(
        differences["native"],
        differences["portable"],
        between.result(),
        differences.get("rounding"),
        sum(len(batch) for batch in batches),
    )


def compare(actual: Logits, expected: Logits) -> Difference:
    """Differences of two arrays of logits [..., labels]; infinite where a logit is not finite."""
    comparison = _Comparison()
    comparison.add(actual, expected)
    return comparison.result()


def first_difference(
    folder: Path, model: nn.Module, batches: Sequence[Tensor], backend: str, tolerance: float
) -> tuple[str, float] | None:
    """Path of the first MLP, in the order of computation, whose output differs between ``backend`` and PyTorch by
    more than ``tolerance`` of its largest element, with that difference; None if all agree."""
    taps = {module.output_node: module.path for module in model.modules() if isinstance(module, PackedMLPModule)}
    # The graph is in the order of computation.
    nodes = [node.name for node in ir.load(folder / MODEL).graph if node.name in taps]
    session = _session(folder, native=backend == "native", taps=nodes)
    paths = [taps[node] for node in nodes]
    for batch in batches:
        with _captured(model, paths) as expected:
            _run_torch(model, _input_name(session), batch)
        outputs = _run(session, batch, [f"{node}/output" for node in nodes])
        for path, actual in zip(paths, outputs, strict=True):
            wanted = expected[path]
            difference = compare(actual[..., : wanted.shape[-1]], wanted).relative  # stored rows may be filled up
            if not difference <= tolerance:
                return path, difference
    return None


class _Comparison:
    """The :class:`Difference` of logits that arrive in parts. Few million numbers are compared at a time: logits are
    large."""

    def __init__(self) -> None:
        self.absolute = self.largest = 0.0
        self.same = self.count = 0
        self.finite = True

    def add(self, actual: Logits, expected: Logits) -> None:
        labels = expected.shape[-1]
        rows = max(1, _NUMBERS_AT_ONCE // labels)
        pairs = actual.reshape(-1, labels), expected.reshape(-1, labels)
        for start in range(0, len(pairs[1]), rows):
            some, wanted = (array[start : start + rows] for array in pairs)
            self.finite = self.finite and bool(np.isfinite(some).all() and np.isfinite(wanted).all())
            self.absolute = max(self.absolute, float(np.abs(some - wanted).max()))
            self.largest = max(self.largest, float(np.abs(wanted).max()))
            self.same += int((some.argmax(axis=-1) == wanted.argmax(axis=-1)).sum())
            self.count += len(wanted)

    def result(self) -> Difference:
        if not self.finite:
            return Difference(float("inf"), float("inf"), 0.0)
        largest = max(self.largest, float(np.finfo(np.float32).tiny))
        return Difference(self.absolute, self.absolute / largest, self.same / max(self.count, 1))


def _explain(
    folder: Path,
    model: nn.Module,
    batches: Sequence[Tensor],
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


def _session(folder: Path, *, native: bool, taps: Sequence[str] = ()) -> Any:
    """Open a session of the artefact's graph with float32 activations. Its outputs are the graph's own or, if ``taps``
    names nodes, ``{tap}/output`` of each of them."""
    model = ir.load(folder / MODEL)
    nodes = {node.name: node for node in model.graph}
    for node in nodes.values():
        if _ACCURACY_LEVEL in node.attributes:
            node.attributes[_ACCURACY_LEVEL] = ir.AttrInt64(_ACCURACY_LEVEL, 0)
    if taps:
        model.graph.outputs.clear()
    for tap in taps:
        output = nodes[tap].outputs[0]
        output.name = f"{tap}/output"
        model.graph.outputs.append(output)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # more logits than the graph declares are a warning
    # The graph is in memory; its weights stay in the artefact's files.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if native:
        register(options)
    data = ir.to_proto(model).SerializeToString()
    # Folding would unpack all weights at once while loading and hold what it made on the way: 6 GB for Gemma 3 270M
    # with bitmaps, where computing with one weight after another takes 0.6 GB and 2 s a run.
    return onnxruntime.InferenceSession(
        data, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )


def _rounds_activations(model: ir.Model) -> bool:
    levels = (node.attributes.get(_ACCURACY_LEVEL) for node in model.graph)
    return any(level is not None and level.as_int() for level in levels)


@contextlib.contextmanager
def _captured(model: nn.Module, paths: list[str]) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Record the outputs of the modules at ``paths`` in the yielded dictionary, by path, while active."""
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


def _input_name(session: Any) -> str:
    name: str = session.get_inputs()[0].name
    return name


def _run(session: Any, batch: Tensor, outputs: list[str]) -> list[NDArray[np.float32]]:
    results: list[NDArray[np.float32]] = session.run(
        outputs, complete_inputs(session, {_input_name(session): batch.numpy()})
    )
    return results


def _run_torch(model: Any, name: str, batch: Tensor) -> Logits:
    # A cache would only be filled and thrown away.
    options = {"use_cache": False} if name == "input_ids" else {}
    with torch.inference_mode():
        logits: Logits = model(**{name: batch}, **options).logits.cpu().numpy()
    return logits
