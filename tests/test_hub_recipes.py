"""Recipes of hub models parse and fit their architectures; tiny models of these load from local folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_lm_samples import tiny_language_model
from language_samples import byte_level_tokenizer
from PIL import Image
from places import RECIPES
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitImageProcessorPil,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from fips_ort.validate import validate
from pipeline.data.images import ImageData, load_data
from pipeline.estimate import estimate
from pipeline.evaluation import text_speed
from pipeline.evaluation.genai_load import GenaiLoad
from pipeline.models.adapters import find_mlps, supported_model_types
from pipeline.models.image_classifier import LoadedModel, load_model, load_preprocessing
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.progress import Progress
from pipeline.recipe.reading import load_recipe, parse_recipe
from pipeline.recipe.schema import (
    CausalLanguageModel,
    DigitsData,
    HubTextData,
    ImageFolderData,
    PretrainedModel,
    ScratchModel,
    Training,
)
from pipeline.run import run

IMAGE_SIZE = 32
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "emu"}, "label2id": {"cat": 0, "dog": 1, "emu": 2}}
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    **LABELS,
}


def vit() -> Any:
    return ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=32, hidden_dropout_prob=0.1))


def deit() -> Any:
    return DeiTForImageClassification(DeiTConfig(**SMALL, intermediate_size=32))


def dinov2() -> Any:
    return Dinov2ForImageClassification(Dinov2Config(**SMALL, mlp_ratio=2))


def dinov2_swiglu() -> Any:
    return Dinov2ForImageClassification(Dinov2Config(**SMALL, mlp_ratio=3, use_swiglu_ffn=True))


def swin() -> Any:
    sizes = {"image_size": IMAGE_SIZE, "patch_size": 2, "window_size": 2, "embed_dim": 8}
    return SwinForImageClassification(SwinConfig(**sizes, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 2], **LABELS))


def save(model: Any, path: Path) -> PretrainedModel:
    torch.manual_seed(0)
    model.save_pretrained(path)
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(path)
    return PretrainedModel(source="pretrained", path=str(path))


@pytest.fixture
def images(tmp_path: Path) -> ImageFolderData:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("dog", "cat"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return ImageFolderData(source="image_folder", path=str(tmp_path / "images"))


def load(section: PretrainedModel | ScratchModel, data: Any) -> tuple[LoadedModel, ImageData]:
    preprocessing = load_preprocessing(section, data)
    images = load_data(data, preprocessing, 0)
    return load_model(section, images, 0, Progress()), images


# --- recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "blocks"), [("vit-base", 12), ("deit-base", 12), ("swin-large", 24)])
def test_hub_recipe_covers_every_block_once(name: str, blocks: int) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.name == name
    assert isinstance(recipe.model, PretrainedModel)
    groups = recipe.compression.groups
    if isinstance(groups, int):
        assert blocks % groups == 0
    else:
        covered = [block for group in groups for block in group]
        assert covered == list(range(blocks))


def test_swin_groups_follow_the_stages() -> None:
    """Swin-L at an eighth of its width: the same 2, 2, 18 and 2 blocks."""
    config = SwinConfig(embed_dim=24, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=7)
    sites = find_mlps(SwinForImageClassification(config))
    groups = load_recipe(RECIPES / "swin-large.yaml").compression.groups
    assert isinstance(groups, list)
    assert [{sites[block].width for block in group} for group in groups] == [
        {24}, {48}, {96}, {96}, {96}, {192}
    ]  # fmt: skip


# --- language models -------------------------------------------------------------------------------------------

GIB = 2**30
LANGUAGE_CONFIGS: dict[str, Any] = {
    "gemma2-2b-w3": Gemma2Config(
        vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, sliding_window=4096, query_pre_attn_scalar=256, dtype="float32",
    ),
    "gemma3-1b-w4": Gemma3TextConfig(
        vocab_size=262_144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256, dtype="bfloat16",
    ),
    "llama3.2-1b-w4": LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, dtype="bfloat16",
    ),
}  # fmt: skip
"""What the models' own config.json say."""
TINY_KINDS = {"gemma2-2b-w3": "gemma2", "gemma3-1b-w4": "gemma3", "llama3.2-1b-w4": "llama"}
# Parameters, size of the MLPs, ranks of the groups.
LANGUAGE_PLANS: dict[str, tuple[int, int, list[int]]] = {
    "gemma2-2b-w3": (2_614_341_888, 3 * 2304 * 9216 * 26, [1408] * 7),
    "gemma3-1b-w4": (999_885_952, 3 * 1152 * 6912 * 26, [1152] * 4),
    "llama3.2-1b-w4": (1_235_814_400, 3 * 2048 * 8192 * 16, [2048] * 4),
}


