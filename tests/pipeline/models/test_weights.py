"""Facts about the weights of any model."""

import copy

import pytest
import torch
from causal_lm_samples import tiny_language_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from pipeline.models.weights import check_finite, check_float16, hash_model
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import RestOfModel


def vit(**changes: object) -> ViTForImageClassification:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **{**sizes, **changes}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    check_finite(model)
    with torch.no_grad():
        model[0].bias[3] = value
        model[1].running_mean[1] = value
    with pytest.raises(InputError, match=r"contain NaN or infinity: 0\.bias, 1\.running_mean$"):
        check_finite(model)


def test_hash_is_of_weights_and_configuration() -> None:
    model = vit()
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.weight[0, 0] += 1
    assert hash_model(same) == hash_model(model) != hash_model(other)
    assert hash_model(vit(layer_norm_eps=1e-3)) != hash_model(model)


# --- what float16 holds ----------------------------------------------------------------------------------------

EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"
LINEAR, BIAS = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"
MLP = "model.layers.0.mlp.up_proj"
FLOAT32 = {"weights": "float32"}


@pytest.mark.parametrize(
    ("name", "value", "rest", "holds"),
    [
        (EMBEDDING, 65_519.0, {}, True),  # rounded to the greatest number of float16, 65,504
        (EMBEDDING, 65_520.0, {}, False),
        (NORM, -1e5, {}, False),
        (NORM, 1e5, FLOAT32, True),
        (LINEAR, 1e5, {}, False),
        # Levels of 4 bits end at 7.5, those of 8 bits at 127.5, times a scale in float16.
        (LINEAR, 4.8e5, {"linear_bits": 4}, True),
        (LINEAR, -5e5, {"linear_bits": 4}, False),
        (LINEAR, 6e5, {"linear_bits": 8}, True),
        (EMBEDDING, 6e5, {"embedding_bits": 4}, False),
        (EMBEDDING, 6e5, {"embedding_bits": 4, **FLOAT32}, False),
        (EMBEDDING, 6e5, {"embedding_bits": 8, **FLOAT32}, True),
        (EMBEDDING, 2e5, {"embedding_bits": [{"bits": 8, "tokens": 9}, {"bits": 3}], **FLOAT32}, True),
        (EMBEDDING, 3e5, {"embedding_bits": [{"bits": 8, "tokens": 9}, {"bits": 3}], **FLOAT32}, False),
        (BIAS, 1e5, FLOAT32, True),
        (BIAS, 1e5, {"linear_bits": 4, **FLOAT32}, False),  # beside codes, biases are float16
        (f"{MLP}.weight", 1e5, {}, True),  # packed, with scales of its own
        (f"{MLP}.bias", 1e5, {}, True),
    ],
)
def test_weights_beyond_float16_are_named(name: str, value: float, rest: dict[str, object], holds: bool) -> None:
    model = tiny_language_model("llama")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    storage = RestOfModel.model_validate({**rest, "block_size": 16} if "linear_bits" in rest else rest)
    if holds:
        check_float16(model, storage, compressed={MLP})
        return
    message = rf"float16 ends at 65,504 and cannot hold {name} \(up to .*set quantization\.rest\.weights: float32"
    with pytest.raises(InputError, match=message):
        check_float16(model, storage, compressed={MLP})


def test_layers_that_take_no_codes_are_float16() -> None:
    model = vit()
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e5
    check_float16(model, RestOfModel(linear_bits=4))
    with pytest.raises(InputError, match=r"cannot hold classifier\.weight \(up to 100000\)"):
        check_float16(model, RestOfModel(linear_bits=4), plain={"classifier"})
