"""Image classifiers: top-1 accuracy, ONNX by :mod:`exporters.image_classifier`."""

import copy
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporters.artifact import Golden
from exporters.image_classifier import export_image_classifier
from exporters.packed_model import PackedModel
from exporters.packed_rest import load_packed_rest
from exporters.rest import fix_position_embeddings, install_rest, round_to_float16
from fips_ort.memory import measure_memory
from pipeline.data.images import load_data
from pipeline.data.samples import check_train_samples
from pipeline.evaluation.accuracy import check_samples, divergence, evaluate_accuracy, load_accuracy, save_accuracy
from pipeline.evaluation.image_speed import DENSE_FLOAT32, artefact_sessions, dense_sessions, seconds_per_run
from pipeline.evaluation.measurements import (
    AccuracyByStage,
    ArtifactMemory,
    Benchmark,
    ImageDivergence,
    ImageSpeed,
    ImageSpeedRow,
    Samples,
    Stage,
)
from pipeline.models.adapters import find_mlps
from pipeline.models.image_classifier import ATTENTION, load_model, load_preprocessing, model_class
from pipeline.models.weights import check_finite, check_float16, hash_model
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import remove_checkpoint, step_generator
from pipeline.recipe.schema import (
    EndToEnd,
    ImageDataSection,
    PackagedOnnxModel,
    PretrainedModel,
    Recipe,
    ScratchModel,
)
from pipeline.tasks.base import PACKED_REST, Dense, Form, Predict, Task, products_in

GOLDEN_IMAGES = 4
"""Images whose logits the artefact carries."""
PARITY_IMAGES = 64
"""Images on which all forms must agree."""
BENCH_BATCH = 8
"""Images in a run that is timed."""
BENCH_SECONDS = 10.0
"""About how long speed is measured."""


