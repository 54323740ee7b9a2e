"""Fake quantization of one matrix in the layouts that an artefact can store.

torchao's ``IntxFakeQuantizer`` does the rounding, one per segment (each has its own bit-width). What we add:
segments, scales that are exactly representable as the float16 that gets stored, and midrise levels, which
torchao expresses as a float zero point of half a scale (``ZeroPointDomain.FLOAT``).

Level ``q`` in ``-2**(b-1) … 2**(b-1)-1`` stands for ``q * scale`` (midtread) or ``(q + 0.5) * scale``
(midrise); rounding is half to even of ``w / scale`` (minus the half). With a float16 scale both products are
exact in float32, so codes reproduce the fake-quantized values bit by bit.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer
from torchao.quantization.quant_primitives import MappingType, ZeroPointDomain

from fips_ort.layout import BIT_WIDTHS, Layout

# The sub-byte dtypes are missing from torch's type stubs.
_DTYPES: dict[int, torch.dtype] = {bits: getattr(torch, f"int{bits}") for bits in BIT_WIDTHS}

SMALLEST_SCALE = 2.0**-20
"""Scales are kept at or above this: below it, numbers of float16 have few significant bits left."""
LARGEST_SCALE = float(np.finfo(np.float16).max)

CLIP_RATIOS = np.linspace(0.3, 1.0, 15)
"""Fractions of a block's largest magnitude among which its clipping range is searched."""


class FakeQuantizer(nn.Module):
    """Fake-quantizes a [rows, columns] float32 matrix as ``layout`` will store it.

    ``scale = float16(initial_scale * exp(log_gain))`` with one learnable ``log_gain`` per block when
    ``learned_scales`` (relative steps suit AdamW whatever the magnitude); gradients follow LSQ
    (arXiv 1902.08153), which is what torchao's straight-through rounding gives. Blocks whose initial scale is 0 are
    zero, whatever is in them: so midrise, which has no level at zero, keeps what was pruned.
    """

    initial_scale: Tensor

    def __init__(self, layout: Layout, initial_scale: Tensor, *, learned_scales: bool) -> None:
        super().__init__()
        if initial_scale.shape != layout.scales_shape:
            raise ValueError(f"scales have shape {tuple(initial_scale.shape)}, expected {layout.scales_shape}")
        self.layout = layout
        self.register_buffer("initial_scale", initial_scale.detach().float().clone())
        self.log_gain = nn.Parameter(torch.zeros(layout.scales_shape), requires_grad=learned_scales)
        domain = ZeroPointDomain.FLOAT if layout.midrise else ZeroPointDomain.INT
        self._segments = [
            (
                rows,
                columns,
                IntxFakeQuantizer(
                    IntxFakeQuantizeConfig(
                        _DTYPES[bits],
                        PerGroup(layout.block_size),
                        MappingType.SYMMETRIC,
                        is_dynamic=False,
                        zero_point_domain=domain,
                    )
                ),
            )
            for bits, rows, columns in layout.submatrices()
        ]

    def scale(self) -> Tensor:
        """Current scales: float32 [rows, blocks], each exactly a float16 value; straight-through gradient."""
        scale = (self.initial_scale * self.log_gain.exp()).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        scale = scale + (scale.half().float() - scale).detach()
        absent = self.initial_scale == 0
        return scale.masked_fill(absent, 0.0) if absent.any() else scale

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix with every entry replaced by its nearest level: float32 [rows, columns]."""
        scale, absent = self.scale(), self.initial_scale == 0
        some_absent, block = bool(absent.any()), self.layout.block_size
        if some_absent:
            scale = scale.masked_fill(absent, 1.0)
        parts = []
        for rows, columns, quantizer in self._segments:
            quantizer.scale = scale[rows, columns.start // block : columns.stop // block]
            quantizer.zero_point = quantizer.scale * 0.5 if self.layout.midrise else torch.zeros_like(quantizer.scale)
            parts.append(quantizer(weight[rows, columns]))
        result = torch.cat(parts, dim=self.layout.segment_axis)
        return result.masked_fill(absent.repeat_interleave(block, dim=1), 0.0) if some_absent else result

    def levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``forward`` computes as (levels int8 [rows, columns], scales float16 [rows, blocks])."""
        with torch.no_grad():
            scale = self.scale()
            per_entry = scale.repeat_interleave(self.layout.block_size, dim=1)
            # Exact: forward() returns an integer (and a half) times a float16 scale.
            ratio = self.forward(weight) / per_entry.masked_fill(per_entry == 0, 1.0)
            return torch.round(ratio - 0.5 * self.layout.midrise).to(torch.int8), scale.half()


def half_of_levels(layout: Layout) -> Tensor:
    """Half the number of levels that the entries of a block have, ``2**(bits-1)``: float32 [rows, blocks]."""
    result = torch.empty(layout.scales_shape)
    for bits, rows, columns in layout.submatrices():
        result[rows, columns.start // layout.block_size : columns.stop // layout.block_size] = 2.0 ** (bits - 1)
    return result


def search_scales(weight: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """Search scales to start from: for each block, the clipping range with the smallest squared error over the kept
    entries, among the fractions :data:`CLIP_RATIOS` of the block's largest magnitude.

    ``weight`` float32 [rows, columns], ``mask`` bool of the same shape or None; returns float32 [rows, blocks]. Midrise
    blocks of zeros have scale 0.
    """
    kept = weight.detach() if mask is None else weight.detach() * mask
    blocks = kept.reshape(layout.rows, -1, layout.block_size)
    largest = blocks.abs().amax(dim=2)
    half_range = half_of_levels(layout) - 0.5
    best_scale = (largest / half_range).clamp(min=SMALLEST_SCALE)
    best_error = torch.full(layout.scales_shape, torch.inf)
    for ratio in CLIP_RATIOS:
        scale = (largest / half_range * float(ratio)).clamp(min=SMALLEST_SCALE)
        quantizer = FakeQuantizer(layout, scale, learned_scales=False)
        with torch.no_grad():
            error = quantizer(kept) - kept
            if mask is not None:
                error = error * mask
            error = error.square().reshape(blocks.shape).sum(dim=2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale.masked_fill(largest == 0, 0.0) if layout.midrise else best_scale
