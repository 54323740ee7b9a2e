"""onnxruntime-genai's model builder, used as a library: which of its classes builds a model, with which settings.

The builder is made to be run on a folder of weights. We use two parts of it: the subgraphs of embedding, norms,
attention with key-value cache and output layer (:mod:`exporters.causal_lm`), and the configuration that the runtime
reads (:mod:`exporters.genai_config`).
"""

import contextlib
import importlib
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

_CLASSES = {
    "Gemma2ForCausalLM": "Gemma2Model",
    "Gemma3ForCausalLM": "Gemma3Model",
    "LlamaForCausalLM": "LlamaModel",
    "MistralForCausalLM": "MistralModel",
    "Qwen2ForCausalLM": "QwenModel",
    "Qwen3ForCausalLM": "Qwen3Model",
}
ARCHITECTURES = tuple(_CLASSES)
"""Model classes of transformers that can be exported."""

_FLOAT32 = 1
"""onnx.TensorProto.FLOAT: type of activations, cache and logits."""


def new_builder(architecture: str, config: Any, max_length: int, parts: type | None = None) -> Any:
    """An instance of the builder's class for ``architecture``, with the methods of ``parts`` in front of its own.

    ``config``: the model's transformers configuration, which is not changed. ``max_length``: limit of tokens that the
    model will be run on, prompt included. Raises ValueError for an architecture that is not in
    :data:`ARCHITECTURES`.
    """
    if architecture not in _CLASSES:
        raise ValueError(f"cannot export a {architecture}; supported: {', '.join(ARCHITECTURES)}")
    base = getattr(_import_builders(), _CLASSES[architecture])
    kind = base if parts is None else type(f"{parts.__name__}{base.__name__}", (parts, base), {})
    # Caches that hold the window alone would save memory in long texts, but only onnxruntime-genai can feed them:
    # they must be there, in full size, before the first token.
    options = {"windowed_kv_cache": False, "hf_token": False}
    with silent():
        # The empty path is the builder's cache folder, in which only its own way to save a model would write.
        builder = kind(_describe(architecture, config, max_length), _FLOAT32, _FLOAT32, "cpu", "", options)
    if architecture == "Gemma3ForCausalLM":
        builder.model_type = "gemma3_text"  # the runtime's name for models without vision
    return builder


def layer_types(architecture: str, config: Any) -> list[str]:
    """``full_attention`` or ``sliding_attention`` for every layer."""
    listed = getattr(config, "layer_types", None)
    if listed is not None:
        return list(listed)
    # Mistral has one window for all layers; Llama has none.
    window = getattr(config, "sliding_window", None) if architecture == "MistralForCausalLM" else None
    return ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Suppress the builder's progress messages; errors still arrive as exceptions."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _import_builders() -> Any:
    # The builder imports its neighbours as top-level modules; its package puts their folder on the path.
    importlib.import_module("onnxruntime_genai.models")
    return importlib.import_module("onnxruntime_genai.models.builders")


def _describe(architecture: str, config: Any, max_length: int) -> SimpleNamespace:
    """A copy of ``config`` in the form in which the builder reads it.

    Rotary embeddings are always described as plain ones: the builder knows neither nested parameters (Gemma 3) nor
    all ways to scale, and we take the frequencies from the model itself.
    """
    fields = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("rope_scaling", "quantization_config", "partial_rotary_factor")
    }
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    return SimpleNamespace(
        **{
            **fields,
            "architectures": [architecture],
            "_name_or_path": "",
            "layer_types": layer_types(architecture, config),
            "max_position_embeddings": min(config.max_position_embeddings, max_length),
            "rope_parameters": plain,
            "rope_theta": plain["rope_theta"],
            "rope_local_base_freq": plain["rope_theta"],
        }
    )
