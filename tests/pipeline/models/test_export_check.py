"""What ONNX Runtime or onnxruntime-genai would refuse at the export is refused before, with the keys that ask for it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from causal_lm_samples import KINDS, tiny_language_model
from language_samples import byte_level_tokenizer
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.models.causal_lm import load_generation_config, load_language_config, load_tokenizer
from pipeline.models.export_check import check_graph, check_saved_config, miniature
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import CausalLanguageModel

SECTION = CausalLanguageModel(source="causal_lm", path="m")


def refused(config: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_graph(SECTION, config)
    message = str(caught.value)
    assert message.startswith("model.path: m: config.json: ")
    return message.removeprefix("model.path: m: config.json: ")


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_can_be_exported(kind: str) -> None:
    config = tiny_language_model(kind).config
    before = config.to_dict()
    check_graph(SECTION, config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(query_pre_attn_scalar=144, attn_logit_softcapping=None, final_logit_softcapping=None),
        Gemma3TextConfig(query_pre_attn_scalar=168, final_logit_softcapping=30.0, attention_bias=True),
        LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-3),
        LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, hidden_act="relu2"),
        LlamaConfig(head_dim=24),
        MistralConfig(sliding_window=None, head_dim=80, max_position_embeddings=24),
        Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=20),
        Qwen3Config(attention_bias=True, hidden_act="gelu"),
    ],
    ids=lambda config: config.model_type,
)
def test_unusual_models_that_can_be_exported(config: Any) -> None:
    """Of full size: what is tried is a miniature, with a layer of each type."""
    check_graph(SECTION, config)
    small = miniature(config)
    assert small.num_hidden_layers == len(set(getattr(config, "layer_types", None) or [0]))
    assert small.num_attention_heads == config.num_attention_heads


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "ntk-by-parts"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rotary_embeddings_that_follow_the_length_are_refused(kind: str, key: str) -> None:
    values = {"factor": 2.0, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5}
    values |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope_type = {"rope_type" if key == "rope_parameters" else "type": kind, "rope_theta": 1e4}
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, **{key: {**values, **rope_type}})
    message = refused(config)
    assert f"rope_parameters.rope_type: '{kind}'" in message
    assert "take a model with one of default, linear, llama3, yarn" in message


def test_rotary_embeddings_of_one_type_of_layers_are_named() -> None:
    scaled = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 8.0}
    rope = {"full_attention": scaled, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = Gemma3TextConfig(rope_parameters=rope)
    assert refused(config).startswith("rope_parameters.full_attention.rope_type: 'dynamic' cannot be exported")
    scaled["rope_type"] = "linear"
    check_graph(SECTION, Gemma3TextConfig(rope_parameters=rope))


def test_type_that_transformers_leaves_out_is_named() -> None:
    """Gemma 3 would be taken without its scaling."""
    config = Gemma3TextConfig(rope_scaling={"type": "linear", "factor": 8.0})
    assert refused(config).startswith("rope_parameters.full_attention.type: 'linear' is not read by transformers")
    check_graph(SECTION, Gemma3TextConfig(rope_scaling={"rope_type": "linear", "factor": 8.0}))
    check_graph(SECTION, LlamaConfig(rope_scaling={"type": "linear", "factor": 8.0}))


@pytest.mark.parametrize("size", [20, 100])
def test_sizes_of_heads_are_named(size: int) -> None:
    expected = f"head_dim: {size}: cannot be exported to ONNX: head_size "
    remedy = "take a model whose heads have a size that 8 divides"
    for config in (LlamaConfig(head_dim=size), LlamaConfig(hidden_size=4 * size, num_attention_heads=4)):
        message = refused(config)
        assert message.startswith(expected)
        assert message.endswith(remedy)


@pytest.mark.parametrize(
    ("config", "keys", "remedy"),
    [
        (LlamaConfig(hidden_act="quick_gelu"), "hidden_act: quick_gelu", "take a model with silu"),
        (LlamaConfig(hidden_act="mish", head_dim=20), "hidden_act: mish, head_dim: 20", "take a model with silu"),
        (
            LlamaConfig(num_attention_heads=8, num_key_value_heads=5),
            "num_key_value_heads: 5",
            "num_attention_heads must be a multiple of it",
        ),
        # Computed without an error, but not what PyTorch computes.
        (Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention: True", "without it"),
        (Gemma3TextConfig(attn_logit_softcapping=2.0), "attn_logit_softcapping: 2.0", "without it"),
    ],
)
def test_keys_are_found_by_leaving_them_out(config: Any, keys: str, remedy: str) -> None:
    message = refused(config)
    assert message.startswith(f"{keys}: cannot be exported to ONNX: ")
    assert remedy in message


# --- configuration and tokenizer -------------------------------------------------------------------------------


def check(folder: Path, tokenizer: Any = None, change: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Check a tiny model with a tokenizer, saved in ``folder`` and its configuration changed."""
    tiny_language_model("llama").save_pretrained(folder)
    if tokenizer is None:
        tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if change is not None:
        change(content)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    recheck(folder)


def recheck(folder: Path) -> None:
    section = CausalLanguageModel(source="causal_lm", path=str(folder))
    config, generation = load_language_config(section), load_generation_config(section)
    check_saved_config(section, config, load_tokenizer(section), generation)


def test_tokenizer_is_asked(tmp_path: Path) -> None:
    check(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<m>"})
    tokenizer.backend_tokenizer.add_tokens(["<n>"])
    check(tmp_path, tokenizer)


def test_end_of_text_may_be_said_in_any_file(tmp_path: Path) -> None:
    silent = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(bos=False).backend_tokenizer)
    check(tmp_path, silent, lambda config: config.update(eos_token_id=None))  # generation_config.json says it
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(InputError, match=r"model\.path: .*: its tokenizer cannot .*eos_token_id.*generation_config"):
        recheck(tmp_path)
    byte_level_tokenizer(bos=False).save_pretrained(tmp_path)
    recheck(tmp_path)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    message = r"65 tokens of its tokenizer have no row .*vocab_size: 200\), .* with id 200"
    with pytest.raises(InputError, match=message):
        check(tmp_path, None, lambda config: config.update(vocab_size=200))
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<image>"])  # as in Gemma 3 for text, whose tokenizer knows of images
    check(tmp_path, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_folder_without_a_tokenizer_is_named(kind: str, tmp_path: Path) -> None:
    """Of some kinds of models transformers makes up an empty one."""
    model = tiny_language_model(kind)
    model.save_pretrained(tmp_path)
    section = CausalLanguageModel(source="causal_lm", path=str(tmp_path))
    with pytest.raises(InputError, match=r"model\.path: .*: cannot load its tokenizer: there is none; put tok"):
        check_saved_config(section, model.config, load_tokenizer(section))
