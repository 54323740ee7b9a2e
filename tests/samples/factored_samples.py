"""Small recipes, groups and models for the tests of factorization, training and quantization."""

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification

from fips_ort.layout import PATTERNS, Pattern, Segments
from pipeline.compression.calibrate import Activations, activation_files
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import factorize_group
from pipeline.compression.fit import LocalTarget
from pipeline.models.adapters import find_mlps
from pipeline.quantization.prepare import prepare_factors
from pipeline.quantization.segments import choose_segments
from pipeline.recipe.plan import GroupPlan, MLPSite, make_plan
from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import Recipe, Sparsifier

ALGORITHMS: tuple[str, ...] = get_args(Sparsifier.model_fields["algorithm"].annotation)
"""All sparsifiers that a recipe can ask for."""
N_OF_M = tuple(name for name in PATTERNS if Pattern.parse(name).is_n_of_m)
CONTENT: dict[str, Any] = {
    "name": "sample",
    "model": {
        "source": "scratch",
        "model_type": "vit",
        "config": {"hidden_size": 32},
        "training": {"steps": 1},
    },
    "data": {"source": "digits", "image_size": 16},
    "compression": {"groups": 2, "budget": 0.5, "sparsity": 0.75, "pattern": "bitmap"},
    "fit": {"steps": 4},
    "quantization": {"basis": {"bits": 4, "block_size": 16}, "projections": {"bits": 4, "block_size": 16}},
}


def content(**changes: Any) -> dict[str, Any]:
    """``CONTENT`` with changes by dotted key, the dots written as two underscores."""
    result = copy.deepcopy(CONTENT)
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return result


def recipe(**changes: Any) -> Recipe:
    return parse_recipe(content(**changes), "sample.yaml")


def n_of_m(pattern: str = "1:4", **changes: Any) -> Recipe:
    """A recipe with an n:m pattern (or dense), which implies its sparsity, and blocks that suit it."""
    parsed = Pattern.parse(pattern)
    block = max(16, 8 * parsed.of // parsed.keep) if parsed.is_n_of_m else 16
    settings: dict[str, Any] = {"compression__pattern": pattern, "compression__sparsity": None}
    if pattern == "dense":
        settings["compression__budget"] = 0.6  # else the rank of the tiny model is below one block
    return recipe(**{**settings, "quantization__projections__block_size": block, **changes})


def dense_recipe(**changes: Any) -> Recipe:
    """A recipe of the baseline that quantizes the MLPs' own matrices."""
    settings = content(quantization__basis=None, fit=None)
    settings["compression"] = {"method": "dense", "pattern": "dense"}
    for key, value in content(**changes)["quantization"].items():
        settings["quantization"][key] = value if key != "basis" else None
    return parse_recipe(settings, "sample.yaml")


def sparsifier(algorithm: str, **options: Any) -> dict[str, Any]:
    """Section ``compression.sparsifier`` with those of ``options`` that ``algorithm`` reads."""
    foreign = {"gmp": {"drop_fraction"}, "rigl": {"initial_sparsity"}, "static": {*options} - {"ranking", "saliency"}}
    return {"algorithm": algorithm, **{key: options[key] for key in options.keys() - foreign[algorithm]}}


def site(block: int, width: int = 32, hidden: int = 64, *, gated: bool = False) -> MLPSite:
    first, last = (("gate_proj", "up_proj"), "down_proj") if gated else (("fc1",), "fc2")
    activation = "act_fn" if gated else "activation_fn"
    return MLPSite(block, f"layers.{block}.mlp", first, last, activation, width, hidden, None)


def tiny(kind: str, seed: int = 0, *, width: int = 32, layers: int = 2) -> nn.Module:
    """A random transformers classifier with biases that are not zero."""
    torch.manual_seed(seed)
    common = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    if kind == "vit":
        model: Any = ViTForImageClassification(ViTConfig(intermediate_size=2 * width, **common))
    else:
        model = Dinov2ForImageClassification(
            Dinov2Config(mlp_ratio=3, use_swiglu_ffn=kind == "dinov2_swiglu", layerscale_value=0.5, **common)
        )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_group(model: nn.Module, rank: int) -> GroupPlan:
    """All blocks of a model as one group."""
    sites = tuple(find_mlps(model))
    columns = sum(site.hidden * (len(site.first) + 1) for site in sites)
    return GroupPlan(0, sites, sites[0].width, columns, rank)


def planned(wanted: Recipe, kind: str = "vit", seed: int = 0) -> tuple[nn.Module, GroupPlan, list[FactorizedMLP]]:
    """The first group of a recipe on a tiny model of two blocks, factorized."""
    model = tiny(kind, seed)
    group = make_plan(wanted, find_mlps(model)).groups[0]
    masked = wanted.compression.pattern != "dense"
    mlps, _ = factorize_group(model, group, calibration=None, masked=masked, seed=seed)
    return model, group, mlps


def start_quantization(wanted: Recipe, group: GroupPlan, mlps: list[FactorizedMLP]) -> tuple[Segments, Segments]:
    """Choose the segments of a group and prepare its factors with them, without moments."""
    segments = choose_segments(wanted, group, mlps)
    prepare_factors(wanted, group, mlps, segments)
    return segments


def targets(model: nn.Module, mlps: list[FactorizedMLP], seed: int = 0, tokens: int = 256) -> list[LocalTarget]:
    """The MLPs with what the dense ones make of random inputs."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for mlp in mlps:
        x = torch.randn(tokens, mlp.site.width, generator=generator)
        with torch.no_grad():
            y = model.get_submodule(mlp.site.path)(x)
        result.append(LocalTarget(mlp, Activations(x.numpy(), y.numpy()), None))
    return result


def save_inputs(folder: Path, model: nn.Module, group: GroupPlan, inputs: Tensor) -> None:
    """Recorded activations as the calibration writes them, the same ``inputs`` [tokens, d] for every MLP."""
    for member in group.sites:
        first, second = activation_files(folder, member)
        np.save(first, inputs.numpy())
        with torch.no_grad():
            np.save(second, model.get_submodule(member.path)(inputs).numpy())
