"""Tiny language models with MLPs packed from random levels, one of each architecture, and their artefacts."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from language_samples import byte_level_tokenizer, tiny_config
from packed_samples import random_packed
from rest_samples import with_packed_linears, with_packed_tables
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from exporters.artifact import Golden, Provenance, write_artifact
from exporters.causal_lm import export_causal_lm
from exporters.genai_config import save_causal_lm_config
from exporters.modules import install_packed
from exporters.packed_model import PackedModel
from exporters.rest import packed_rest, round_to_float16
from fips_ort.manifest import Manifest
from pipeline.recipe.schema import Tier

WINDOW = 16
MAX_LENGTH = 128
BLOCK_SIZE = 32

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # sdpa leaves out the soft caps of Gemma 2.
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
         "sliding_window": WINDOW, "attn_implementation": "eager"},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"query_pre_attn_scalar": 16, "sliding_window": WINDOW, "num_hidden_layers": 3,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": _LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW, "tie_word_embeddings": False}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
}
KINDS = tuple(_KINDS)
WINDOWED = tuple(kind for kind, (_, _, values) in _KINDS.items() if "sliding_window" in values)
"""Those with layers that look back no further than ``WINDOW`` tokens."""


def tiny_language_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A ``…ForCausalLM`` in eval mode with random weights, norms and biases included."""
    torch.manual_seed(seed)
    model_class, config_class, values = _KINDS[kind]
    common = {"intermediate_size": 64, "initializer_range": 0.5}
    model = model_class(tiny_config(config_class, **{**common, **values, **changes}))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    if model.config.tie_word_embeddings:
        # Or else the likeliest token is the one just read.
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(0.1)
    return model.eval()


@dataclass(frozen=True)
class LanguageSample:
    """A packed model, the torch module of its stored numbers and its exported graph."""

    packed: PackedModel
    module: Any
    graph: ir.Model

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.module(input_ids=input_ids, use_cache=False).logits

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The most likely tokens, one by one, without a cache."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(torch.tensor([tokens]))[0, -1].argmax()))
        return tokens[len(prompt) :]


_TIERS = (Tier(bits=8, tokens=30), Tier(bits=4, tokens=100), Tier(bits=2))
CASES = {
    # kind: (pattern, MLPs have a basis, bits of linears, bits of the token table)
    "gemma2": ("1:4", True, 8, 3),
    "gemma3": ("bitmap", True, 3, _TIERS),
    "llama": ("dense", True, None, None),
    "mistral": ("dense", False, 8, _TIERS),
    "qwen2": ("2:4", True, 2, None),
    "qwen3": ("dense", False, None, 8),
}
"""Together all patterns, both methods, tied and untied tables of all kinds."""


@functools.cache
def language_sample(kind: str, accuracy_level: int = 0) -> LanguageSample:
    """A sample, exported once per test process. Not to be changed."""
    pattern, has_basis, linear_bits, embedding_bits = CASES[kind]
    dense = tiny_language_model(kind)
    bits = 3 if kind == "qwen3" else 4
    packed = random_packed(dense, pattern, has_basis=has_basis, bits=bits, graded=kind == "llama")
    module: Any = install_packed(dense, packed, accuracy_level)
    if linear_bits is not None:
        module = with_packed_linears(module, linear_bits, BLOCK_SIZE, accuracy_level=accuracy_level)
    if embedding_bits is not None:
        module = with_packed_tables(module, embedding_bits, BLOCK_SIZE, accuracy_level)
    module = round_to_float16(module)
    return LanguageSample(packed, module, export_causal_lm(module, MAX_LENGTH))


def tokens(count: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random token ids int64 [batch, count], none of them special."""
    return torch.from_numpy(np.random.default_rng(seed).integers(5, 265, (batch, count)))


def write_language_sample(folder: Path, exported: LanguageSample) -> Manifest:
    """The artefact of a sample; its golden logits, computed by PyTorch, are those after the last token."""
    input_ids = tokens(12)
    golden = Golden({"input_ids": input_ids.numpy()}, {"logits": exported.logits(input_ids)[:, -1:].numpy()})
    provenance = Provenance("sample", "Random weights.", {"name": "sample"}, {"torch": torch.__version__})

    def save_config(target: Path) -> None:
        save_causal_lm_config(target, exported.module, byte_level_tokenizer(), MAX_LENGTH)

    weights = exported.packed.weights() | packed_rest(exported.module).weights()
    return write_artifact(folder, exported.graph, weights, golden, provenance, save_config, 1 << 30)
