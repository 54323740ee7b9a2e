"""The two parts of a transformers causal language model: its body, from token ids to final hidden states, and its
output layer, from there to logits."""

from typing import Any

import torch
from torch import Tensor, nn

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


class OutputLayer:
    """The output layer of a transformers causal language model, with the soft cap that follows it."""

    def __init__(self, model: Any) -> None:
        self._layer: nn.Module = model.get_output_embeddings()
        self._softcap = final_softcap(model)

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., vocabulary] of hidden states [..., d]."""
        logits: Tensor = self._layer(hidden).float()
        if self._softcap is not None:
            logits = logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits
