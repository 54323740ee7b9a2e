"""Which attention becomes one node, and what it computes then."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from causal_lm_samples import KINDS, MAX_LENGTH, tiny_language_model, tokens
from rest_samples import with_packed_linears

import fips_ort
from exporters import fused_attention
from exporters.causal_lm import export_causal_lm
from fips_ort.causal_lm import prefill_inputs

FUSED = {
    "gemma2": None,  # caps its scores
    "gemma3": "QKNormCachedAttention",
    "llama": "CachedAttention",
    "mistral": "CachedAttention",
    "qwen2": "CachedAttention",
    "qwen3": "QKNormCachedAttention",
}
"""What the attention of a kind becomes where queries, keys and values are one product."""


def exports(kind: str, monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple[ir.Model, ir.Model]:
    """Graphs of a model with packed linear layers, with attention fused and as the builder makes it."""
    model = with_packed_linears(tiny_language_model(kind, **changes), 8, 32)
    fused = export_causal_lm(model, MAX_LENGTH)
    monkeypatch.setattr("exporters.causal_lm.fuse_attention", lambda graph: None)
    return fused, export_causal_lm(model, MAX_LENGTH)


def session(graph: ir.Model, *, native: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if native:
        fips_ort.register(options)
    return onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options)


def outputs(own: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [value.name for value in own.get_outputs()]
    return dict(zip(names, own.run(names, feeds), strict=True))


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=2e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_is_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, stock = exports(kind, monkeypatch)
    layers = len([node for node in stock.graph if node.op_type == "GroupQueryAttention"])
    assert len([node for node in fused.graph if node.op_type == FUSED[kind]]) == (layers if FUSED[kind] else 0)
    left = {node.op_type for node in fused.graph}
    assert bool(left & {"GroupQueryAttention", "RotaryEmbedding", "Split"}) == (FUSED[kind] is None)
    assert {name for domain, name, _ in fused.functions if "Attention" in name} == {FUSED[kind]} - {None}

    expected = session(stock, native=False)
    feeds = prefill_inputs(expected, tokens(40, 2).numpy())
    feeds["attention_mask"][1, :7] = 0  # padding on the left
    prompt = outputs(expected, feeds)
    caches = {name.replace("present", "past_key_values"): value for name, value in prompt.items() if "present" in name}
    step = {**feeds, **caches, "input_ids": tokens(1, 2, seed=2).numpy(), "logits_to_keep": np.array([1]),
            "attention_mask": np.concatenate([feeds["attention_mask"], np.ones((2, 1), np.int64)], axis=1)}
    after = outputs(expected, step)
    for native in (False, True):
        own = session(fused, native=native)
        assert_equal(outputs(own, feeds), prompt)
        assert_equal(outputs(own, step), after)


def test_heads_of_other_sizes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = exports("mistral", monkeypatch, head_dim=24)
    assert [node.op_type for node in fused.graph if "Attention" in node.op_type] == ["GroupQueryAttention"] * 2


def change(node: ir.Node, name: str, value: object) -> None:
    node.attributes[name] = ir.convenience.convert_attribute(name, value)


def producer(node: ir.Node, *places: int) -> ir.Node:
    for place in places:
        node = node.inputs[place].producer()
    return node


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ((), "softcap", 3.0), ((), "do_rotary", 1), ((), "smooth_softmax", 1), ((), "kv_cache_bit_width", 8),
        ((0,), "interleaved", 1), ((0,), "rotary_embedding_dim", 8), ((1,), "is_packed_batching", 1),
        ((1,), "scale", 0.5), ((0, 0, 0), "axis", 1), ((2,), "axis", 1), ((1, 0, 0), "epsilon", 1e-3),
    ],
)
def test_what_asks_for_more_stays(
    where: tuple[int, ...], name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attributes of attention, of what rotates, of what normalizes and of what takes queries, keys and values apart."""
    _, stock = exports("gemma3", monkeypatch)
    first = next(node for node in stock.graph if node.op_type == "GroupQueryAttention")
    change(producer(first, *where), name, value)
    fused_attention.fuse_attention(stock)
    assert [node.name for node in stock.graph if node.op_type == "GroupQueryAttention"] == [first.name]


def test_defaults_that_are_written_are_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stock = exports("gemma3", monkeypatch)
    nodes = [node for node in stock.graph if node.op_type == "GroupQueryAttention"]
    change(producer(nodes[0], 0), "scale", 1.0)
    change(nodes[0], "local_window_size", 0)
    for name in ("scale", "local_window_size"):
        nodes[1].attributes.pop(name)
    for place in (0, 1):
        producer(nodes[2], place, 0, 0).attributes.pop("epsilon")
    fused_attention.fuse_attention(stock)
    own = [node for node in stock.graph if node.op_type == "QKNormCachedAttention"]
    assert [node.attributes["local_window_size"].as_int() for node in own[:2]] == [-1, -1]
    assert own[1].attributes["scale"].as_float() == pytest.approx(0.25)
    assert own[2].attributes["epsilon"].as_float() == pytest.approx(1e-5)


@pytest.mark.parametrize("domain", ["", "elsewhere"])
def test_operators_of_other_domains_stay(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stock = exports("gemma3", monkeypatch)
    first = next(node for node in stock.graph if node.op_type == "GroupQueryAttention")
    producer(first, 0).domain = domain
    fused_attention.fuse_attention(stock)
    assert [node.name for node in stock.graph if node.op_type == "GroupQueryAttention"] == [first.name]


def test_what_else_reads_the_parts_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stock = exports("gemma3", monkeypatch)
    split = next(node for node in stock.graph if node.op_type == "Split")
    stock.graph.outputs.append(split.outputs[2])
    fused_attention.fuse_attention(stock)
    assert [node for node in stock.graph if node.op_type == "Split"] == [split]
