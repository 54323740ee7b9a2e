"""A recipe's image classifier: trained in the run, loaded from a checkpoint, or rebuilt from a packaged ONNX file."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.exporters.tasks import TasksManager
from PIL import Image
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, BitImageProcessorPil, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pipeline.data.images import ImageData, TensorSplit
from pipeline.data.packages import package_file
from pipeline.data.preprocessing import Preprocessing
from pipeline.models.adapters import check_model_type
from pipeline.models.checkpoint import CONFIG_ERRORS, load_checkpoint_config, load_weights, loading
from pipeline.models.classifier_training import random_affine, train_classifier
from pipeline.models.packaged_dinov2 import load_classifier
from pipeline.models.weights import check_finite, hash_model
from pipeline.plumbing.errors import InputError, one_line
from pipeline.plumbing.progress import Progress
from pipeline.recipe.schema import (
    DigitsData,
    ImageDataSection,
    ImageModelSection,
    PackagedOnnxModel,
    PretrainedModel,
    ScratchModel,
    Training,
)

ATTENTION = "eager"
"""Transformers' name of attention in plain MatMul and Softmax nodes: exports to any opset and gives the same bits on
every run."""
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}
_FEATURE_BATCH = 64
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where transformers saves an image processor, or a processor that has one."""


@dataclass(frozen=True)
class LoadedModel:
    """A dense image classifier in evaluation mode, float32, without dropout.

    ``model(pixel_values=float32 [B, 3, H, W]).logits`` is float32 [B, labels]. ``source_hash``: SHA-256 of
    configuration and weights, wherever they came from.
    """

    model: nn.Module
    source_hash: str


def load_preprocessing(model: ImageModelSection, data: ImageDataSection) -> Preprocessing:
    """The image processor, input size and label names of a recipe's model, before its weights are loaded.

    Raises InputError for a model that is not found, of an unknown type, or of another image size than the data's.
    """
    if isinstance(model, ScratchModel):
        preprocessing = _scratch_preprocessing(model)
    elif isinstance(model, PackagedOnnxModel):
        preprocessing = _packaged_preprocessing(model)
    else:
        preprocessing = _pretrained_preprocessing(model)
    if isinstance(data, DigitsData) and data.image_size != preprocessing.image_size:
        raise InputError(
            f"data.image_size: {data.image_size} is not the model's image size, {preprocessing.image_size}"
        )
    return preprocessing


def load_model(
    section: ImageModelSection,
    data: ImageData,
    seed: int,
    progress: Progress,
    checkpoint: Path | None = None,
) -> LoadedModel:
    """The dense image classifier of a recipe, trained on ``data.train`` where the recipe says so.

    A training that was killed goes on from ``checkpoint``. Raises InputError when the model cannot be found
    or built, lacks weights, or has weights that are not finite.
    """
    if isinstance(section, ScratchModel):
        model = _train_scratch(section, data, seed, progress, checkpoint)
    elif isinstance(section, PackagedOnnxModel):
        model = _packaged_with_head(section, data, seed, progress, checkpoint)
    else:
        model = _pretrained(section)
    model.eval().requires_grad_(True)
    check_finite(model)
    config: Any = model.config
    config.id2label = dict(enumerate(data.labels))
    config.label2id = {label: index for index, label in enumerate(data.labels)}
    return LoadedModel(model, hash_model(model))


# --- scratch ---------------------------------------------------------------------------------------------------


def _scratch_preprocessing(section: ScratchModel) -> Preprocessing:
    config = _scratch_config(section, labels=2)
    _check_channels(config, "model.config.num_channels")
    size = _square(config.image_size, "model.config.image_size")
    return Preprocessing(ViTImageProcessorPil(size={"height": size, "width": size}), size)


