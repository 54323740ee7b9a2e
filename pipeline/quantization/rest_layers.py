"""What lies outside the MLPs and can be packed, with which bits, and the blocks that it is stored in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from exporters.packed_rest import rest_block_size
from pipeline.plumbing.errors import InputError
from pipeline.recipe.plan import FittedRows, MLPSite
from pipeline.recipe.schema import Recipe, Tier

Role = Literal["input", "output", "tied"]
"""What a table of tokens is read for: to look rows up, to multiply with them, or both."""
RestBits = int | Sequence[Tier]
"""Bits of a weight outside the MLPs: of all its rows, or of a table's rows in tiers."""


def bits_as_json(bits: Mapping[str, RestBits]) -> dict[str, Any]:
    """Bits by path as values of JSON. Inverse: :func:`bits_from_json`."""
    return {
        path: width if isinstance(width, int) else [tier.model_dump() for tier in width]
        for path, width in bits.items()
    }


def bits_from_json(content: Mapping[str, Any]) -> dict[str, RestBits]:
    """Read what :func:`bits_as_json` made."""
    return {
        path: width if isinstance(width, int) else [Tier.model_validate(tier) for tier in width]
        for path, width in content.items()
    }


def rest_linears(model: Any, sites: Sequence[MLPSite]) -> dict[str, nn.Linear]:
    """Linear layers outside the MLPs that the rest's bits apply to, not the classifier or output layer, by path."""
    mlps = {path for site in sites for path in site.linear_paths}
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name != "classifier" and name not in mlps
    }


def token_tables(model: Any) -> dict[str, tuple[Tensor, Role]]:
    """The tables of a language model by path, with what they are read for: tied ones are one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if head.weight is embedding.weight:
        return {names[id(embedding)]: (embedding.weight, "tied")}
    return {names[id(embedding)]: (embedding.weight, "input"), names[id(head)]: (head.weight, "output")}


def rest_bits(recipe: Recipe, model: Any, sites: Sequence[MLPSite]) -> dict[str, RestBits]:
    """Bits of what ``recipe`` stores as codes outside the MLPs (``sites``: all of them), by path: linear layers, then
    tables of tokens."""
    rest = recipe.quantization.rest
    bits: dict[str, RestBits] = {}
    if rest.linear_bits is not None:
        bits |= dict.fromkeys(rest_linears(model, sites), rest.linear_bits)
    if rest.embedding_bits is not None:
        bits |= dict.fromkeys(token_tables(model), rest.embedding_bits)
    return bits


def inputs_of(linears: Mapping[str, nn.Linear]) -> set[tuple[str, int]]:
    """(module, features) of what layers of that module read, by their names alone: layers of one module that read as
    many features are taken to read the same."""
    return {(name.rpartition(".")[0], linear.in_features) for name, linear in linears.items()}


def layers_by_input(run: Callable[[], object], linears: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
    """Names of ``linears`` in the order in which ``run`` calls them, those together that read the same tensor one after
    the other, as queries, keys and values do."""
    found: list[tuple[Tensor, list[str]]] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if found and found[-1][0] is arguments[0]:
                found[-1][1].append(name)
            else:
                found.append((arguments[0], [name]))

        return hook

    handles = [linear.register_forward_pre_hook(record(name)) for name, linear in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(names) for _, names in found]


def check_tiers(recipe: Recipe, model: Any) -> None:
    """Raise InputError if the tiers of the token table, or of a choice for it, leave no token for the last one."""
    given = {"quantization.rest.embedding_bits": recipe.quantization.rest.embedding_bits}
    if recipe.allocate is not None:
        choices = enumerate(recipe.allocate.embedding_bits or [])
        given |= {f"allocate.embedding_bits.{number}": choice for number, choice in choices}
    for key, tiers in given.items():
        if not isinstance(tiers, list):
            continue
        before, tokens = sum(tier.tokens or 0 for tier in tiers), len(model.get_output_embeddings().weight)
        if before >= tokens:
            raise InputError(
                f"recipe {recipe.name}: {key}: the tiers before the last take {before:,} tokens, and the vocabulary "
                f"has {tokens:,}; give them fewer"
            )


def fitted_rest(recipe: Recipe, model: Any, sites: Sequence[MLPSite]) -> list[FittedRows]:
    """Lengths of rows that ``quantization.rest.block_size`` does not divide, each once."""
    rest = recipe.quantization.rest
    lengths = {linear.in_features for linear in rest_linears(model, sites).values()} if rest.linear_bits else set()
    if rest.embedding_bits:
        lengths.add(model.config.hidden_size)
    key, wanted = "quantization.rest.block_size", rest.block_size
    return [
        FittedRows(key, "input features", length, wanted, rest_block_size(length, wanted))
        for length in sorted(lengths)
        if length % wanted
    ]
