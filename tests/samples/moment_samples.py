"""Inputs with second moments far from the identity, and errors in the norm that they make."""

import torch
from torch import Tensor

from fips_ort.packed import PackedWeight, dequantize


def correlated(columns: int, seed: int = 0, count: int = 400) -> Tensor:
    """Inputs [count, columns] whose columns differ in magnitude and go together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    noise = torch.randn(count, columns, generator=generator)
    return (torch.randn(count, columns // 4, generator=generator) @ mixing + 0.3 * noise) * torch.logspace(
        -1, 1, columns
    )


def moment_of(x: Tensor) -> Tensor:
    """The second moment [columns, columns] of inputs [count, columns]."""
    return x.T @ x / len(x)


def error(values: Tensor, weight: Tensor, moment: Tensor) -> float:
    """Squared error of the products with inputs of this second moment, summed over the rows."""
    E = (values - weight).double()
    return float(((E @ moment.double()) * E).sum())


def values_of(weight: PackedWeight) -> Tensor:
    """What a packed weight stands for: float32 [rows, columns]."""
    return torch.from_numpy(dequantize(weight))
