"""Facts about the weights of any model."""

import copy

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from pipeline.models.weights import check_finite, hash_model
from pipeline.plumbing.errors import InputError


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
