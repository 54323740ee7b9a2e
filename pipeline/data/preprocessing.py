"""Preprocessing of images into a model's input, by the image processor that is saved beside the artefact."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """A Pillow-backed transformers image processor and what is known of the model before it is loaded.

    ``image_size``: height and width of the model's input. ``labels``: the model's label names by class index;
    None when the model is trained in the run and takes the labels of the data.
    """

    image_processor: Any
    image_size: int
    labels: tuple[str, ...] | None = None

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """Pixel values, float32 [B, 3, image_size, image_size], of RGB images."""
        pixel_values = self.image_processor(list(images), return_tensors="pt")["pixel_values"]
        return pixel_values.to(torch.float32)

    @property
    def key(self) -> str:
        """What the pixel values depend on, as canonical JSON."""
        return json.dumps([self.image_processor.to_dict(), self.image_size], sort_keys=True, default=str)