def _scratch_config(section: ScratchModel, labels: int) -> Any:
    check_model_type(section.model_type, "image-classification")
    config_class = CONFIG_MAPPING[section.model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    for key, value in section.config.items():
        if key not in known or key in ("num_labels", "id2label", "label2id"):
            raise InputError(
                f"model.config.{key}: not a setting of a {section.model_type} model (the labels come from the data)"
            )
        if key in _NO_DROPOUT and value:
            raise InputError(f"model.config.{key}: got {value!r}; dropout is not supported, leave it out")
    dropout = {key: value for key, value in _NO_DROPOUT.items() if key in known}
    try:
        config = AutoConfig.for_model(section.model_type, **{**dropout, **section.config}, num_labels=labels)
    except CONFIG_ERRORS as error:
        raise InputError(f"model.config: {' '.join(str(error).split())}") from None
    # DeiT has two image classifiers; without this, transformers cannot choose.
    config.architectures = [f"{config_class.__name__.removesuffix('Config')}ForImageClassification"]
    return config


def _train_scratch(
    section: ScratchModel, data: ImageData, seed: int, progress: Progress, checkpoint: Path | None
) -> nn.Module:
    config = _scratch_config(section, len(data.labels))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = model_class().from_config(config, attn_implementation=ATTENTION)
        except CONFIG_ERRORS as error:
            raise InputError(f"model.config: {' '.join(str(error).split())}") from None
    model.train()
    augment = random_affine if section.augmentation == "affine" else None
    train_classifier(
        model,
        lambda pixel_values: model(pixel_values=pixel_values).logits,
        data.train,
        section.training,
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
        augment=augment,
    )
    return model


# --- pretrained ------------------------------------------------------------------------------------------------


def _pretrained_preprocessing(section: PretrainedModel) -> Preprocessing:
    where = f"model.path: {section.path}"
    config = load_checkpoint_config(section.path, section.revision, where)
    check_model_type(config.model_type, "image-classification")
    _check_channels(config, f"{where}: num_channels")
    size = _square(config.image_size, f"{where}: image_size")
    labels = _labels(config, where)
    folder = Path(section.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise InputError(
            f"{where}: it has no {_PROCESSOR_FILES[0]}, which says how images are prepared for the model; save its "
            "image processor there (save_pretrained)"
        )
    processor = _from_hub(section, AutoImageProcessor.from_pretrained, backend="pil")
    preprocessing = Preprocessing(processor, size, labels)
    _check_processor(preprocessing, where)
    return preprocessing


def _labels(config: Any, where: str) -> tuple[str, ...]:
    """The model's label names by class index. Raises InputError where one is missing."""
    names = config.id2label
    if sorted(names) != list(range(len(names))):
        raise InputError(
            f"{where}: id2label names the classes {sorted(names)}, which are not all from 0 to {len(names) - 1}; "
            "complete it in config.json"
        )
    return tuple(str(names[index]) for index in range(len(names)))


def _check_processor(preprocessing: Preprocessing, where: str) -> None:
    """Raise InputError unless images of any size become what the model takes."""
    size = preprocessing.image_size
    for probe in ((2 * size, 3 * size), (3 * size, 2 * size), (size // 2 + 1, size // 2 + 1)):
        try:
            with np.errstate(all="ignore"):
                pixel_values = preprocessing([Image.new("RGB", probe, "grey")])
        except Exception as error:  # whatever settings that do not fit together make of it
            raise InputError(
                f"{where}: its image processor ({_PROCESSOR_FILES[0]}) cannot prepare an image: {one_line(error)}"
            ) from None
        height, width = pixel_values.shape[2:]
        if (height, width) != (size, size):
            raise InputError(
                f"{where}: its image processor makes images of {height}x{width}, the model takes {size}x{size}; mend "
                f"{_PROCESSOR_FILES[0]} (do_resize, size, do_center_crop)"
            )
        if pixel_values.shape[1] != 3:
            raise InputError(
                f"{where}: its image processor makes images of {pixel_values.shape[1]} channels, the model takes 3"
            )
        if not torch.isfinite(pixel_values).all():
            raise InputError(
                f"{where}: its image processor makes values that are not finite; mend {_PROCESSOR_FILES[0]} (image_std)"
            )


def _pretrained(section: PretrainedModel) -> nn.Module:
    config = load_checkpoint_config(section.path, section.revision, f"model.path: {section.path}")
    for key, value in _NO_DROPOUT.items():
        if hasattr(config, key):
            setattr(config, key, value)
    model: nn.Module = load_weights(
        partial(_from_hub, section, model_class().from_pretrained, config=config),
        f"model.path: {section.path}",
        "a fine-tuned image classifier",
        attention=ATTENTION,
    )
    return model


def _from_hub(section: PretrainedModel, load: Any, **options: Any) -> Any:
    with loading(f"model.path: {section.path}"):
        return load(section.path, revision=section.revision or "main", trust_remote_code=False, **options)


# --- packaged --------------------------------------------------------------------------------------------------


def _packaged_preprocessing(section: PackagedOnnxModel) -> Preprocessing:
    package_file(section.package, section.file, "model")
    processor = BitImageProcessorPil(
        size={"height": section.image_size, "width": section.image_size},
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    return Preprocessing(processor, section.image_size)


def _packaged_with_head(
    section: PackagedOnnxModel, data: ImageData, seed: int, progress: Progress, checkpoint: Path | None
) -> nn.Module:
    path = package_file(section.package, section.file, "model")
    model = load_classifier(path, section.image_size, len(data.labels))
    model.set_attn_implementation(ATTENTION)
    model.eval()
    model.classifier = train_head(model, data, section.head, seed, progress, checkpoint)
    return model


def train_head(
    model: nn.Module,
    data: ImageData,
    training: Training,
    seed: int,
    progress: Progress,
    checkpoint: Path | None = None,
) -> nn.Linear:
    """Train a linear classifier on the features that reach ``model.classifier``, which is not changed.

    The features [n, f] are computed once and standardised; the standardisation is folded into the returned layer.
    """
    features, labels = _features(model, data, progress)
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    head = nn.Linear(features.shape[1], len(data.labels))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    split = TensorSplit((features - mean) / deviation, labels)
    train_classifier(head, head, split, training, seed=seed, progress=progress, checkpoint=checkpoint)
    with torch.no_grad():
        head.weight.div_(deviation)
        head.bias.sub_(head.weight @ mean)
    return head


def _features(model: nn.Module, data: ImageData, progress: Progress) -> tuple[Tensor, Tensor]:
    """Inputs of ``model.classifier``, [n, f], and labels [n] of the whole train split."""
    starts = range(0, len(data.train), _FEATURE_BATCH)
    captured: list[Tensor] = []
    labels: list[Tensor] = []
    hook = model.get_submodule("classifier").register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        with torch.no_grad(), progress.task("features of the training images", len(starts)) as advance:
            for start in starts:
                inputs, batch_labels = data.train.batch(range(start, min(start + _FEATURE_BATCH, len(data.train))))
                model(pixel_values=inputs)
                labels.append(batch_labels)
                advance(1, "")
    finally:
        hook.remove()
    return torch.cat(captured), torch.cat(labels)


# --- shared ----------------------------------------------------------------------------------------------------


def load_config(section: ImageModelSection, labels: int) -> Any:
    """The configuration of a recipe's model; ``labels``: their number, where the model takes them from the data."""
    if isinstance(section, ScratchModel):
        return _scratch_config(section, labels)
    if isinstance(section, PackagedOnnxModel):
        path = package_file(section.package, section.file, "model")
        return load_classifier(path, section.image_size, labels).config
    return load_checkpoint_config(section.path, section.revision, f"model.path: {section.path}")


def model_class() -> Any:
    """The class of image classifiers, as optimum resolves the task."""
    return TasksManager.get_model_class_for_task("image-classification")


def _check_channels(config: Any, where: str) -> None:
    """Raise InputError for a model of other than RGB images, which is what transformers reads, too."""
    if config.num_channels != 3:
        raise InputError(
            f"{where}: {config.num_channels}: images are read as RGB, as transformers reads them, so only models of 3 "
            "channels are supported"
        )


def _square(size: Any, where: str) -> int:
    """The one number of a square image size given as an int or as (height, width)."""
    sides = [*size] if isinstance(size, list | tuple) else [size]
    if not 1 <= len(sides) <= 2 or any(type(side) is not int or side < 1 for side in sides):
        raise InputError(f"{where}: {size} is no size of an image; give a number of pixels")
    if len(set(sides)) != 1:
        raise InputError(f"{where}: {size} is not square; only square images are supported")
    return int(sides[0])
