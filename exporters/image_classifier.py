"""A transformers image classifier with packed MLPs → the ONNX graph of its artefact.

Inputs and outputs follow optimum's conventions: ``pixel_values`` float32 [batch, channels, height, width] →
``logits`` float32 [batch, labels]; only the batch is dynamic.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters import passes
from exporters.joined_products import join_products
from exporters.rest import packed_rest


class _Logits(nn.Module):
    """The classifier as a function of pixel values alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


_PREFIX = "model."


def export_image_classifier(model: nn.Module, pixel_shape: tuple[int, int, int]) -> ir.Model:
    """Export ``model`` (a ``…ForImageClassification`` in eval mode) for images of ``pixel_shape`` (C, H, W).

    Float32 weights whose numbers are all float16 numbers are stored as float16 (see
    :func:`exporters.rest.round_to_float16`). The result is a pure function of the weights. Raises ValueError if
    the model is in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before the export")
    example = torch.zeros(2, *pixel_shape)
    with _eager_attention(model), _quiet():
        program = torch.onnx.export(
            _Logits(model),
            (example,),
            dynamo=True,
            opset_version=passes.OPSET,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    exported = program.model
    tensors = {
        name: tensor.detach().cpu().numpy()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    passes.name_nodes(exported, _PREFIX)
    passes.name_initializers(exported, _PREFIX, tensors)
    join_products(exported, packed_rest(model).linears)
    passes.deduplicate_initializers(exported)
    passes.store_float16(exported)
    passes.finish(exported, type(model).__name__)
    return exported


@contextlib.contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Let ``model`` compute attention as plain matrix products: fused attention exports to shape arithmetic, and cannot
    be exported at all for Swin."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings about its own internals; errors still arrive as exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
