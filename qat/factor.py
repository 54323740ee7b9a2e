"""One factor of the factorization: a trainable matrix, optionally masked, optionally fake-quantized."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fips_ort.layout import DENSE, Layout
from fips_ort.packed import PackedWeight, dequantize, pack
from qat.fake_quantize import FakeQuantizer, search_scales
from qat.gptq import gptq
from qat.padding import padded, padded_mask, present

WITHIN_CELL = 0.5
"""How far from its level an entry may start, as a part of the way to the border of the level's cell. Learned scales
move these borders. With 0.98, so many entries fell into other cells within ten steps that Gemma 3 270M's divergence
from the dense model rose by 60 %; with 0.5 it fell by 4 %."""


class Factor(nn.Module):
    """A [rows, columns] matrix in the orientation in which it will be stored.

    ``weight`` (the parameter) has rows of about unit RMS and ``gain`` (fixed, [rows, 1]) carries their
    magnitudes, which differ by orders of magnitude between rank entries: so one learning rate suits all rows.
    ``mask`` (bool, or None if dense) is exact: masked entries of ``forward()`` are zero.

    It may be stored in a layout with more rows and columns, whose blocks are whole. What they hold is zero or is
    multiplied with zero (rows: of the layout, exactly zero), and no part of ``forward()``.
    """

    gain: Tensor
    mask: Tensor | None

    def __init__(self, matrix: Tensor, mask: Tensor | None = None) -> None:
        super().__init__()
        if matrix.dim() != 2:
            raise ValueError(f"a factor is a matrix, got shape {tuple(matrix.shape)}")
        gain = matrix.detach().square().mean(dim=1, keepdim=True).sqrt()
        gain = torch.where(gain > 0, gain, torch.ones_like(gain))
        self.register_buffer("gain", gain)
        self.weight = nn.Parameter((matrix.detach() / gain).contiguous())
        self.register_buffer("mask", None if mask is None else mask.to(torch.bool, copy=True))
        self.quantizer: FakeQuantizer | None = None
        self.track_dense_gradient = False
        self.dense_gradient_source: Tensor | None = None

    def forward(self) -> Tensor:
        """The matrix as the model sees it: float32 [rows, columns]."""
        matrix = self.weight * self.gain
        if self.quantizer is not None:
            rows, columns = matrix.shape
            matrix = self.quantizer(padded(matrix, self.quantizer.layout))[:rows, :columns]
        if self.mask is None:
            return matrix
        masked = matrix * self.mask
        if self.track_dense_gradient and masked.requires_grad:
            # RigL grows entries by the gradient of the loss with respect to *all* entries, masked ones too.
            masked.retain_grad()
            self.dense_gradient_source = masked
        return masked

    def permute(self, entries: Tensor, *, axis: int) -> None:
        """Reorder rows (``axis`` 0) or columns (1) in place: entry ``i`` becomes what was entry ``entries[i]``.

        Raises ValueError once the factor is prepared: a layout's segments belong to the entries as they were.
        """
        if self.quantizer is not None:
            raise ValueError("permute() a factor before preparing it")
        with torch.no_grad():
            self.weight.copy_(self.weight.index_select(axis, entries))
            if axis == 0:
                self.gain.copy_(self.gain.index_select(0, entries))
            if self.mask is not None:
                self.mask.copy_(self.mask.index_select(axis, entries))

    def prepare(
        self, layout: Layout, *, learned_scales: bool, moment: Tensor | None = None, target: Tensor | None = None
    ) -> None:
        """Start fake quantization in ``layout``.

        Without ``moment``, the values stay and scales are searched for them. ``moment`` [columns, columns] is the
        second moment of the inputs that the matrix is multiplied with, over its columns; given it,
        :func:`qat.gptq.gptq` finds levels and scales, and every value moves into the cell of its level. ``target``
        [rows, columns]: the matrix that these levels are to stand for, by default the current one. Masked entries stay
        zero whatever ``target`` has there; the others make up for it. Raises ValueError if there is a mask and the
        layout is dense, or none and it is not.
        """
        if (layout.pattern == DENSE) != (self.mask is None):
            raise ValueError(f"pattern {layout.pattern} does not go with {'no' if self.mask is None else 'a'} mask")
        with torch.no_grad():
            matrix = self.weight * self.gain
            if moment is None:
                kept = present(matrix, layout) if self.mask is None else padded(self.mask, layout)
                scales = search_scales(padded(matrix, layout), kept, layout)
            else:
                wanted = self() if target is None else target
                rows = len(wanted)
                own = layout if rows == layout.rows else replace(layout, rows=rows)
                values, scales = gptq(wanted, moment, own, self.mask)
                scales = F.pad(scales, (0, 0, 0, layout.rows - rows))
                # On the side of its level where what is wanted lies: from the middle of a cell, an entry would be
                # longer on its way to another level.
                cells = scales.repeat_interleave(layout.block_size, dim=1)[:rows, : values.shape[1]]
                reach = WITHIN_CELL * 0.5 * cells
                self.weight.copy_(torch.clamp(wanted, values - reach, values + reach) / self.gain)
        self.quantizer = FakeQuantizer(layout, scales, learned_scales=learned_scales)
        if moment is not None and not torch.equal(self(), values):
            raise AssertionError("fake quantization does not reproduce the levels it starts from")

    def prepare_to_load(self, layout: Layout, *, learned_scales: bool) -> None:
        """Start fake quantization in ``layout`` with scales of 1, for a state dict that is loaded next."""
        self.quantizer = FakeQuantizer(layout, torch.ones(layout.scales_shape), learned_scales=learned_scales)

    def freeze(self) -> PackedWeight:
        """Pack integer codes that stand for exactly the values of ``forward()``.

        Raises ValueError if the factor is not prepared, AssertionError if a value would change.
        """
        if self.quantizer is None:
            raise ValueError("prepare() a factor before freezing it")
        with torch.no_grad():
            layout = self.quantizer.layout
            levels, scales = self.quantizer.levels(padded(self.weight * self.gain, layout))
            mask = None if self.mask is None else padded_mask(self.mask, layout).numpy()
            packed = pack(levels.numpy(), scales.numpy(), mask, layout)
            rows, columns = self.weight.shape
            values = torch.from_numpy(dequantize(packed))
            if not torch.equal(values[:rows, :columns], self.forward()) or values[rows:].any():
                raise AssertionError("integer codes do not reproduce the fake-quantized factor")
        return packed