@pytest.mark.parametrize("name", LANGUAGE_CONFIGS)
def test_language_recipe_plans_its_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.name == name
    assert isinstance(recipe.model, CausalLanguageModel)
    assert isinstance(recipe.data, HubTextData)
    assert (recipe.data.path, recipe.data.config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    config = LANGUAGE_CONFIGS[name]
    monkeypatch.setattr("pipeline.estimate.load_language_config", lambda _: config)
    estimated = estimate(recipe)
    parameters, mlps, ranks = LANGUAGE_PLANS[name]
    assert (estimated.parameters, estimated.mlp_parameters) == (parameters, mlps)
    assert [group.rank for group in estimated.plan.groups] == ranks
    covered = [site.block for group in estimated.plan.groups for site in group.sites]
    assert covered == list(range(config.num_hidden_layers))
    assert estimated.plan.dense_blocks == ()
    assert estimated.activation_bytes_per_sample == 8 * 512 * config.hidden_size * config.num_hidden_layers
    # What the recipes say of themselves; factors whose bits are allocated are planned with 2.
    target = recipe.quantization.target_stored_bits
    if target is None:
        assert 8 * estimated.mlp_bytes / mlps == pytest.approx(2.0, abs=0.05)
    else:
        assert 8 * estimated.mlp_bytes / mlps < target
    # On a machine of 24 GiB, where dense weights mapped from float32 files may leave memory.
    assert estimated.peak_memory[1] - estimated.mapped_bytes < 20 * GIB


def test_gemma2_groups_are_the_papers() -> None:
    groups = load_recipe(RECIPES / "gemma2-2b-w3.yaml").compression.groups
    assert groups == [[0, 1], *([start, start + 1, start + 2, start + 3] for start in range(2, 26, 4))]


@pytest.mark.parametrize("name", LANGUAGE_CONFIGS)
def test_language_recipe_runs_on_a_tiny_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are the recipe's, but for few steps, other groups and local text."""
    monkeypatch.setattr(text_speed, "GENERATED_TOKENS", 3)
    monkeypatch.setattr(text_speed, "ROUNDS", 1)
    monkeypatch.setattr(text_speed, "measure_load", lambda _: GenaiLoad(1, 1, 1, 1.0))
    kind = TINY_KINDS[name]
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3" else {}
    # Blocks of 64 and 128 have to divide widths.
    wide = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    tiny_language_model(kind, initializer_range=0.1, **wide, **layers).save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    words = "the river rises in the hills and flows through three countries before it reaches the sea"
    (tmp_path / "text.txt").write_text("\n".join(f"{number}: {words}." for number in range(60)), encoding="utf-8")
    content = load_recipe(RECIPES / f"{name}.yaml").model_dump(mode="json", exclude_unset=True)
    content["model"]["path"] = str(tmp_path / "model")
    content["data"] = {"source": "text", "train": str(tmp_path / "text.txt"), "context": 32, "test_fraction": 0.3}
    content["compression"]["groups"] = 2
    content["compression"]["budget"] += 0.2  # a basis weighs more beside few columns
    content["calibration"]["samples"] = 16
    content["evaluation"]["samples"] = 4
    if "target_stored_bits" in content["quantization"]:
        content["quantization"]["target_stored_bits"] = 4.0
    if "fit" in content:
        content["fit"] |= {"steps": 3, "batch_tokens": 64}
    content["quantization"]["training"][0] |= {"steps": 3, "batch_tokens": 64}
    report = run(parse_recipe(content, name), tmp_path / "run", Progress())
    assert all(check.passed for check in validate(tmp_path / "run" / "artifact"))
    # Activations are of 8 bits here (accuracy_level 4).
    assert report.quality.onnx_native == pytest.approx(report.quality.qat, rel=0.05)
    assert report.parity.native_vs_torch.relative <= 1e-3
    assert max(report.reconstruction_error["qat"].values()) < 0.5


# --- local folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [vit, deit, dinov2, dinov2_swiglu, swin])
def test_local_folder_gives_the_saved_model(make: Any, tmp_path: Path, images: ImageFolderData) -> None:
    original = make().eval()
    loaded, data = load(save(original, tmp_path / "model"), images)
    pixel_values, labels = data.train.batch(range(6))
    assert pixel_values.shape == (6, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(pixel_values=pixel_values).logits, original(pixel_values).logits)
    assert find_mlps(loaded.model) == find_mlps(original)
    assert loaded.model.config.id2label == {0: "cat", 1: "dog", 2: "emu"}


def test_no_dropout_even_in_training_mode(tmp_path: Path, images: ImageFolderData) -> None:
    loaded, data = load(save(vit(), tmp_path / "model"), images)
    model = loaded.model
    assert not model.training
    pixel_values, _ = data.train.batch(range(6))
    expected = model(pixel_values=pixel_values).logits
    assert torch.equal(model.train()(pixel_values=pixel_values).logits, expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_source_hash_is_of_the_weights(tmp_path: Path, images: ImageFolderData) -> None:
    model = vit()
    first = load(save(model, tmp_path / "a"), images)[0].source_hash
    assert load(save(model, tmp_path / "b"), images)[0].source_hash == first
    with torch.no_grad():
        model.classifier.bias[0] += 1.0
    assert load(save(model, tmp_path / "c"), images)[0].source_hash != first


def test_half_precision_checkpoints_are_loaded_as_float32(tmp_path: Path, images: ImageFolderData) -> None:
    loaded, _ = load(save(vit().half(), tmp_path / "model"), images)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


# --- bad input -------------------------------------------------------------------------------------------------


def test_folder_that_does_not_exist(tmp_path: Path, images: ImageFolderData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"model\.path: .*nothing: cannot load it from a local folder or the Hugging"):
        load_preprocessing(PretrainedModel(source="pretrained", path=str(tmp_path / "nothing")), images)


def test_missing_weights_are_named(tmp_path: Path, images: ImageFolderData) -> None:
    section = save(vit(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    removed = next(name for name in tensors if name.endswith("classifier.bias"))
    save_file({name: tensor for name, tensor in tensors.items() if name != removed}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights of ViTForImageClassification.*: classifier\.bias;"):
        load(section, images)


def test_backbone_without_classifier(tmp_path: Path, images: ImageFolderData) -> None:
    section = save(ViTModel(ViTConfig(**SMALL, intermediate_size=32)), tmp_path / "model")
    with pytest.raises(InputError, match=r"classifier\.bias, classifier\.weight; is it a fine-tuned image classif"):
        load(section, images)


def test_weights_of_another_shape(tmp_path: Path, images: ImageFolderData) -> None:
    section = save(vit(), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 48}))
    with pytest.raises(InputError, match=r"another shape: .*fc1\.bias"):
        load(section, images)


def test_weights_that_are_not_finite(tmp_path: Path, images: ImageFolderData) -> None:
    model = vit()
    with torch.no_grad():
        model.vit.layers[2].mlp.fc2.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinity: vit\.layers\.2\.mlp\.fc2\.weight"):
        load(save(model, tmp_path / "model"), images)


def test_truncated_weights(tmp_path: Path, images: ImageFolderData) -> None:
    section = save(vit(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot load it"):
        load(section, images)


def test_model_type_without_known_mlps(tmp_path: Path, images: ImageFolderData) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(InputError, match="'bert' has no MLPs known to FiPS; supported: deit, dinov2, swin, vit"):
        load_preprocessing(save(BertForSequenceClassification(config), tmp_path / "model"), images)


def test_processor_that_makes_another_size(tmp_path: Path, images: ImageFolderData) -> None:
    section = save(vit(), tmp_path / "model")
    cropping = BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 24, "width": 24})
    cropping.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"makes images of 24x24, the model takes 32x32"):
        load_preprocessing(section, images)


# --- scratch ---------------------------------------------------------------------------------------------------


def scratch(**config: Any) -> ScratchModel:
    values = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ScratchModel(
        source="scratch",
        model_type="vit",
        config={**values, "intermediate_size": 32, **config},
        training=Training(steps=120, batch_size=64, learning_rate=1e-2),
        augmentation="affine",
    )


DIGITS = DigitsData(source="digits", image_size=8)


def test_scratch_model_learns_and_repeats_itself() -> None:
    loaded, data = load(scratch(), DIGITS)
    pixel_values, labels = data.test.batch(range(len(data.test)))
    with torch.no_grad():
        accuracy = (loaded.model(pixel_values=pixel_values).logits.argmax(dim=1) == labels).float().mean()
    assert accuracy > 0.5
    torch.rand(3)  # the global generator must not matter
    assert load(scratch(), DIGITS)[0].source_hash == loaded.source_hash


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load(scratch(), DIGITS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hiden_size": 16}, r"model\.config\.hiden_size: not a setting of a vit model"),
        ({"num_labels": 10}, r"model\.config\.num_labels: not a setting"),
        ({"hidden_dropout_prob": 0.1}, r"model\.config\.hidden_dropout_prob: got 0\.1; dropout is not supported"),
        ({"hidden_size": "big"}, r"model\.config: .*hidden_size"),
        ({"image_size": [8, 16]}, r"model\.config\.image_size: \[8, 16\] is not square"),
        ({"image_size": 12}, r"data\.image_size: 8 is not the model's image size, 12"),
    ],
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(scratch(**config), DIGITS)


def test_unknown_model_type() -> None:
    section = ScratchModel(source="scratch", model_type="vitt", config={}, training=Training(steps=1))
    with pytest.raises(InputError, match="'vitt' has no MLPs known to FiPS; supported"):
        load_preprocessing(section, DIGITS)


@pytest.mark.parametrize("model_type", supported_model_types("image-classification"))
def test_every_model_type_can_start_from_scratch(model_type: str) -> None:
    sizes = {"image_size": 8, "patch_size": 4}
    if model_type == "swin":
        sizes |= {"embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 2}
    else:
        sizes |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    section = ScratchModel(source="scratch", model_type=model_type, config=sizes, training=Training(steps=1))
    loaded, _ = load(section, DigitsData(source="digits", image_size=8))
    assert type(loaded.model).__name__.lower() == f"{model_type.replace('_', '')}forimageclassification"
