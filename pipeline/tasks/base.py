"""The interface of a task: what a run asks of a kind of model and its data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Union

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from exporters.artifact import Golden
from exporters.packed_model import PackedModel
from exporters.packed_rest import PackedRest, save_packed_rest
from pipeline.compression.calibrate import record_activations
from pipeline.evaluation.measurements import Benchmark, ImageDivergence, Quality, Samples, Stage, TextDivergence
from pipeline.plumbing.files import write_aside
from pipeline.plumbing.progress import Progress
from pipeline.quantization.rest_layers import RestBits
from pipeline.quantization.rest_start import RestMoments, start_rest
from pipeline.recipe.plan import MLPSite, Plan
from pipeline.recipe.schema import EndToEnd, Precision, Recipe

Predict = Callable[[Tensor], Tensor]
"""A PyTorch model as a function of a batch of samples: logits, float32."""
PACKED_REST = "packed_rest.safetensors"
"""File of the weights outside the MLPs that are stored as codes (:mod:`exporters.packed_rest`)."""
Form = Union[nn.Module, "onnxruntime.InferenceSession"]
"""A form of the model: in PyTorch, or an artefact's session."""


@dataclass(frozen=True)
class Dense:
    """A dense model, float32, in evaluation mode. ``sites``: its MLPs. ``source_hash``: SHA-256 of configuration and
    weights, wherever they came from. ``notes``: what a user should know of how it was taken. ``uncut``: the model
    with its whole vocabulary, if the recipe cuts that of ``model``."""

    model: nn.Module
    sites: list[MLPSite]
    source_hash: str
    notes: tuple[str, ...] = ()
    uncut: nn.Module | None = None

    @property
    def whole(self) -> nn.Module:
        """The model as it was given, with which quality and size are compared."""
        return self.model if self.uncut is None else self.uncut


