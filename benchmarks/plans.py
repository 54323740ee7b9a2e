"""Plans of recipes for widely used models of 0.1 to 4 billion parameters, from their configurations alone.

``python -m benchmarks.plans`` prints the table of docs/results/plans.md (a minute, no weights, no network).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig

from fips_ort.layout import PATTERNS, Pattern, smallest_block_size
from pipeline.estimate.sizes import least_size
from pipeline.models.adapters import find_mlps
from pipeline.models.causal_lm import language_model_class
from pipeline.models.image_classifier import model_class
from pipeline.plumbing.errors import InputError
from pipeline.quantization.rest_sizes import rest_bytes
from pipeline.recipe.plan import MLPSite, Plan, fitted_rows, make_plan
from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import Recipe

BITS = (2, 3, 4)
SPARSITY = 0.75
"""Of bitmaps."""
BUDGETS = {"dense": 0.75, "2:4": 0.6}
"""Of patterns that keep much; 0.5 of all others."""


@dataclass(frozen=True)
class Known:
    """A model as its config.json on the Hugging Face hub describes it. ``block_size``: of the recipes; ``stages``:
    blocks of each width, where there are several."""

    name: str
    model_type: str
    config: dict[str, Any]
    block_size: int = 128
    stages: tuple[int, ...] = field(default=())

    @property
    def is_language_model(self) -> bool:
        return "vocab_size" in self.config

    @property
    def widths(self) -> list[tuple[int, int, int]]:
        """(model dimension, MLP width, blocks) of each stage."""
        if self.stages:
            dimensions = [self.config["embed_dim"] << stage for stage in range(len(self.stages))]
            return [(d, 4 * d, blocks) for d, blocks in zip(dimensions, self.stages, strict=True)]
        d, blocks = self.config["hidden_size"], self.config["num_hidden_layers"]
        hidden = self.config.get("intermediate_size", 4 * d)
        if self.config.get("use_swiglu_ffn"):
            hidden = (8 * d // 3 + 7) // 8 * 8
        return [(d, hidden, blocks)]

    def sites(self) -> list[MLPSite]:
        """The MLPs, without a model."""
        gated = self.is_language_model or self.config.get("use_swiglu_ffn", False)
        first, last = (("gate_proj", "up_proj"), "down_proj") if gated else (("fc1",), "fc2")
        shapes = [(d, hidden) for d, hidden, blocks in self.widths for _ in range(blocks)]
        return [
            MLPSite(block, f"blocks.{block}.mlp", first, last, "act_fn", d, hidden, None)
            for block, (d, hidden) in enumerate(shapes)
        ]

    def groups(self) -> list[list[int]]:
        """Groups of at most four blocks of one width."""
        found, start = [], 0
        for _, _, blocks in self.widths:
            end = start + blocks
            found += [list(range(first, min(first + 4, end))) for first in range(start, end, 4)]
            start = end
        return found


def _language(
    name: str,
    model_type: str,
    shape: tuple[int, int, int],
    heads: tuple[int, int, int],
    vocabulary: int,
    *,
    tied: bool = True,
) -> Known:
    """``shape``: model dimension, MLP width, layers; ``heads``: of queries, of keys, and the dimension of one."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    attention = ("num_attention_heads", "num_key_value_heads", "head_dim")
    config = dict(zip((*names, *attention), (*shape, *heads), strict=True))
    return Known(name, model_type, {**config, "vocab_size": vocabulary, "tie_word_embeddings": tied})


def _vision(name: str, model_type: str, shape: tuple[int, int, int], heads: int, patch: int, **config: Any) -> Known:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = dict(zip(names, shape, strict=True))
    if model_type == "dinov2":
        del sizes["intermediate_size"]  # it has a ratio
    return Known(name, model_type, {**sizes, "num_attention_heads": heads, "patch_size": patch, **config})


