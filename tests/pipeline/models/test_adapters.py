"""The MLPs of every supported architecture are found by type and names."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Gemma3TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from pipeline.models.adapters import check_model_type, find_mlps, supported_model_types
from pipeline.plumbing.errors import InputError
from pipeline.recipe.plan import MLPSite

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def vit() -> Any:
    return ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=40))


def dinov2(**options: Any) -> Any:
    return Dinov2ForImageClassification(Dinov2Config(**SMALL, mlp_ratio=2, **options))


def swin() -> Any:
    sizes = {"image_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 8}
    return SwinForImageClassification(SwinConfig(**sizes, depths=[2, 2, 3, 1], num_heads=[1, 2, 2, 2]))


def test_vit() -> None:
    assert find_mlps(vit()) == [
        MLPSite(block, f"vit.layers.{block}.mlp", ("fc1",), "fc2", "activation_fn", 24, 40, None)
        for block in range(3)
    ]


def test_deit() -> None:
    sites = find_mlps(DeiTForImageClassification(DeiTConfig(**SMALL, intermediate_size=40)))
    assert [site.path for site in sites] == [f"deit.layers.{block}.mlp" for block in range(3)]
    assert {(site.first, site.last, site.width, site.hidden) for site in sites} == {(("fc1",), "fc2", 24, 40)}


def test_dinov2_has_an_output_scale() -> None:
    assert find_mlps(dinov2())[2] == MLPSite(
        2, "dinov2.encoder.layer.2.mlp", ("fc1",), "fc2", "activation_fn", 24, 48,
        "dinov2.encoder.layer.2.layer_scale2.lambda1",
    )


def test_dinov2_swiglu_reads_gate_before_up() -> None:
    site = find_mlps(dinov2(use_swiglu_ffn=True))[1]
    assert (site.first, site.last, site.activation) == (("gate_proj", "up_proj"), "down_proj", "act_fn")
    assert (site.width, site.hidden) == (24, 32)


def test_base_model_without_head() -> None:
    assert find_mlps(Dinov2Model(Dinov2Config(**SMALL)))[0].path == "encoder.layer.0.mlp"


def test_swin_counts_blocks_over_stages() -> None:
    sites = find_mlps(swin())
    assert [site.block for site in sites] == list(range(8))
    assert [int(site.path.split(".")[3]) for site in sites] == [0, 0, 1, 1, 2, 2, 2, 3]
    assert [site.width for site in sites] == [8, 8, 16, 16, 32, 32, 32, 64]
    assert [site.hidden for site in sites] == [4 * site.width for site in sites]
    assert sites[6].path == "swin.encoder.layers.2.blocks.2.mlp"


@pytest.mark.parametrize("make", [vit, dinov2, lambda: dinov2(use_swiglu_ffn=True), swin])
def test_sites_are_in_execution_order(make: Any) -> None:
    model = make().eval()
    called: list[str] = []
    sites = find_mlps(model)
    for site in sites:
        model.get_submodule(site.path).register_forward_hook(lambda *_, path=site.path: called.append(path))
    size = model.config.image_size
    model(pixel_values=torch.zeros(1, 3, size, size))
    assert called == [site.path for site in sites]


def language_config(model_type: str) -> Any:
    return AutoConfig.for_model(
        model_type,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        vocab_size=60,
        pad_token_id=0,
    )


@pytest.mark.parametrize("model_type", supported_model_types("text-generation"))
def test_gated_mlps_of_language_models(model_type: str) -> None:
    model = AutoModelForCausalLM.from_config(language_config(model_type)).eval()
    sites = find_mlps(model)
    assert sites == [
        MLPSite(block, f"model.layers.{block}.mlp", ("gate_proj", "up_proj"), "down_proj", "act_fn", 32, 48, None)
        for block in range(3)
    ]
    called: list[str] = []
    for site in sites:
        model.get_submodule(site.path).register_forward_hook(lambda *_, path=site.path: called.append(path))
        mlp = model.get_submodule(site.path)
        x = torch.randn(2, 5, 32)
        gate, up = (mlp.get_submodule(name)(x) for name in site.first)
        expected = mlp.get_submodule(site.last)(mlp.get_submodule(site.activation)(gate) * up)
        torch.testing.assert_close(mlp(x), expected)
    called.clear()
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    assert called == [site.path for site in sites]


def test_language_model_without_head() -> None:
    assert find_mlps(Gemma3TextModel(language_config("gemma3_text")))[2].path == "layers.2.mlp"


def test_meta_device_needs_no_weights() -> None:
    config = LlamaConfig()  # 7 billion parameters
    with torch.device("meta"):
        sites = find_mlps(LlamaForCausalLM(config))
    assert len(sites) == 32
    assert (sites[31].width, sites[31].hidden) == (4096, 11008)


def test_unknown_type_lists_the_supported() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    images, texts = (supported_model_types(task) for task in ("image-classification", "text-generation"))
    with pytest.raises(InputError, match=f"'bert' has no MLPs.*supported: {', '.join(sorted((*images, *texts)))}$"):
        find_mlps(BertForSequenceClassification(config))
    with pytest.raises(InputError, match=f"'bert' has no MLPs.*supported: {', '.join(images)}$"):
        check_model_type("bert", "image-classification")
    with pytest.raises(InputError, match=f"'gpt2' has no MLPs.*supported: {', '.join(texts)}$"):
        check_model_type("gpt2", "text-generation")


def test_model_of_another_task_is_pointed_to_its_source() -> None:
    with pytest.raises(InputError, match=r"'vit' is an image classifier, not a language model.*source is pretrained"):
        check_model_type("vit", "text-generation")
    with pytest.raises(InputError, match=r"'qwen3' is a language model, not an image classifier.*source is causal_lm"):
        check_model_type("qwen3", "image-classification")


def test_all_offenders_are_named() -> None:
    model = vit()
    model.vit.layers[0].mlp.fc1 = nn.Identity()
    del model.vit.layers[1].mlp.activation_fn
    model.vit.layers[2].mlp.fc2 = nn.Linear(40, 25)
    with pytest.raises(InputError) as caught:
        find_mlps(model)
    message = str(caught.value)
    assert "vit.layers.0.mlp.fc1 is Identity, not a Linear" in message
    assert "vit.layers.1.mlp.activation_fn is missing" in message
    assert "shapes in vit.layers.2.mlp do not fit together: fc1 [40, 24], fc2 [25, 40]" in message


def test_square_layers_are_told_apart_by_name() -> None:
    model = ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=24))
    site = find_mlps(model)[0]
    assert (site.first, site.last) == (("fc1",), "fc2")


def test_shared_module_and_shared_weight_are_refused() -> None:
    model = vit()
    model.vit.layers[2].mlp = model.vit.layers[0].mlp
    with pytest.raises(InputError, match=r"vit\.layers\.2\.mlp is the same object as vit\.layers\.0\.mlp"):
        find_mlps(model)
    model = vit()
    model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.fc1\.weight is the same object as vit\.layers\.0"):
        find_mlps(model)


def test_missing_layer_scale_is_named() -> None:
    model = dinov2()
    model.dinov2.encoder.layer[1].layer_scale2 = nn.Identity()
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.layer_scale2\.lambda1 is missing"):
        find_mlps(model)