class Task(ABC):
    """A recipe's model and data. Samples are images (pixel values) or windows of text (token ids).

    A task has its data from the start; what needs the dense model works after :meth:`open_dense`. ``data_hash``:
    SHA-256 of everything the samples can contain. ``evaluated_backends``: those of the artefact whose quality is
    measured; parity is checked on all.
    """

    evaluated_backends: tuple[str, ...] = ("native", "portable")

    def __init__(self, recipe: Recipe, data_hash: str, train_samples: int) -> None:
        self.recipe = recipe
        self.data_hash = data_hash
        self.train_samples = train_samples
        self._dense: Dense | None = None

    # --- dense model ---

    @abstractmethod
    def make_dense(self, folder: Path, progress: Progress) -> None:
        """Train or rebuild the dense model in ``folder``, if the recipe does not simply load it."""

    @abstractmethod
    def load_dense(self, folder: Path) -> Dense:
        """Load the dense model, from ``folder`` if :meth:`make_dense` saved it there."""

    def open_dense(self, folder: Path) -> None:
        """Load the dense model (:meth:`load_dense`) and keep it for all that follows. Raises InputError for weights
        that cannot be stored as the recipe says."""
        self._dense = self.load_dense(folder)
        self.check_stored()

    @abstractmethod
    def check_stored(self) -> None:
        """Raise InputError if weights of the dense model cannot be stored as the recipe says."""

    @property
    def dense(self) -> Dense:
        """The dense model, once it is open."""
        assert self._dense is not None, "a task's dense model is there after open_dense"
        return self._dense

    @property
    def model(self) -> nn.Module:
        """The dense model as a PyTorch module, float32, in evaluation mode."""
        return self.dense.model

    @property
    def sites(self) -> list[MLPSite]:
        """The MLPs of the dense model, in execution order."""
        return self.dense.sites

    @property
    def source_hash(self) -> str:
        """SHA-256 of the dense model's configuration and weights."""
        return self.dense.source_hash

    # --- samples ---

    @abstractmethod
    def training_batch(self, indices: Sequence[int]) -> Tensor:
        """Load training samples, as the model takes them."""

    def calibration_samples(self) -> list[int]:
        """Draw the training samples of calibration, by the recipe's seed; in ascending order."""
        wanted = self.recipe.calibration.samples or self.train_samples
        generator = np.random.default_rng(self.recipe.seed)
        return sorted(generator.permutation(self.train_samples)[:wanted].tolist())

    @abstractmethod
    def run_dense(self, batch: Tensor) -> Tensor:
        """Run the dense model on a batch through all of its MLPs; what follows the last is left out if it is dear."""

    def calibrate(self, folder: Path, plan: Plan, progress: Progress) -> None:
        """Record what the MLPs of the plan read and wrote on training samples, never test samples
        (:mod:`pipeline.compression.calibrate`)."""
        record_activations(
            self.model,
            [site for group in plan.groups for site in group.sites],
            predict=self.run_dense,
            batch_of=self.training_batch,
            samples=self.calibration_samples(),
            batch_size=self.recipe.calibration.batch_size,
            folder=folder,
            progress=progress,
        )

    @abstractmethod
    def predictor(self, model: nn.Module) -> Predict:
        """Turn a PyTorch model into a function of samples."""

    @abstractmethod
    def end_to_end_loss(self, model: nn.Module, config: EndToEnd, seed: int) -> Callable[[int], Tensor]:
        """The loss of the whole ``model``, a float32 scalar, as a function of the step: of the task itself, or the
        divergence from the dense model, as ``config.objective`` says, with products in ``config.precision``."""

    # --- quality ---

    @abstractmethod
    def measure(
        self, form: Form, folder: Path, label: str, progress: Progress, *, against_dense: Path | None = None
    ) -> str:
        """Evaluate a form of the model on the test samples, save the result in ``folder`` and describe it in a line.

        ``against_dense``: folder of :meth:`measure_dense`, if whole distributions are to be compared with the dense
        model's. The dense model need not be open without it.
        """

    @abstractmethod
    def measure_dense(self, folder: Path, progress: Progress) -> str:
        """Evaluate the dense model as :meth:`measure` does, and leave in ``folder`` what others are compared with."""

    @abstractmethod
    def describe_quality(self, folders: dict[Stage, Path]) -> tuple[Quality, ImageDivergence | TextDivergence]:
        """Quality by stage, and the artefact's divergence from the dense model, from the saved results of each stage.
        """

    @abstractmethod
    def describe_data(self) -> Samples:
        """Where the samples come from, and how many there are."""

    # --- delivery ---

    @property
    @abstractmethod
    def token_order(self) -> Tensor | None:
        """All tokens of the vocabulary, the most frequent first: int64 [vocabulary]; None without text. To find it, the
        dense model is run the first time."""

    @abstractmethod
    def rest_moments(self, paths: Collection[str]) -> RestMoments | None:
        """Second moments by which codes of the weights outside the MLPs at ``paths`` are found; None if these are
        rounded to nearest."""

    def start_rest(
        self, bits: Mapping[str, RestBits], moments: RestMoments | None, on_start: Callable[[str], object]
    ) -> PackedRest:
        """Find codes for the weights outside the MLPs that have ``bits``, by path. ``moments``: of
        :meth:`rest_moments`. ``on_start`` is called with each path in turn."""
        in_tiers = any(not isinstance(width, int) for width in bits.values())
        return start_rest(
            self.model,
            bits,
            self.recipe.quantization.rest.block_size,
            order=self.token_order if in_tiers else None,
            moments=moments,
            on_start=on_start,
        )

    def store_rest(self, folder: Path, bits: Mapping[str, RestBits], progress: Progress) -> None:
        """Find codes for the weights outside the MLPs that have ``bits``, by path, and keep them in ``folder``, as
        :data:`PACKED_REST`."""
        moments = self.rest_moments(bits) if bits else None
        with progress.task("starting codes outside the MLPs", len(bits)) as advance:
            packed = self.start_rest(bits, moments, lambda path: advance(1, path))
        write_aside(folder / PACKED_REST, partial(save_packed_rest, packed))

    @abstractmethod
    def open_rest(self, folder: Path) -> nn.Module:
        """Make a copy of the dense model whose weights outside the MLPs are as they will be stored, with the codes that
        :meth:`store_rest` kept in ``folder``. The MLPs' own weights may be shared with the dense model."""

    @abstractmethod
    def parity_batches(self) -> list[Tensor]:
        """Choose the test samples on which all forms of the model have to agree."""

    @abstractmethod
    def export_graph(self, stored: nn.Module, packed: PackedModel) -> ir.Model:
        """Export the ONNX graph of ``stored``, whose MLPs are the ``packed`` ones."""

    @abstractmethod
    def golden(self, predict: Predict, tolerance: float) -> Golden:
        """Compute the inputs and outputs that go into the artefact for its validation. ``tolerance``: the difference
        that is allowed there, relative to the largest output."""

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Write the files of the configuration and of the tokenizer or image processor into an artefact."""

    @abstractmethod
    def bench(self, artifact: Path) -> Benchmark:
        """Time the artefact beside the dense model, and measure its memory."""


def products_in(precision: Precision) -> torch.autocast:
    """Make a context in which a model's matrix products are computed in ``precision``; its weights and their gradients
    stay float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
