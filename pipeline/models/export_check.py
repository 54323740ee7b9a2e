"""Whether a language model can leave as an artefact, asked before anything is trained.

Two things that only the export would find out otherwise: whether ONNX Runtime computes what the model's configuration
asks for, which is tried on a miniature of the model, and whether onnxruntime-genai can read its tokenizer.
"""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from exporters.causal_lm import STATIC_ROPE, export_causal_lm
from exporters.genai_config import TokenizerError, save_causal_lm_config
from fips_ort.causal_lm import prefill_inputs
from pipeline.data.text import tokens_beyond
from pipeline.models.causal_lm import (
    attention_of,
    language_model_class,
    longest_text,
    name_of,
)
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import LanguageModelSection

# Sizes that a miniature has of its own. Those of attention are the model's: kernels do not take all.
_WIDTH, _VOCABULARY, _WINDOW, _TOKENS = 32, 64, 16, 40
_USUAL_HEAD = 64
_TOLERANCE = 1e-3
"""Of the largest logit; a run's own check of parity allows as much."""
_NEITHER_SIZE_NOR_KIND = frozenset(
    {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types", "dtype", "architectures",
        "transformers_version", "initializer_range", "model_type", "id2label", "label2id", "bos_token_id",
        "eos_token_id", "pad_token_id", "max_position_embeddings", "use_cache",
    }
)  # fmt: skip
"""Keys of a configuration that a miniature sets itself, or that change nothing that is computed."""
_REMEDIES = {
    "head_dim": "take a model whose heads have a size that 8 divides",
    "num_key_value_heads": "num_attention_heads must be a multiple of it",
    "hidden_act": "take a model with silu, gelu, gelu_pytorch_tanh, relu or relu2",
    "hidden_activation": "take a model with silu, gelu, gelu_pytorch_tanh, relu or relu2",
}


def check_graph(section: LanguageModelSection, config: Any) -> None:
    """Raise InputError naming the keys of ``config`` with which ONNX Runtime does not compute what PyTorch does.

    A miniature with the model's attention, rotary embeddings, norms and activation, and random weights, is exported
    and run in both.
    """
    _check_rope_types(section, config)
    reason = _refusal(miniature(config))
    if reason is None:
        return
    culprits = _culprits(config)
    named = ", ".join(f"{key}: {value}" for key, value in culprits.items())
    remedy = next((_REMEDIES[key] for key in culprits if key in _REMEDIES), "take a model without it")
    where = f"{name_of(section)}: config.json{f': {named}' if named else ''}"
    raise InputError(f"{where}: cannot be exported to ONNX: {reason}; {remedy}")


def check_saved_config(
    section: LanguageModelSection, config: Any, tokenizer: Any, generation_config: Any = None
) -> None:
    """Raise InputError unless configuration and tokenizer can be written into an artefact and onnxruntime-genai reads
    them.

    ``config``, ``tokenizer``: the model's; ``generation_config``: what it says of generation, if it has a file for
    that. No weight is read.
    """
    where = name_of(section)
    _check_vocabulary(where, tokenizer, config.vocab_size)
    with torch.device("meta"):
        model: Any = language_model_class().from_config(config)
    model.generation_config = generation_config or model.generation_config
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_causal_lm_config(Path(folder), model, tokenizer, longest_text(config))
        except TokenizerError as error:
            raise InputError(f"{where}: its tokenizer cannot go into an artefact: {error}") from None
        except ValueError as error:  # settings that transformers does not write
            reason = " ".join(str(error).split())
            raise InputError(f"{where}: generation_config.json or config.json: {reason}") from None


def miniature(config: Any) -> Any:
    """The configuration of a small model with a layer of each type that the model has.

    Heads, rotary embeddings, norms, biases, activation and soft caps are the model's; a sliding window is shorter.
    """
    small = copy.deepcopy(config)
    small.head_dim = _head_size(config)
    if getattr(config, "layer_types", None) is not None:
        small.layer_types = list(dict.fromkeys(config.layer_types))
        small.num_hidden_layers = len(small.layer_types)
    else:
        small.num_hidden_layers = 1
    if getattr(config, "sliding_window", None):
        small.sliding_window = min(_WINDOW, config.sliding_window)
    small.hidden_size = small.intermediate_size = _WIDTH
    small.vocab_size = _VOCABULARY
    small.bos_token_id = small.eos_token_id = small.pad_token_id = None
    small.initializer_range = 0.5  # so that attention is not the same everywhere
    small.dtype = torch.float32
    return small


