"""One evaluator of accuracy for every form of a classifier: PyTorch or ONNX Runtime, dense or compressed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from pipeline.data.images import ImageSplit
from pipeline.data.samples import check_samples_asked
from pipeline.evaluation.measurements import ImageDivergence
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import read_json, write_aside, write_json
from pipeline.plumbing.progress import OnProgress


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy as a fraction, with its binomial standard error; ``logits`` float32 [samples, labels]."""

    accuracy: float
    correct: int
    samples: int
    standard_error: float
    logits: Tensor


def evaluate_accuracy(
    predict: Callable[[Tensor], Tensor],
    split: ImageSplit,
    batch_size: int,
    samples: int | None = None,
    progress: OnProgress | None = None,
) -> Accuracy:
    """Measure the accuracy of ``predict`` (pixel values float32 [B, 3, H, W] → logits [B, labels]) on the first
    ``samples`` images of ``split``, all if None.

    Raises InputError when the split has fewer images or the logits are not finite.
    """
    total = check_samples(split, samples)
    parts = []
    correct = 0
    for start in range(0, total, batch_size):
        indices = range(start, min(start + batch_size, total))
        pixel_values, labels = split.batch(indices)
        with torch.no_grad():  # not inference_mode: the logits may serve as targets of distillation
            logits = predict(pixel_values).to(torch.float32)
        finite = torch.isfinite(logits).all(dim=1)
        if not finite.all():
            sample = start + int(torch.argmin(finite.int()))
            raise InputError(
                f"the logits of test sample {sample} are not finite: the weights or activations overflow, or "
                "training diverged (try a lower learning_rate)"
            )
        correct += int((logits.argmax(dim=1) == labels).sum())
        parts.append(logits)
        if progress is not None:
            progress(indices.stop, total, f"{correct / indices.stop:.2%} correct")
    accuracy = correct / total
    return Accuracy(accuracy, correct, total, float(np.sqrt(accuracy * (1 - accuracy) / total)), torch.cat(parts))


def check_samples(split: ImageSplit, samples: int | None) -> int:
    """Count the images of ``split`` that an evaluation takes: ``samples``, or all. Raises InputError when the split
    has fewer, or none."""
    total = len(split) if samples is None else samples
    check_samples_asked("evaluation", samples, "test", len(split))
    if total < 1:
        raise InputError(f"evaluation: {total} samples asked for, the test split has {len(split)}")
    return total


def divergence(logits: Tensor, dense_logits: Tensor) -> ImageDivergence:
    """Compute the divergence of ``logits`` from ``dense_logits``, both [samples, labels], on the same samples. Raises
    ValueError for other shapes."""
    if logits.shape != dense_logits.shape:
        raise ValueError(f"logits of shape {list(logits.shape)} against {list(dense_logits.shape)}")
    log_p = torch.log_softmax(dense_logits.double(), dim=1)
    log_q = torch.log_softmax(logits.double(), dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).clamp(min=0.0)
    same = (logits.argmax(dim=1) == dense_logits.argmax(dim=1)).double().mean()
    return ImageDivergence(kl_mean=float(kl.mean()), kl_p99=float(kl.quantile(0.99)), same_top1=float(same))


def save_accuracy(quality: Accuracy, folder: Path) -> None:
    """Write ``quality.json`` and the logits beside it into ``folder``."""
    fields = {key: value for key, value in asdict(quality).items() if key != "logits"}
    write_aside(folder / "logits.safetensors", lambda path: save_file({"logits": quality.logits.numpy()}, path))
    write_json(folder / "quality.json", fields)


def load_accuracy(folder: Path) -> Accuracy:
    """Read what :func:`save_accuracy` has written into ``folder``."""
    logits = torch.from_numpy(load_file(folder / "logits.safetensors")["logits"])
    return Accuracy(**read_json(folder / "quality.json"), logits=logits)