class ImageClassificationTask(Task):
    """``recipe.model`` is an image classifier, ``recipe.data`` labelled images."""

    def __init__(self, recipe: Recipe, artifact: Path | None = None) -> None:
        section, data = recipe.model, recipe.data
        assert isinstance(section, ScratchModel | PretrainedModel | PackagedOnnxModel)
        assert isinstance(data, ImageDataSection)
        # An artefact's own processor and labels; a classifier saved like any other.
        self.section = section if artifact is None else PretrainedModel(source="pretrained", path=str(artifact))
        self.preprocessing = load_preprocessing(self.section, data)
        self.image_size = self.preprocessing.image_size
        # A pretrained model may come with a large data set: only what the run draws is read and hashed.
        limited = isinstance(self.section, PretrainedModel)
        calibration = 1 if artifact is not None else recipe.calibration.samples
        limits = (calibration, recipe.evaluation.samples) if limited else (None, None)
        self.data = load_data(data, self.preprocessing, recipe.seed, *limits)
        check_samples(self.data.test, recipe.evaluation.samples)
        if artifact is None:
            check_train_samples(recipe, len(self.data.train))
        super().__init__(recipe, self.data.hash, len(self.data.train))

    # --- dense model ---

    def make_dense(self, folder: Path, progress: Progress) -> None:
        if isinstance(self.section, PretrainedModel):  # stays where it is, uncopied
            return
        checkpoint = folder / "checkpoint.pt"
        loaded = load_model(self.section, self.data, self.recipe.seed, progress, checkpoint)
        loaded.model.save_pretrained(folder / "model")  # type: ignore[operator]
        remove_checkpoint(checkpoint)

    def load_dense(self, folder: Path) -> Dense:
        if isinstance(self.section, PretrainedModel):
            loaded = load_model(self.section, self.data, self.recipe.seed, Progress())
            return Dense(loaded.model, find_mlps(loaded.model), loaded.source_hash)
        model = model_class().from_pretrained(folder / "model", attn_implementation=ATTENTION).eval()
        check_finite(model)
        return Dense(model, find_mlps(model), hash_model(model))

    def check_stored(self) -> None:
        plain = {"classifier", *(path for site in self.sites for path in site.linear_paths)}
        check_float16(self.model, self.recipe.quantization.rest, plain=plain)

    # --- samples ---

    def training_batch(self, indices: Sequence[int]) -> Tensor:
        return self.data.train.batch(indices)[0]

    def predictor(self, model: nn.Module) -> Predict:
        return lambda pixel_values: model(pixel_values=pixel_values).logits

    def run_dense(self, batch: Tensor) -> Tensor:
        return self.predictor(self.model)(batch)

    def end_to_end_loss(self, model: nn.Module, config: EndToEnd, seed: int) -> Callable[[int], Tensor]:
        """The loss on images that are drawn anew at each step. Objective ``task`` is cross-entropy with the labels."""

        def logits(of: nn.Module, pixel_values: Tensor) -> Tensor:
            with products_in(config.precision):
                return self.predictor(of)(pixel_values).float()

        def loss(step: int) -> Tensor:
            count = min(config.batch_size, self.train_samples)
            indices = torch.randperm(self.train_samples, generator=step_generator(seed, step))[:count]
            pixel_values, labels = self.data.train.batch(indices.numpy())
            student = logits(model, pixel_values)
            if config.objective == "task":
                return F.cross_entropy(student, labels)
            with torch.no_grad():
                target = torch.log_softmax(logits(self.model, pixel_values), dim=-1)
            return F.kl_div(torch.log_softmax(student, dim=-1), target, log_target=True, reduction="batchmean")

        return loss

    # --- quality ---

    def measure(
        self, form: Form, folder: Path, label: str, progress: Progress, *, against_dense: Path | None = None
    ) -> str:
        predict = self.predictor(form) if isinstance(form, nn.Module) else _session_predictor(form)
        config = self.recipe.evaluation
        total = config.samples or len(self.data.test)
        with progress.counter(f"evaluate {label}", total) as report:
            quality = evaluate_accuracy(predict, self.data.test, config.batch_size, config.samples, report)
        save_accuracy(quality, folder)
        return (
            f"accuracy {100 * quality.accuracy:.2f} ± {100 * quality.standard_error:.2f} % of {quality.samples} samples"
        )

    def measure_dense(self, folder: Path, progress: Progress) -> str:
        return self.measure(self.model, folder, "dense", progress)

    def describe_quality(self, folders: dict[Stage, Path]) -> tuple[AccuracyByStage, ImageDivergence]:
        results = {stage: load_accuracy(folder) for stage, folder in folders.items()}
        quality = AccuracyByStage(
            metric="accuracy",
            unit="fraction",
            samples=results["dense"].samples,
            standard_error={stage: result.standard_error for stage, result in results.items()},
            **{stage: result.accuracy for stage, result in results.items()},
        )
        return quality, divergence(results["onnx_native"].logits, results["dense"].logits)

    def describe_data(self) -> Samples:
        return Samples(
            source=self.recipe.data.source,
            hash=self.data_hash,
            train_samples=self.train_samples,
            calibration_samples=self.recipe.calibration.samples or self.train_samples,
            test_samples=check_samples(self.data.test, self.recipe.evaluation.samples),
        )

    # --- delivery ---

    @property
    def token_order(self) -> None:
        return None

    def rest_moments(self, paths: Collection[str]) -> None:
        return None

    def open_rest(self, folder: Path) -> nn.Module:
        base = copy.deepcopy(self.model)
        # Before rounding: what is interpolated here is stored too.
        fix_position_embeddings(base, self.image_size, self.image_size)
        base = install_rest(base, load_packed_rest(folder / PACKED_REST), self.recipe.export.accuracy_level)
        return round_to_float16(base) if self.recipe.quantization.rest.weights == "float16" else base

    def parity_batches(self) -> list[Tensor]:
        """Make batches of 1, 2, 4, … images, 64 in all if there are as many."""
        count = min(PARITY_IMAGES, len(self.data.test))
        images = self.data.test.batch(range(count))[0]
        sizes: list[int] = []
        left = count
        while left:
            sizes.append(min(1 << len(sizes), left))
            left -= sizes[-1]
        return list(images.split(sizes))

    def export_graph(self, stored: nn.Module, packed: PackedModel) -> ir.Model:
        return export_image_classifier(stored, (3, self.image_size, self.image_size))

    def golden(self, predict: Predict, tolerance: float) -> Golden:
        images = self.data.test.batch(range(min(GOLDEN_IMAGES, len(self.data.test))))[0]
        with torch.inference_mode():
            logits = predict(images)
        return Golden({"pixel_values": images.numpy()}, {"logits": logits.numpy()}, tolerance)

    def save_config(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        self.preprocessing.image_processor.save_pretrained(folder)

    def bench(self, artifact: Path) -> Benchmark:
        threads = os.cpu_count() or 1
        images = self.data.test.batch(range(min(BENCH_BATCH, len(self.data.test))))[0].numpy()
        baselines, left_out = dense_sessions(self.model, images, threads)
        seconds = seconds_per_run(artefact_sessions(artifact, threads) | baselines, images, BENCH_SECONDS)
        float32 = seconds.get(DENSE_FLOAT32)
        rows = tuple(
            ImageSpeedRow(
                backend=name,
                images_per_second=len(images) / value,
                ratio_to_float32=None if float32 is None else float32 / value,
            )
            for name, value in seconds.items()
        )
        speed = ImageSpeed(unit="images/s", batch=len(images), threads=threads, rows=rows, left_out=left_out)
        return Benchmark(speed=speed, memory=ArtifactMemory.model_validate(measure_memory(artifact)))


def _session_predictor(session: "onnxruntime.InferenceSession") -> Predict:
    def predict(pixel_values: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])

    return predict
