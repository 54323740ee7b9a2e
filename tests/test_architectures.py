"""The whole chain on tiny models of every supported kind of MLP and block, from a local checkpoint and image folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manifest_samples import mlp_weights
from PIL import Image
from run_samples import SHORT_BENCH_SECONDS, TINY, tiny_recipe
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fips_ort.manifest import read_manifest
from fips_ort.validate import validate
from pipeline.models.adapters import find_mlps, supported_model_types
from pipeline.plumbing.progress import Progress
from pipeline.recipe.reading import parse_recipe
from pipeline.run import run
from pipeline.tasks import image_classification
from pipeline.tasks.base import Dense
from pipeline.tasks.image_classification import ImageClassificationTask

LABELS = ["left", "right"]
COMMON = {"image_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any], list[list[int]]]] = {
    "deit": ("deit", {**COMMON, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}, [[0, 1]]),
    "dinov2": ("dinov2", {**COMMON, "patch_size": 8, "hidden_size": 32, "mlp_ratio": 2}, [[0], [1]]),
    "dinov2-swiglu": (
        "dinov2",
        {**COMMON, "patch_size": 8, "hidden_size": 32, "mlp_ratio": 3, "use_swiglu_ffn": True},
        [[0, 1]],
    ),
    "swin": (
        "swin",
        {"image_size": 16, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        [[0, 1], [2, 3]],
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose label is the brighter half: ``train`` and ``val``, 12 of each label."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in LABELS:
            target = folder / split / label
            target.mkdir(parents=True)
            for number in range(12):
                pixels = generator.integers(0, 128, (16, 16, 3), dtype=np.uint8)
                half = slice(0, 8) if label == "left" else slice(8, 16)
                pixels[:, half] += 100
                Image.fromarray(pixels).save(target / f"{number}.png")
    return folder


def test_every_model_type_has_a_run() -> None:
    types = {model_type for model_type, _, _ in MODELS.values()}
    assert {"vit", *types} == set(supported_model_types("image-classification"))  # ViT in tests/test_run.py


@pytest.mark.parametrize("name", MODELS)
def test_whole_chain(name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_classification, "BENCH_SECONDS", SHORT_BENCH_SECONDS)
    model_type, config, groups = MODELS[name]
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    architecture = CONFIG_MAPPING[model_type].__name__.removesuffix("Config") + "ForImageClassification"
    settings = AutoConfig.for_model(model_type, **config, **names, architectures=[architecture])
    model = AutoModelForImageClassification.from_config(settings)
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    recipe = parse_recipe(
        {
            "name": name,
            "model": {"source": "pretrained", "path": str(tmp_path / "model")},
            "data": {"source": "image_folder", "path": str(images)},
            "compression": {
                "groups": groups,
                "budget": 0.8,
                "pattern": "1:4",
                "sparsifier": {"algorithm": "static"},
            },
            "fit": {"steps": 20, "batch_tokens": 64, "learning_rate": 2e-2},
            "quantization": {
                "basis": {"bits": 4, "block_size": 32},
                "projections": {"bits": 3, "block_size": 32, "levels": "midrise"},
                "training": [{"objective": "local", "steps": 5, "batch_tokens": 64, "learning_rate": 1e-3}],
                "rest": {"linear_bits": 8, "block_size": 16},
            },
        },
        "test",
    )
    report = run(recipe, tmp_path / "run", Progress())
    artifact = tmp_path / "run" / "artifact"
    assert all(check.passed for check in validate(artifact))
    assert report.parity.native_vs_torch.relative <= 1e-3
    assert report.parity.same_predictions
    assert [list(group.blocks) for group in report.groups] == groups
    linears_per_mlp = 3 if name == "dinov2-swiglu" else 2
    blocks = sum(map(len, groups))
    assert len(mlp_weights(read_manifest(artifact))) == len(groups) + linears_per_mlp * blocks
    for block in range(blocks):
        # Training took the sparse, quantized MLPs clearly nearer to the dense ones than zeros are.
        assert report.reconstruction_error["qat"][str(block)] < 0.6


@pytest.mark.parametrize("weights", ["float16", "float32"])
def test_stored_rest_is_a_copy_with_fixed_positions(weights: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model("dinov2", **{**COMMON, "image_size": 32}, patch_size=8, hidden_size=32, mlp_ratio=2)
    dense = AutoModelForImageClassification.from_config(config).eval()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    task = ImageClassificationTask.__new__(ImageClassificationTask)  # without data, which this does not need
    task.recipe = tiny_recipe(quantization=TINY["quantization"] | {"rest": {"weights": weights}})
    task.image_size = 16
    task._dense = Dense(dense, find_mlps(dense), source_hash="")
    task.store_rest(tmp_path, {}, Progress())
    base = task.open_rest(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    positions = base.get_parameter("dinov2.embeddings.position_embeddings")
    assert positions.shape == (1, 1 + 2 * 2, 32)
    assert torch.equal(positions, positions.half().float()) == (weights == "float16")
