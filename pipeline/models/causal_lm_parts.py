"""The two parts of a transformers causal language model: its body, from token ids to final hidden states, and its
output layer, from there to logits."""

from typing import Any

from torch import Tensor

from exporters.modules import PackedOutput


def hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """Final hidden states [B, T, d] of token ids int64 [B, T]."""
    states: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return states


def output_table(model: Any) -> Tensor:
    """Rows of the output layer as the model computes with them: float32 [vocabulary, d], without gradient."""
    layer = model.get_output_embeddings()
    assert layer.bias is None, "a table alone does not make the logits of an output layer with a bias"
    table: Tensor = layer.values if isinstance(layer, PackedOutput) else layer.weight
    return table.detach()


def final_softcap(model: Any) -> float | None:
    """The bound c of Gemma 2's logits, ``c tanh(logits / c)``; None for models whose logits are not bounded."""
    softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return softcap
