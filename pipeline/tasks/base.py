"""The interface of a task: what a run asks of a kind of model and its data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union

import onnx_ir as ir
import onnxruntime
from torch import Tensor, nn

from exporters.artifact import Golden
from exporters.packed_model import PackedModel
from pipeline.plumbing.progress import Progress
from pipeline.recipe.plan import MLPSite, Plan
from pipeline.recipe.schema import EndToEnd, Recipe

Predict = Callable[[Tensor], Tensor]
"""A PyTorch model as a function of a batch of samples: logits, float32."""
Form = Union[nn.Module, "onnxruntime.InferenceSession"]
"""A form of the model: in PyTorch, or an artefact's session."""


class Task(ABC):
    """A recipe's model and data. Samples are images (pixel values) or windows of text (token ids).

    ``model`` (dense, float32, evaluation mode), ``sites`` (its MLPs) and ``source_hash`` are there after
    :meth:`open_dense`. ``data_hash``: of everything the samples can contain. ``evaluated_backends``:
    those of the artefact whose quality is measured; parity is checked on all.
    """

    recipe: Recipe
    data_hash: str
    train_samples: int
    evaluated_backends: tuple[str, ...] = ("native", "portable")
    model: nn.Module
    sites: list[MLPSite]
    source_hash: str

    # --- dense model ---

    @abstractmethod
    def make_dense(self, folder: Path, progress: Progress) -> None:
        """Train or rebuild the dense model in ``folder``, if the recipe does not simply load it."""

    @abstractmethod
    def open_dense(self, folder: Path) -> None:
        """Load the dense model, from ``folder`` if :meth:`make_dense` saved it there."""

    # --- samples ---

    @abstractmethod
    def training_batch(self, indices: Sequence[int]) -> Tensor:
        """Training samples, as the model takes them."""

    @abstractmethod
    def predictor(self, model: nn.Module) -> Predict:
        """A PyTorch model as a function of samples."""

    @abstractmethod
    def calibrate(self, folder: Path, plan: Plan, samples: Sequence[int], progress: Progress) -> None:
        """Record what the MLPs of the plan read and wrote on training samples
        (:mod:`pipeline.compression.calibrate`)."""

    @abstractmethod
    def end_to_end_loss(self, model: nn.Module, config: EndToEnd, seed: int) -> Callable[[int], Tensor]:
        """Loss of the whole ``model`` as a function of the step, against the dense model or the task."""

    # --- quality ---

    @abstractmethod
    def measure(
        self, form: Form, folder: Path, label: str, progress: Progress, *, against_dense: Path | None = None
    ) -> str:
        """Evaluate a form of the model on the test samples, save the result in ``folder`` and describe it in a line.

        ``against_dense``: folder of the dense model's result, to compare whole distributions with it.
        """

    @abstractmethod
    def describe_quality(self, folders: dict[str, Path]) -> dict[str, Any]:
        """The report's sections ``quality`` and ``divergence`` from the results saved for each stage."""

    @abstractmethod
    def describe_data(self) -> dict[str, Any]:
        """The report's section ``data``."""

    # --- delivery ---

    @abstractmethod
    def store_rest(self, folder: Path, progress: Progress) -> None:
        """Find codes for the weights outside the MLPs and keep them in ``folder``, where that takes long."""

    @abstractmethod
    def open_rest(self, folder: Path) -> nn.Module:
        """A copy of the dense model whose weights outside the MLPs are as they will be stored, with the codes in
        ``folder``. The MLPs' own weights may be shared with the dense model."""

    @abstractmethod
    def parity_batches(self) -> list[Tensor]:
        """Test samples on which all forms of the model have to agree."""

    @abstractmethod
    def export_graph(self, stored: nn.Module, packed: PackedModel) -> ir.Model:
        """The ONNX graph of ``stored``, whose MLPs are the packed ones."""

    @abstractmethod
    def golden(self, predict: Predict, tolerance: float) -> Golden:
        """Inputs and outputs that go into the artefact for its validation."""

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Write configuration, tokenizer or processor files into an artefact."""

    @abstractmethod
    def bench(self, artifact: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The report's sections ``speed``, of the artefact beside the dense model, and ``memory``."""
