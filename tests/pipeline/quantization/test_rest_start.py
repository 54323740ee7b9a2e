"""Starting codes outside the MLPs: moments, roles of tables, tiers by frequency."""

from typing import Any

import pytest
import torch
from causal_lm_samples import tiny_language_model, tokens
from moment_samples import correlated, error, moment_of, values_of
from rest_samples import linears_outside
from torch import Tensor, nn

from pipeline.quantization.rest_layers import RestBits, token_tables
from pipeline.quantization.rest_start import (
    TIED_TABLE_DAMPING,
    RestCalibration,
    linear_moments,
    start_rest,
    tied_moment,
    token_bits,
)
from pipeline.quantization.rest_weights import quantize_rows
from pipeline.recipe.schema import Tier
from pipeline.vocabulary.frequency import frequency_order


def test_tied_table_counts_every_row_and_what_it_is_multiplied_with() -> None:
    moment = moment_of(correlated(32))
    expected = moment + TIED_TABLE_DAMPING * moment.trace() / 32 * torch.eye(32)
    torch.testing.assert_close(tied_moment(moment), expected)
    # What is looked up is nearer to the original than with the moment of the products alone.
    weight = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    tied, untied = (values_of(quantize_rows(weight, 4, 16, m)) for m in (tied_moment(moment), moment))
    assert float((tied - weight).square().sum()) < float((untied - weight).square().sum())
    assert error(tied, weight, moment) < error(values_of(quantize_rows(weight, 4, 16)), weight, moment)


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
    moments = linear_moments(body_of(model), linears, batches)
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
@pytest.mark.parametrize(("linear_bits", "embedding_bits"), [(3, 4), (None, 8), (8, None)])
@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_codes_of_a_model(kind: str, linear_bits: int | None, embedding_bits: int | None, start: str) -> None:
    model = tiny_language_model(kind)
    mlps = [name for name, module in model.named_modules() if "mlp" in name and isinstance(module, nn.Linear)]
    linears = linears_outside(model, mlps) if linear_bits else {}
    bits: dict[str, RestBits] = {} if linear_bits is None else dict.fromkeys(linears, linear_bits)
    bits |= {} if embedding_bits is None else dict.fromkeys(token_tables(model), embedding_bits)
    moments = RestCalibration(body_of(model), [tokens(24, 4)]).moments(linears) if start == "gptq" else None
    started: list[str] = []
    made = start_rest(model, bits, 16, moments=moments, on_start=started.append)
    assert started == [*bits]
    assert made.linears.keys() == linears.keys()
    assert len(linears) == (0 if linear_bits is None else 4 * model.config.num_hidden_layers)
    tables = {"model.embed_tokens"} | ({"lm_head"} if kind == "llama" else set())
    assert made.tables.keys() == (set() if embedding_bits is None else tables)
    for name, weight in made.weights().items():
        bits = linear_bits if name in linears else embedding_bits
        assert [width for width, _, _ in weight.layout.submatrices()] == [bits]
        assert weight.layout.midrise
    if embedding_bits != 4:
        return
    # A table is right for what it is read for: to be multiplied with hidden states, to be looked up, or both.
    with torch.no_grad():
        hidden = body_of(model)(tokens(24, 4))
    moment = hidden.T @ hidden
    expected: dict[str, Tensor | None] = {"lm_head": moment, "model.embed_tokens": None}
    if kind == "gemma3":
        expected["model.embed_tokens"] = tied_moment(moment)
    for name, table in made.tables.items():
        weight = model.get_submodule(name).weight.detach()
        values = values_of(quantize_rows(weight, 4, 16, expected[name] if start == "gptq" else None))
        # Sums in another order may tip a few codes.
        assert float((values == values_of(table.weight)).float().mean()) > 0.98


def test_tables_are_named_by_what_they_are_read_for() -> None:
    roles = {kind: token_tables(tiny_language_model(kind)) for kind in ("gemma3", "llama")}
    assert {path: role for path, (_, role) in roles["gemma3"].items()} == {"model.embed_tokens": "tied"}
    assert {path: role for path, (_, role) in roles["llama"].items()} == {
        "model.embed_tokens": "input", "lm_head": "output"
    }  # fmt: skip


def test_the_most_frequent_tokens_have_most_bits() -> None:
    order = frequency_order(torch.tensor([5, 0, 7, 7, 1, 0, 9]), torch.tensor([0.9, 0.1, 0.2, 0.2, 0, 0.3, 0]))
    tiers = [Tier(bits=8, tokens=2), Tier(bits=4, tokens=2), Tier(bits=2)]
    # 6 is first; of 2 and 3, which are as frequent and as much expected, the lower one; of 1 and 5 the expected one.
    assert order.tolist() == [6, 2, 3, 0, 4, 5, 1]
    assert token_bits(tiers, order).tolist() == [4, 2, 8, 4, 2, 2, 8]
