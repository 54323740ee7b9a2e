"""Starting codes outside the MLPs: errors in the norm that counts, moments, saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lm_samples import tiny_language_model, tokens
from torch import Tensor, nn

from exporters.nbits import quantize_table
from pipeline.plumbing.progress import Progress
from pipeline.quantization.rest_start import (
    TIED_TABLE_DAMPING,
    gptq_table,
    linear_moments,
    load_tables,
    rest_tables,
    save_tables,
    tied_moment,
)


def correlated(columns: int, seed: int = 0, count: int = 400) -> Tensor:
    """Inputs [count, columns] whose columns differ in magnitude and go together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    noise = torch.randn(count, columns, generator=generator)
    return (torch.randn(count, columns // 4, generator=generator) @ mixing + 0.3 * noise) * torch.logspace(
        -1, 1, columns
    )


def moment_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def error(values: Tensor, weight: Tensor, moment: Tensor) -> float:
    """Mean squared error of the products with inputs of this second moment."""
    E = (values - weight).double()
    return float(((E @ moment.double()) * E).sum())


# --- tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "ratio"), [(4, 0.5), (8, 0.8)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_products_lose_less_than_by_rounding_to_nearest(bits: int, ratio: float, block_size: int) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    moment = moment_of(correlated(64))
    table = gptq_table(weight, moment, bits, block_size)
    assert (table.bits, table.block_size) == (bits, block_size)
    assert error(table.values, weight, moment) < ratio * error(
        quantize_table(weight, bits, block_size).values, weight, moment
    )
    # Its values are levels of scales that float16 holds.
    levels = table.values / table.scales.repeat_interleave(block_size, dim=1)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert -(2 ** (bits - 1)) <= float(levels.min().round()) <= float(levels.max().round()) < 2 ** (bits - 1)
    assert torch.equal(table.scales, table.scales.half().float())


def test_rows_are_rounded_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of 262,144 rows can therefore be done some at a time."""
    weight = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    moment = moment_of(correlated(32))
    whole = gptq_table(weight, moment, 4, 16)
    monkeypatch.setattr("pipeline.quantization.rest_start.ROWS_AT_ONCE", 7)
    parts = gptq_table(weight, moment, 4, 16)
    assert torch.equal(whole.values, parts.values)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_tables_are_the_same(tmp_path: Path, bits: int) -> None:
    moment = moment_of(correlated(32))
    made = {
        name: gptq_table(torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)), moment, bits, 16)
        for name, rows in (("model.layers.0.self_attn.q_proj", 40), ("lm_head", 17))
    }
    save_tables(made, tmp_path / "tables.safetensors")
    loaded = load_tables(tmp_path / "tables.safetensors")
    assert loaded.keys() == made.keys()
    for name, table in made.items():
        again = loaded[name]
        assert (again.bits, again.block_size) == (bits, 16)
        for part in ("codes", "scales", "values"):
            assert torch.equal(getattr(again, part), getattr(table, part)), (name, part)


def test_tied_table_counts_every_row_and_what_it_is_multiplied_with() -> None:
    moment = moment_of(correlated(32))
    expected = moment + TIED_TABLE_DAMPING * moment.trace() / 32 * torch.eye(32)
    torch.testing.assert_close(tied_moment(moment), expected)
    # What is looked up is nearer to the original than with the moment of the products alone.
    weight = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    tied, untied = (gptq_table(weight, m, 4, 16).values for m in (tied_moment(moment), moment))
    assert float((tied - weight).square().sum()) < float((untied - weight).square().sum())
    assert error(tied, weight, moment) < error(quantize_table(weight, 4, 16).values, weight, moment)


# --- moments ---------------------------------------------------------------------------------------------------


def body_of(model: Any) -> Any:
    def run(input_ids: Tensor) -> Tensor:
        states: Tensor = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return states.reshape(-1, states.shape[-1])

    return run


def test_moments_are_means_over_tokens() -> None:
    model = tiny_language_model("llama")
    attention = model.model.layers[1].self_attn
    names = {name: f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    linears: dict[str, nn.Linear] = {path: model.get_submodule(path) for path in names.values()}
    batches = [tokens(12, 3, seed=1), tokens(12, 2, seed=2)]
    moments = linear_moments(body_of(model), linears, batches, Progress())
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        getattr(attention, name).register_forward_hook(
            lambda _, arguments, __, name=name: seen[name].append(arguments[0].detach().reshape(-1, 32))
        )
    with torch.no_grad():
        for batch in batches:
            body_of(model)(batch)
    for name, path in names.items():
        x = torch.cat(seen[name])
        assert len(x) == 60
        torch.testing.assert_close(moments[path], x.T @ x / 60, rtol=1e-4, atol=1e-5)
    # Queries, keys and values read the same; it is held once.
    assert moments[names["q_proj"]] is moments[names["k_proj"]] is moments[names["v_proj"]]
    assert not any(linear._forward_pre_hooks for linear in linears.values())


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
@pytest.mark.parametrize(("linear_bits", "embedding_bits"), [(4, 4), (None, 8), (8, None)])
def test_tables_of_a_model(kind: str, linear_bits: int | None, embedding_bits: int | None) -> None:
    model = tiny_language_model(kind)
    mlps = [name for name, module in model.named_modules() if "mlp" in name and isinstance(module, nn.Linear)]
    made = rest_tables(
        model,
        mlps,
        run=body_of(model),
        batches=[tokens(24, 4)],
        linear_bits=linear_bits,
        embedding_bits=embedding_bits,
        block_size=16,
        progress=Progress(),
    )
    attention = {
        f"model.layers.{layer}.self_attn.{name}_proj"
        for layer in range(model.config.num_hidden_layers)
        for name in "qkvo"
    }
    expected = (attention if linear_bits else set()) | ({"lm_head"} if embedding_bits else set())
    assert made.keys() == expected
    for name, table in made.items():
        weight = model.get_submodule(name).weight.detach()
        assert table.values.shape == weight.shape
        assert table.bits == (embedding_bits if name == "lm_head" else linear_bits)
    if embedding_bits == 4:
        # The table is right for what the output layer reads: for a tied one also for being looked up.
        with torch.no_grad():
            hidden = body_of(model)(tokens(24, 4))
        moment = hidden.T @ hidden
        weight = model.lm_head.weight.detach()
        if kind == "gemma3":
            moment = tied_moment(moment)
        values = gptq_table(weight, moment, 4, 16).values
        # Sums in another order may tip a few codes.
        assert float((values == made["lm_head"].values).float().mean()) > 0.98
        nearest = quantize_table(weight, 4, 16).values
        assert error(made["lm_head"].values, weight, moment) < error(nearest, weight, moment)
