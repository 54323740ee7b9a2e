"""Models whose weights outside the MLPs are packed, rounded to nearest."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from exporters.packed_rest import PackedRest
from exporters.rest import install_rest
from pipeline.quantization.rest_layers import token_tables
from pipeline.quantization.rest_start import token_bits
from pipeline.quantization.rest_weights import quantize_rows, quantize_table
from pipeline.recipe.schema import Tier


def linears_outside(model: Any, skip: Collection[str] = ()) -> dict[str, nn.Linear]:
    """Linear layers of a model by path, but for the output layer and those to ``skip``."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in skip
    }


def with_packed_linears(
    model: nn.Module, bits: int, block_size: int, skip: Collection[str] = (), accuracy_level: int = 0
) -> nn.Module:
    """A copy of a model with all its linear layers packed but the output layer and those to ``skip``."""
    linears = linears_outside(model, skip)
    packed = {name: quantize_rows(linear.weight, bits, block_size) for name, linear in linears.items()}
    return install_rest(model, PackedRest(linears=packed), accuracy_level)


def with_packed_tables(
    model: Any, bits: int | Sequence[Tier], block_size: int, accuracy_level: int = 0, seed: int = 0
) -> nn.Module:
    """A copy of a language model with token table and output layer packed; with tiers, tokens are as frequent as a
    random number says."""
    rows = model.config.vocab_size
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    row_bits = torch.full((rows,), bits, dtype=torch.uint8) if isinstance(bits, int) else token_bits(bits, order)
    packed = {name: quantize_table(table, row_bits, block_size) for name, (table, _) in token_tables(model).items()}
    return install_rest(model, PackedRest(tables=packed), accuracy_level)