def _swin(name: str, embed_dim: int, depths: tuple[int, ...], heads: tuple[int, ...], block_size: int) -> Known:
    config = {"embed_dim": embed_dim, "depths": list(depths), "num_heads": list(heads)}
    return Known(name, "swin", config, block_size, depths)


MODELS = (
    _language("SmolLM2 135M", "llama", (576, 1536, 30), (9, 3, 64), 49_152),
    _language("SmolLM2 360M", "llama", (960, 2560, 32), (15, 5, 64), 49_152),
    _language("SmolLM2 1.7B", "llama", (2048, 8192, 24), (32, 32, 64), 49_152),
    _language("TinyLlama 1.1B", "llama", (2048, 5632, 22), (32, 4, 64), 32_000, tied=False),
    _language("Llama 3.2 1B", "llama", (2048, 8192, 16), (32, 8, 64), 128_256),
    _language("Llama 3.2 3B", "llama", (3072, 8192, 28), (24, 8, 128), 128_256),
    _language("H2O Danube2 1.8B", "mistral", (2560, 6912, 24), (32, 8, 80), 32_000, tied=False),
    _language("Qwen2.5 0.5B", "qwen2", (896, 4864, 24), (14, 2, 64), 151_936),
    _language("Qwen2.5 1.5B", "qwen2", (1536, 8960, 28), (12, 2, 128), 151_936),
    _language("Qwen2.5 3B", "qwen2", (2048, 11_008, 36), (16, 2, 128), 151_936),
    _language("Qwen3 0.6B", "qwen3", (1024, 3072, 28), (16, 8, 128), 151_936),
    _language("Qwen3 1.7B", "qwen3", (2048, 6144, 28), (16, 8, 128), 151_936),
    _language("Qwen3 4B", "qwen3", (2560, 9728, 36), (32, 8, 128), 151_936),
    _language("Gemma 2 2B", "gemma2", (2304, 9216, 26), (8, 4, 256), 256_000),
    _language("Gemma 3 270M", "gemma3_text", (640, 2048, 18), (4, 1, 256), 262_144),
    _language("Gemma 3 1B", "gemma3_text", (1152, 6912, 26), (4, 1, 256), 262_144),
    _language("Gemma 3 4B, text", "gemma3_text", (2560, 10_240, 34), (8, 4, 256), 262_208),
    _vision("ViT-L/16", "vit", (1024, 4096, 24), 16, 16),
    _vision("ViT-H/14", "vit", (1280, 5120, 32), 16, 14),
    _vision("ViT of SigLIP So400m/14", "vit", (1152, 4304, 27), 16, 14),
    _vision("DINOv2-L", "dinov2", (1024, 4096, 24), 16, 14, image_size=518),
    _vision("DINOv2-g", "dinov2", (1536, 4096, 40), 24, 14, image_size=518, use_swiglu_ffn=True),
    _swin("Swin-L", 192, (2, 2, 18, 2), (6, 12, 24, 48), 128),
    # Below 0.1 billion, for their widths.
    _vision("ViT-Ti/16, DeiT-Ti", "vit", (192, 768, 12), 3, 16),
    _vision("ViT-S/16, DeiT-S, DINOv2-S", "vit", (384, 1536, 12), 6, 16),
    _vision("ViT-B/16, DeiT-B", "vit", (768, 3072, 12), 12, 16),
    _swin("Swin-T", 96, (2, 2, 6, 2), (3, 6, 12, 24), 64),
    _swin("Swin-B", 128, (2, 2, 18, 2), (4, 8, 16, 32), 64),
)


