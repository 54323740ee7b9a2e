"""Matrices in layouts that are larger than they are: rows and columns of zeros fill up what is stored."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fips_ort.layout import Layout


def missing(layout: Layout, matrix: Tensor) -> tuple[int, int]:
    """(rows, columns) that ``matrix`` lacks of its layout. Raises ValueError if it has more than the layout."""
    rows, columns = layout.rows - matrix.shape[0], layout.columns - matrix.shape[1]
    if min(rows, columns) < 0:
        raise ValueError(f"a matrix of shape {tuple(matrix.shape)} is larger than its layout, {layout_shape(layout)}")
    return rows, columns


def layout_shape(layout: Layout) -> tuple[int, int]:
    """(rows, columns) of a layout."""
    return layout.rows, layout.columns


def padded(matrix: Tensor, layout: Layout) -> Tensor:
    """``matrix`` [at most rows, at most columns] with zeros (False) in the last rows and columns of its layout."""
    rows, columns = missing(layout, matrix)
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def present(matrix: Tensor, layout: Layout) -> Tensor | None:
    """Where in the layout ``matrix`` has entries: bool [rows, columns], or None if everywhere."""
    if missing(layout, matrix) == (0, 0):
        return None
    return padded(torch.ones(matrix.shape, dtype=torch.bool), layout)


def padded_mask(mask: Tensor, layout: Layout) -> Tensor:
    """``mask`` bool in the shape of its layout: what fills up is not kept, but for what an n:m pattern has to keep of
    each of its groups."""
    result, pattern = padded(mask, layout), layout.pattern
    inside = present(mask, layout)
    if inside is None or not pattern.is_n_of_m:
        return result
    groups, outside = result.reshape(-1, pattern.of), ~inside.reshape(-1, pattern.of)
    lacking = pattern.keep - groups.sum(dim=1, keepdim=True)
    return (groups | (outside & (outside.cumsum(dim=1) <= lacking))).reshape(result.shape)
