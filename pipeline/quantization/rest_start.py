"""Starting codes for the weights outside the MLPs: nearest, or from second moments of their inputs (GPTQ)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporters.packed_rest import PackedRest, PackedTable
from pipeline.quantization.rest_layers import RestBits, token_tables
from pipeline.quantization.rest_weights import quantize_rows, quantize_table
from pipeline.recipe.schema import Tier
from qat.damping import damped

TIED_TABLE_DAMPING = 3.0
"""A tied table is read in two ways: rows are multiplied with final hidden states, and looked up as they are. Its
moment is that of the hidden states plus this part of their mean energy times the identity.

Gemma 3 270M, only the table stored (8 bits for 16,384 tokens, 4 for 49,152, 2 for the others, blocks of 64), perplexity
of training documents that no tier has counted, times dense: 1.079 rounded to nearest, 1.047 so, 1.062 with a part of
30. With 0.3, rows of 2 bits are off by 0.27 of their energy, and texts with rare tokens pay for it."""


@torch.no_grad()
def linear_moments(
    run: Callable[[Tensor], object], linears: Mapping[str, nn.Linear], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Second moments float32 [in, in] of the inputs of linear layers, by name; of layers that read the same input,
    one tensor."""
    sums: dict[str, Tensor] = {}
    latest: list[tuple[Tensor, str]] = []
    source: dict[str, str] = {}
    tokens = 0

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal tokens
            seen = next((first for tensor, first in latest if tensor is arguments[0]), None)
            source[name] = seen or name
            if seen is not None:
                return
            latest[:] = [(arguments[0], name)]  # no more: all inputs of a large model together are gigabytes
            x = arguments[0].reshape(-1, arguments[0].shape[-1])
            sums[name] = sums.get(name, 0.0) + (x.T @ x).double()

        return hook

    handles = [linear.register_forward_pre_hook(record(name)) for name, linear in linears.items()]
    try:
        for batch in batches:
            run(batch)
            tokens += batch.numel()
            latest.clear()
    finally:
        for handle in handles:
            handle.remove()
    means = {name: (total / tokens).float() for name, total in sums.items()}
    return {name: means[source[name]] for name in linears}


def tied_moment(hidden: Tensor) -> Tensor:
    """The moment by which a table is rounded that is both looked up and multiplied with ``hidden`` (moment [d, d])."""
    return damped(hidden, TIED_TABLE_DAMPING)


def token_bits(tiers: Sequence[Tier], order: Tensor) -> Tensor:
    """Bits of every token's row: uint8 [tokens]. ``order``: all tokens, int64 [tokens]; those that come first are in
    the first tier."""
    result = torch.empty(len(order), dtype=torch.uint8)
    start = 0
    for tier in tiers:
        stop = len(order) if tier.tokens is None else start + tier.tokens
        result[order[start:stop]] = tier.bits
        start = stop
    return result


def start_rest(
    model: Any,
    bits: Mapping[str, RestBits],
    block_size: int,
    *,
    order: Tensor | None = None,
    moments: "RestMoments | None" = None,
    on_start: Callable[[str], object] = lambda _: None,
) -> PackedRest:
    """Find the codes of linear layers and tables of tokens of ``model`` that have ``bits``, by path.

    ``block_size``: values that share a scale, at most. ``order``: of a language model's tokens, the most frequent
    first (int64 [tokens]); only tiers ask for it. With ``moments`` codes are those that GPTQ finds, else the nearest; a
    table that is only looked up is rounded to nearest in any case. ``on_start`` is called with each path in turn.
    """
    packed = PackedRest()
    tables = token_tables(model) if model.get_output_embeddings() is not None else {}
    for name, width in bits.items():
        on_start(name)
        if name not in tables:
            assert isinstance(width, int)
            moment = None if moments is None else moments.linears[name]
            linear: Any = model.get_submodule(name)
            packed.linears[name] = quantize_rows(linear.weight, width, block_size, moment)
            continue
        weight, role = tables[name]
        moment = None
        if moments is not None and role != "input":
            moment = tied_moment(moments.hidden) if role == "tied" else moments.hidden
        if isinstance(width, int):
            packed.tables[name] = PackedTable(quantize_rows(weight, width, block_size, moment))
        else:
            assert order is not None
            packed.tables[name] = quantize_table(weight, token_bits(width, order), block_size, moment)
    return packed


@dataclass(frozen=True)
class RestMoments:
    """Second moments of what weights outside the MLPs read. ``linears``: float32 [in, in] of the inputs of linear
    layers, by name. ``hidden``: float32 [d, d], the sum over all tokens of those of the final hidden states."""

    linears: Mapping[str, Tensor]
    hidden: Tensor


@dataclass(frozen=True)
class RestCalibration:
    """What second moments are taken on. ``run``: token ids to final hidden states [tokens, d]."""

    run: Callable[[Tensor], Tensor]
    batches: Iterable[Tensor]

    def moments(self, linears: Mapping[str, nn.Linear]) -> RestMoments:
        """Second moments of the inputs of ``linears`` (:func:`linear_moments`) and of the final hidden states."""
        hidden: list[Tensor] = []

        def run_and_sum(batch: Tensor) -> None:
            states = self.run(batch)
            hidden.append((states.T @ states).double())

        moments = linear_moments(run_and_sum, linears, self.batches)
        return RestMoments(moments, torch.stack(hidden).sum(dim=0).float())