def _refusal(small: Any) -> str | None:
    """Why a miniature's graph cannot be made or run, or how far it is from PyTorch; None if they agree."""
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 4
    length = longest_text(small)
    try:
        model = _random_model(small)
        graph = ir.serde.serialize_model(export_causal_lm(model, length))
        session = onnxruntime.InferenceSession(graph.SerializeToString(), quiet)
        input_ids = torch.arange(min(_TOKENS, length))[None] % _VOCABULARY
        with torch.inference_mode():
            expected = model(input_ids=input_ids, use_cache=False).logits
        (found,) = session.run(["logits"], prefill_inputs(session, input_ids.numpy()))
    except Exception as error:  # whatever transformers, the builder or ONNX Runtime raise for what they do not know
        reason = " ".join(str(error).split()) or type(error).__name__
        return reason.rpartition("Status Message: ")[2]  # what ONNX Runtime says before is about nodes of the miniature
    difference = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
    return None if difference <= _TOLERANCE else f"its logits are off by {difference:.2g} of the largest"


def _random_model(small: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = language_model_class().from_config(small, attn_implementation=attention_of(small)).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which are all alike otherwise
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model


def _culprits(config: Any) -> dict[str, Any]:
    """The keys, with their values, without which a miniature of ``config`` could be exported: as few as possible.

    Empty if they are not found: if it cannot be exported with every key at its default.
    """
    usual = type(config)()
    usual.head_dim, usual.num_key_value_heads = _USUAL_HEAD, 1
    given = {key: value for key, value in config.to_dict().items() if key not in _NEITHER_SIZE_NOR_KIND}
    given["head_dim"] = _head_size(config)
    unusual = [key for key, value in given.items() if not key.startswith("_") and value != getattr(usual, key, None)]

    def passes(reset: list[str]) -> bool:
        changed = copy.deepcopy(config)
        for key in reset:
            setattr(changed, key, copy.deepcopy(getattr(usual, key, None)))
        return _refusal(miniature(changed)) is None

    culprits = unusual
    if not passes(culprits):
        return {}
    for key in unusual:
        fewer = [other for other in culprits if other != key]
        if passes(fewer):
            culprits = fewer
    return {key: given[key] for key in culprits}


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_rope_types(section: LanguageModelSection, config: Any) -> None:
    """Raise InputError for rotary embeddings whose frequencies change with the length of the text, and for a type under
    the key of older files where transformers leaves it out without a word (in Gemma 3)."""
    parameters = config.rope_parameters or {}
    layered = [key for key in parameters if key in ("full_attention", "sliding_attention")]
    by_key: Mapping[str, Any] = {f"rope_parameters.{key}": parameters[key] for key in layered}
    for key, values in (by_key or {"rope_parameters": parameters}).items():
        kind = (values or {}).get("rope_type", "default")
        old = (values or {}).get("type", kind)
        if old != kind:
            raise InputError(
                f"{name_of(section)}: config.json: {key}.type: {old!r} is not read by transformers, which takes "
                f"rope_type, {kind!r}; call the key rope_type in a copy of the model"
            )
        if kind not in STATIC_ROPE:
            raise InputError(
                f"{name_of(section)}: config.json: {key}.rope_type: {kind!r} cannot be exported to ONNX (older files "
                f"call the key rope_scaling); take a model with one of {', '.join(STATIC_ROPE)}"
            )


def _check_vocabulary(where: str, tokenizer: Any, size: int) -> None:
    """Raise InputError if tokens of ordinary text have no row in the model's token table. Added ones may: Gemma 3 of
    text alone has a token for images."""
    added = tokenizer.added_tokens_decoder
    beyond = [(token, index) for token, index in tokens_beyond(tokenizer, size).items() if index not in added]
    if beyond:
        token, index = beyond[0]
        raise InputError(
            f"{where}: {len(beyond)} tokens of its tokenizer have no row in the model's token table (config.json: "
            f"vocab_size: {size}), {token!r} with id {index} for one; take the tokenizer that belongs to the model"
        )
