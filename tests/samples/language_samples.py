"""Tiny tokenizers, language models and GGUF files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
BOS = SPECIAL.index("<bos>")
BYTE_MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"))
PIECES = (
    "▁",
    "t",
    "h",
    "e",
    "i",
    "n",
    "o",
    "w",
    "r",
    "l",
    "d",
    "▁t",
    "he",
    "▁the",
    "in",
    "or",
    "▁w",
    "▁wor",
    "ld",
    "ro",
    "ow",
)


def byte_level_vocabulary() -> dict[str, int]:
    """265 tokens: special ones, all bytes, four joint ones."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in BYTE_MERGES)]
    return {piece: index for index, piece in enumerate(pieces)}


def byte_level_tokenizer(*, bos: bool = True) -> Any:
    """A tokenizer that knows every text, with ``<bos>`` before it or not."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_level_vocabulary(), merges=list(BYTE_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_config(config_class: Any, **changes: Any) -> Any:
    """Two blocks of width 32 over the vocabulary of :func:`byte_level_tokenizer`."""
    values: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "vocab_size": len(byte_level_vocabulary()),
        "max_position_embeddings": 256,
        "pad_token_id": SPECIAL.index("<pad>"),
        "eos_token_id": SPECIAL.index("<eos>"),
        "bos_token_id": BOS,
    }
    return config_class(**{**values, **changes})


# --- GGUF ------------------------------------------------------------------------------------------------------


def sentencepiece_tokens() -> tuple[list[str], list[float], list[int]]:
    """(tokens, scores, types) like Gemma's: special ones, one given piece, bytes, pieces by falling score."""
    tokens = [*SPECIAL, "\n\n", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    control, user_defined, byte, normal = 3, 4, 6, 1
    types = [control] * len(SPECIAL) + [user_defined] + [byte] * 256 + [normal] * len(PIECES)
    scores = [-1000.0] * (len(tokens) - len(PIECES)) + [-float(rank) for rank in range(len(PIECES))]
    return tokens, scores, types


def tiny_gemma(**changes: Any) -> Any:
    torch.manual_seed(0)
    values = {"vocab_size": len(sentencepiece_tokens()[0]), "rms_norm_eps": 1e-6, "sliding_window": 8, **changes}
    model = Gemma3ForCausalLM(tiny_config(Gemma3TextConfig, **values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # zeros otherwise
                parameter.normal_(std=0.2)
    return model


def tiny_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(LlamaConfig, rms_norm_eps=1e-6, **changes)).eval()


def write_gguf(
    path: Path,
    model: Any,
    *,
    left_out: Sequence[str] = (),
    extra: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """``model`` (Gemma 3 or Llama) in float32 with a vocabulary: SentencePiece for Gemma, byte-level for Llama.

    ``left_out``: GGUF names of tensors not to write; ``extra``: further ones; ``metadata``: values of
    ``tokenizer.ggml`` (or of other keys, given with a dot) to write in place of the usual ones, None for none.
    """
    config = model.config
    architecture = {"gemma3_text": "gemma3", "llama": "llama"}[config.model_type]
    values: dict[str, Any] = {
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.key_length": config.head_dim,
        f"{architecture}.attention.value_length": config.head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.dimension_count": config.head_dim,
        f"{architecture}.rope.freq_base": 1e6 if architecture == "gemma3" else 1e4,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": SPECIAL.index("<eos>"),
        "tokenizer.ggml.unknown_token_id": SPECIAL.index("<unk>"),
        "tokenizer.ggml.padding_token_id": SPECIAL.index("<pad>"),
        "tokenizer.ggml.add_bos_token": True,
        "general.name": "A tiny one",
    }
    if architecture == "gemma3":
        tokens, scores, types = sentencepiece_tokens()
        values |= {
            "gemma3.attention.sliding_window": config.sliding_window,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.add_space_prefix": False,
        }
    else:
        vocabulary = list(byte_level_vocabulary())
        values |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.tokens": vocabulary,
            "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in vocabulary],
            "tokenizer.ggml.merges": [" ".join(pair) for pair in BYTE_MERGES],
        }
    for key, value in (metadata or {}).items():
        values[key if "." in key else f"tokenizer.ggml.{key}"] = value
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        _add(writer, key, value)
    for name, array in {**_gguf_tensors(model, architecture), **(extra or {})}.items():
        if name not in left_out:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _gguf_tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied output layer only once
        array = parameter.detach().numpy()
        if architecture == "gemma3" and "norm" in name:
            array = array + 1  # llama.cpp has no norms around one
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            # llama.cpp turns neighbouring channels, transformers those half a head apart.
            heads = array.shape[0] // model.config.head_dim
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        tensors[names.get_name(name.removesuffix(".weight")) + ".weight"] = np.ascontiguousarray(array)
    return tensors