def recipe_for(known: Known, bits: int, pattern: str | None) -> Recipe:
    """A recipe with groups of four blocks, or of method dense (``pattern`` None); attention and token table have 4
    bits."""
    projections = {"bits": bits, "block_size": known.block_size, "levels": "midrise"}
    if pattern is None:
        compression: dict[str, Any] = {"method": "dense", "pattern": "dense"}
        quantization: dict[str, Any] = {"projections": projections}
    else:
        compression = {"groups": known.groups(), "budget": BUDGETS.get(pattern, 0.5), "pattern": pattern}
        if pattern == "bitmap":
            compression["sparsity"] = SPARSITY
        quantization = {"basis": {"bits": 4, "block_size": known.block_size}, "projections": projections}
    quantization["rest"] = {"linear_bits": 4, **({"embedding_bits": 4} if known.is_language_model else {})}
    if known.is_language_model:
        model: dict[str, Any] = {"source": "causal_lm", "path": known.name}
        data: dict[str, Any] = {"source": "text", "train": "train.txt"}
    else:
        model = {"source": "pretrained", "path": known.name}
        data = {"source": "image_folder", "path": "images"}
    content = {
        "name": "plans",
        "model": model,
        "data": data,
        "compression": compression,
        "quantization": quantization,
        **({} if pattern in (None, "dense") else {"fit": {"steps": 600}}),
    }
    return parse_recipe(content, known.name)


def combinations(known: Known) -> Iterator[tuple[int, str | None]]:
    """(bits, pattern) of all recipes whose block size is one that the pattern permits; None: whole matrices."""
    for bits, pattern in itertools.product(BITS, (None, *PATTERNS)):
        if pattern is None or known.block_size % smallest_block_size(Pattern.parse(pattern)) == 0:
            yield bits, pattern


def without_weights(known: Known) -> Any:
    """The model on the meta device."""
    config = AutoConfig.for_model(known.model_type, **known.config)
    kind = language_model_class() if known.is_language_model else model_class()
    with torch.device("meta"):
        return kind.from_config(config)


def row(known: Known) -> str:
    """One line of the table."""
    passed, total = 0, 0
    for bits, pattern in combinations(known):
        total += 1
        try:
            make_plan(recipe_for(known, bits, pattern), known.sites())
            passed += 1
        except InputError as error:
            print(f"{known.name}, {bits} bits, {pattern}: {error}")
    model = without_weights(known)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cells = [
        known.name,
        f"{parameters / 1e6:,.0f}",
        ", ".join(f"{d:,} / {hidden:,}" for d, hidden, _ in known.widths),
        str(known.block_size),
        _fitted(make_plan(recipe_for(known, 3, "1:4"), known.sites())),
        f"{passed} of {total}",
    ]
    for bits, pattern in ((3, "1:4"), (4, "bitmap"), (3, None)):
        recipe = recipe_for(known, bits, pattern)
        sites = find_mlps(model)
        plan = make_plan(recipe, sites)
        stored = sum(least_size(recipe, group).stored for group in plan.groups)
        weights = sum(group.dense_parameters for group in plan.groups)
        cells += [f"{8 * stored / weights:.2f}", f"{(stored + rest_bytes(recipe, model, sites, plan)) / 1e6:,.0f}"]
    return f"| {' | '.join(cells)} |"


def _fitted(plan: Plan) -> str:
    """What a plan stores in other blocks than its recipe's, or with more values in a row."""
    found = []
    for rows in fitted_rows(plan):
        filled = f" as {rows.stored:,}" if rows.stored > rows.length else ""
        found.append(f"{rows.length:,}{filled} in {rows.block_size}")
    return "; ".join(found) or "–"


def main() -> None:
    """Print the table."""
    header = ("model", "million parameters", "d / MLP width", "block size", "other blocks", "plans that pass")
    columns = [*header]
    for name in ("1:4, 3 bits", "bitmap, 4 bits", "whole matrices, 3 bits"):
        columns += [f"{name}: stored bits", "MB"]
    print(f"| {' | '.join(columns)} |")
    print(f"| --- | ---: | --- | ---: | --- | --- |{' ---: |' * 6}")
    for known in MODELS:
        print(row(known), flush=True)


if __name__ == "__main__":
    main()
