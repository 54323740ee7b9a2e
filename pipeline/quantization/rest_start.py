"""Starting codes for the weights of a language model outside its MLPs, from second moments of their inputs (GPTQ)."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from exporters.nbits import NBitsTable, block_size_for, table_of_codes, table_of_values
from fips_ort.layout import Layout, padded_to_blocks
from pipeline.plumbing.files import write_aside
from pipeline.plumbing.progress import Progress
from qat.damping import damped
from qat.gptq import gptq

TIED_TABLE_DAMPING = 0.3
"""A tied table is read in two ways: rows are multiplied with final hidden states, and looked up as they are. Its
moment is that of the hidden states plus this part of their mean energy times the identity. Gemma 3 270M, table at 4
bits in blocks of 32: perplexity 15.41 rounded to nearest, 14.76 so, on 12,264 tokens where the dense model has 14.01.
"""
ROWS_AT_ONCE = 16_384
"""Rows of a table whose codes are found together: GPTQ makes many copies of them, and vocabularies are large."""


@torch.no_grad()
def linear_moments(
    run: Callable[[Tensor], object], linears: Mapping[str, nn.Linear], batches: Iterable[Tensor], progress: Progress
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


@torch.no_grad()
def gptq_table(weight: Tensor, moment: Tensor, bits: int, block_size: int) -> NBitsTable:
    """Store ``weight`` float32 [N, K] at 4 or 8 bits, with codes that GPTQ finds for inputs of ``moment`` [K, K]."""
    features = weight.shape[1]
    columns = padded_to_blocks(features, block_size)
    values, scales = torch.empty(weight.shape), torch.empty(len(weight), columns // block_size)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part = weight.detach()[rows]
        layout = Layout.uniform(len(part), columns, bits, block_size, segment_axis=1)
        values[rows], scales[rows] = gptq(part, moment, layout)
    return table_of_values(values, scales, bits, block_size)


def tied_moment(hidden: Tensor) -> Tensor:
    """The moment by which a table is rounded that is both looked up and multiplied with ``hidden`` (moment [d, d])."""
    return damped(hidden, TIED_TABLE_DAMPING)


def rest_tables(
    model: Any,
    skip: Iterable[str],
    *,
    run: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    linear_bits: int | None,
    embedding_bits: int | None,
    block_size: int,
    progress: Progress,
) -> dict[str, NBitsTable]:
    """Find the tables of all linear layers outside the MLPs (``skip``: theirs) and of the token table, by module name.

    ``run``: token ids to final hidden states. ``block_size``: at most (:func:`exporters.nbits.block_size_for`). A table
    that is only looked up is rounded to nearest and not listed.
    """
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    skipped = {*skip, names[id(head)]}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in skipped and linear_bits is not None
    }
    hidden: list[Tensor] = []

    def run_and_sum(batch: Tensor) -> None:
        states = run(batch)
        hidden.append((states.T @ states).double())

    moments = linear_moments(run_and_sum, linears, batches, progress)
    tables = {}
    steps = len(linears) + (embedding_bits is not None)
    with progress.task("starting codes outside the MLPs", steps) as advance:
        for name, linear in linears.items():
            assert linear_bits is not None
            tables[name] = gptq_table(
                linear.weight, moments[name], linear_bits, block_size_for(linear.in_features, block_size)
            )
            advance(1, name)
        if embedding_bits is not None:
            moment = torch.stack(hidden).sum(dim=0).float()
            tied = head.weight is model.get_input_embeddings().weight
            tables[names[id(head)]] = gptq_table(
                head.weight,
                tied_moment(moment) if tied else moment,
                embedding_bits,
                block_size_for(head.in_features, block_size),
            )
            advance(1, names[id(head)])
    return tables


def save_tables(tables: Mapping[str, NBitsTable], path: Path) -> None:
    """Write codes and scales of tables, by name (safetensors)."""
    tensors: dict[str, Tensor] = {}
    for name, table in tables.items():
        tensors |= {f"{name}/codes": table.codes, f"{name}/scales": table.scales}
    metadata = {
        name: json.dumps([table.bits, table.block_size, table.values.shape[1]]) for name, table in tables.items()
    }
    write_aside(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_tables(path: Path) -> dict[str, NBitsTable]:
    """Read the tables that :func:`save_tables` has written."""
    with safe_open(path, framework="pt") as file:
        return {
            name: table_of_codes(file.get_tensor(f"{name}/codes"), file.get_tensor(f"{name}/scales"), *json.loads(text))
            for name, text in (file.metadata() or {}).items()
            if name != "format"
        }
