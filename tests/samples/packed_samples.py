"""Tiny models with MLPs packed from random levels: material of the artefact tests."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from rest_samples import with_packed_linears
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from exporters.artifact import Golden, Provenance, write_artifact
from exporters.image_classifier import export_image_classifier
from exporters.modules import install_packed
from exporters.packed_model import PackedLinear, PackedMLP, PackedModel
from exporters.rest import fix_position_embeddings, packed_rest, round_to_float16
from fips_ort.layout import Layout, Pattern
from fips_ort.manifest import Manifest
from fips_ort.packed import PackedWeight, pack

COMMON = {"image_size": 16, "patch_size": 4, "num_labels": 10, "initializer_range": 0.2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, **COMMON}


def tiny_model(kind: str, seed: int = 0) -> nn.Module:
    """A ``…ForImageClassification`` in eval mode with random weights, biases included."""
    torch.manual_seed(seed)
    if kind == "vit":
        model = ViTForImageClassification(ViTConfig(intermediate_size=64, **SMALL))
    elif kind == "deit":
        model = DeiTForImageClassification(DeiTConfig(intermediate_size=64, **SMALL))
    elif kind == "dinov2":
        model = Dinov2ForImageClassification(Dinov2Config(mlp_ratio=2, **{**SMALL, "image_size": 24}))
    elif kind == "dinov2_swiglu":
        model = Dinov2ForImageClassification(Dinov2Config(mlp_ratio=3, use_swiglu_ffn=True, **SMALL))
    elif kind == "swin":
        config = SwinConfig(embed_dim=32, depths=[2, 1], num_heads=[2, 4], window_size=2, mlp_ratio=2, **COMMON)
        model = SwinForImageClassification(config)
    else:
        raise ValueError(kind)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model.eval()


PIXEL_SHAPE = (3, 16, 16)


def images(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *PIXEL_SHAPE)).astype(np.float32)


@dataclass(frozen=True)
class Sample:
    """A packed model, the torch module of its stored numbers and its exported graph."""

    packed: PackedModel
    module: nn.Module
    graph: ir.Model

    def logits(self, pixel_values: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.module(pixel_values=torch.from_numpy(pixel_values)).logits.numpy()


def sample(
    kind: str, pattern: str, *, graded: bool = False, accuracy_level: int = 0, has_basis: bool = True
) -> Sample:
    """A sample, exported once per test process; the rest of the model is float16, attention 4 bits. Not to be
    changed."""
    return _sample(kind, pattern, graded, accuracy_level, has_basis)


@functools.cache
def _sample(kind: str, pattern: str, graded: bool, accuracy_level: int, has_basis: bool) -> Sample:
    dense = tiny_model(kind)
    fix_position_embeddings(dense, *PIXEL_SHAPE[1:])
    packed = random_packed(dense, pattern, graded=graded, has_basis=has_basis)
    module = with_packed_linears(install_packed(dense, packed, accuracy_level), 4, 32, skip=["classifier"])
    module = round_to_float16(module)
    return Sample(packed, module, export_image_classifier(module, PIXEL_SHAPE))


def mlp_paths(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__.endswith(("MLP", "FFN"))]


def random_weight(rng: np.random.Generator, layout: Layout, gain: float = 1.0) -> PackedWeight:
    """Random levels; scales such that a product keeps the magnitude of its input."""
    levels = np.zeros((layout.rows, layout.columns), np.int8)
    deviations = np.ones((layout.rows, layout.columns))
    for bits, rows, columns in layout.submatrices():
        half = 1 << (bits - 1)
        part = levels[rows, columns]
        levels[rows, columns] = rng.integers(-half, half, part.shape)
        deviations[rows, columns] = half / np.sqrt(3)
    mask = random_mask(rng, layout)
    kept = 1.0 if mask is None else mask.mean()
    per_block = deviations.reshape(layout.rows, -1, layout.block_size).mean(axis=-1)
    scales = gain / (per_block * np.sqrt(layout.columns * kept)) * rng.uniform(0.5, 1.5, layout.scales_shape)
    return pack(levels, scales.astype(np.float16), mask, layout)


def random_mask(rng: np.random.Generator, layout: Layout) -> np.ndarray | None:
    pattern = layout.pattern
    shape = (layout.rows, layout.columns)
    if not pattern.keep:
        return None
    if not pattern.is_n_of_m:
        return rng.random(shape) < 0.25
    order = rng.random((*shape[:1], shape[1] // pattern.of, pattern.of)).argsort(axis=-1)
    return (order < pattern.keep).reshape(shape)


def random_packed(model: nn.Module, pattern: str, *, per_group: int = 2, bits: int = 4, block_size: int = 32,
                  graded: bool = False, has_basis: bool = True, seed: int = 0) -> PackedModel:
    """Groups of ``per_group`` MLPs of equal width with random packed weights; ``graded``: half 4 bits, half 2.

    Without a basis: whole matrices, of one bit-width.
    """
    rng = np.random.default_rng(seed)
    bases: dict[str, PackedWeight] = {}
    mlps: list[PackedMLP] = []
    assert has_basis or not graded

    def layout(rows: int, columns: int, axis: int, sparse: bool) -> Layout:
        kind = Pattern.parse(pattern if sparse else "dense")
        if graded:
            return Layout(rows, columns, block_size, (0, 32, 0, 32), axis, True, kind)
        return Layout.uniform(rows, columns, bits, block_size, segment_axis=axis, pattern=kind)

    def linear(child: nn.Module, sizes: tuple[int, int], axis: int) -> PackedLinear:
        bias = None if child.bias is None else child.bias.detach().numpy().copy()
        return PackedLinear(random_weight(rng, layout(*sizes, axis, True)), bias)

    for block, path in enumerate(mlp_paths(model)):
        mlp = model.get_submodule(path)
        names = ["gate_proj", "up_proj", "down_proj"] if hasattr(mlp, "gate_proj") else ["fc1", "fc2"]
        first = mlp.get_submodule(names[0])
        features, width = first.in_features, first.out_features
        basis = f"group_{block // per_group}" if has_basis else None
        rank = 64 if has_basis else features
        if basis is not None and basis not in bases:
            bases[basis] = random_weight(rng, layout(rank, features, 0, False))
        mlps.append(PackedMLP(
            block,
            path,
            basis,
            {name: linear(mlp.get_submodule(name), (width, rank), 1) for name in names[:-1]},
            (names[-1], linear(mlp.get_submodule(names[-1]), (rank, width), 0)),
            "act_fn" if hasattr(mlp, "act_fn") else "activation_fn",
        ))
    return PackedModel(bases, mlps)


def write_sample(folder: Path, exported: Sample, *, max_shard_size: int = 1 << 30, title: str = "sample") -> Manifest:
    """The artefact of a sample, with golden outputs computed by PyTorch."""
    x = images(3)
    golden = Golden({"pixel_values": x}, {"logits": exported.logits(x)})
    provenance = Provenance(title, "Random weights.", {"name": title}, {"torch": torch.__version__})
    save_config = exported.module.config.save_pretrained
    weights = exported.packed.weights() | packed_rest(exported.module).weights()
    return write_artifact(folder, exported.graph, weights, golden, provenance, save_config, max_shard_size)
