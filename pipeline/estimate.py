"""``fips plan``: what a run will make and need, from the model's configuration alone; no weight is computed."""

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.console import table_console
from pipeline.errors import InputError
from pipeline.models.adapters import find_mlps
from pipeline.models.causal_lm import language_model_class, load_language_config
from pipeline.models.loading import load_config, model_class
from pipeline.plan import GroupPlan, GroupSize, Plan, given_segments, group_size, make_plan
from pipeline.recipe import EndToEnd, ImageFolderData, LocalTextData, Recipe, ScratchModel, TextSection


@dataclass(frozen=True)
class Estimate:
    """Bytes, parameters and work of a run to be.

    ``sizes``: per group; a factor left to allocation is counted with 2 bits. ``training_flops``: floating-point
    operations of all training (a multiply-add is two), which is most of a run.
    """

    plan: Plan
    parameters: int
    mlp_parameters: int
    sizes: dict[str, GroupSize]
    rest_bytes: int
    activation_bytes_per_sample: int
    factor_bytes: int
    training_flops: int

    @property
    def mlp_bytes(self) -> int:
        return sum(size.stored for size in self.sizes.values())

    @property
    def artifact_bytes(self) -> int:
        """Weights only; graph, manifest and native library add about half a megabyte."""
        return self.mlp_bytes + self.rest_bytes


def estimate(recipe: Recipe) -> Estimate:
    """Plan a run. Raises InputError for whatever :func:`pipeline.plan.make_plan` refuses, and missing inputs."""
    _check_inputs(recipe)
    if recipe.is_language_model:
        config, kind = load_language_config(recipe.model), language_model_class()  # type: ignore[arg-type]
    else:
        config, kind = load_config(recipe.model, labels=10), model_class()  # type: ignore[arg-type]
    # Masks of language models depend on data where tensors are on the meta device, not where they are fake.
    shapes_only = FakeTensorMode() if recipe.is_language_model else torch.device("meta")
    with shapes_only:
        model = kind.from_config(config)
    plan = make_plan(recipe, find_mlps(model))
    sizes = {group.name: _group_size(recipe, group) for group in plan.groups}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    compressed = sum(group.dense_parameters for group in plan.groups)
    activation_bytes, forward_flops = _dry_run(recipe, plan, model, config, shapes_only)
    return Estimate(
        plan,
        parameters,
        compressed,
        sizes,
        _rest_bytes(recipe, model, plan),
        activation_bytes,
        # Weight, gradient and AdamW's two moments of the largest group, and its basis and projections.
        max(16 * group.parameters for group in plan.groups),
        _training_flops(recipe, plan, activation_bytes, forward_flops),
    )


def print_estimate(name: str, estimated: Estimate, calibration_samples: int | None) -> None:
    """A table of the groups and what the run needs, on standard output."""
    console = table_console()
    table = Table("group", "blocks", "d", "N", "rank", "MLP bytes", "stored bits/weight", "paper bits/weight", box=None)
    for group in estimated.plan.groups:
        size = estimated.sizes[group.name]
        blocks = ", ".join(str(site.block) for site in group.sites)
        table.add_row(
            group.name,
            blocks,
            str(group.width),
            str(group.columns),
            str(group.rank),
            f"{size.stored:,}",
            f"{8 * size.stored / group.dense_parameters:.2f}",
            f"{size.value_bits / group.dense_parameters:.2f}",
        )
    console.print(f"{name}: {estimated.parameters:,} parameters, {estimated.mlp_parameters:,} in compressed MLPs")
    console.print(table)
    if estimated.plan.dense_blocks:
        console.print(f"left dense: blocks {list(estimated.plan.dense_blocks)}")
    dense = 2 * estimated.parameters
    console.print(
        f"weights of the artefact  {estimated.artifact_bytes:,} bytes, {100 * estimated.artifact_bytes / dense:.1f} % "
        f"of {dense:,} in float16 (graph, manifest and native library come on top)"
    )
    per_sample = estimated.activation_bytes_per_sample
    total = f", {per_sample * calibration_samples:,} in all" if calibration_samples else ""
    console.print(f"disk for calibration     {per_sample:,} bytes per sample{total}")
    console.print(
        f"memory                   {4 * estimated.parameters:,} bytes for the dense model, "
        f"{estimated.factor_bytes:,} to train the largest group"
    )
    minutes = estimated.training_flops / multiply_rate() / 60
    console.print(
        f"time to train            at least {minutes:.1f} minutes here: {estimated.training_flops / 1e12:,.1f} TFLOP "
        "at the speed of a large matrix product; expect two to three times that"
    )


def multiply_rate() -> float:
    """Floating-point operations per second of a large float32 matrix product on this machine, the best of a few."""
    size = 1024
    a, b = torch.ones(size, size), torch.ones(size, size)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def _check_inputs(recipe: Recipe) -> None:
    data = recipe.data
    if isinstance(data, ImageFolderData):
        for name in (data.train, data.test):
            if not (Path(data.path) / name).is_dir():
                raise InputError(f"data.path: {Path(data.path) / name}: no such folder; expected LABEL/image.* in it")
    if isinstance(data, LocalTextData):
        for key, file in (("train", data.train), ("test", data.test)):
            if file is not None and not Path(file).is_file():
                raise InputError(f"data.{key}: {file}: no such file")


def _group_size(recipe: Recipe, group: GroupPlan) -> GroupSize:
    two_bits = (0, 0, 0, group.rank)
    basis, projections = (segments or two_bits for segments in given_segments(recipe, group))
    return group_size(recipe, group, basis, projections)


def _rest_bytes(recipe: Recipe, model: Any, plan: Plan) -> int:
    """Bytes of the weights outside the compressed MLPs; a tied token table is stored once."""
    rest = recipe.quantization.rest
    compressed = {
        f"{site.path}.{name}" for group in plan.groups for site in group.sites for name in (*site.first, site.last)
    }
    tables = (model.get_input_embeddings(), model.get_output_embeddings()) if recipe.is_language_model else ()
    total = 0
    seen: set[int] = set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or (name in compressed and parameter.dim() == 2):
                continue
            seen.add(id(parameter))
            bits: float = 16 if rest.weights == "float16" else 32
            if parameter.dim() == 2:
                if any(module is table for table in tables):
                    bits = rest.embedding_bits or bits
                elif isinstance(module, nn.Linear) and name != "classifier":
                    bits = rest.linear_bits or bits
                if bits < 16:
                    bits += 16 / rest.block_size
            total += math.ceil(parameter.numel() * bits / 8)
    return total


def _dry_run(
    recipe: Recipe, plan: Plan, model: nn.Module, config: Any, shapes_only: AbstractContextManager[Any]
) -> tuple[int, int]:
    """Bytes of recorded activations, and operations of the dense model, per sample: counted without computing.

    Of a language model without its output layer, which distillation computes for a part of the vocabulary only.
    """
    counted = 0

    def count(_module: nn.Module, arguments: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * 4 * arguments[0].numel()

    for group in plan.groups:
        for site in group.sites:
            model.get_submodule(site.path).register_forward_hook(count)
    model.eval()
    with shapes_only, torch.inference_mode(), FlopCounterMode(display=False) as counter:
        if isinstance(recipe.data, TextSection):
            input_ids = torch.zeros(1, recipe.data.context, dtype=torch.int64)
            model.base_model(input_ids=input_ids, use_cache=False)  # type: ignore[operator]
        else:
            size = config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            model(pixel_values=torch.empty(1, 3, height, width))
    return counted, counter.get_total_flops()


def _training_flops(recipe: Recipe, plan: Plan, activation_bytes: int, forward_flops: int) -> int:
    """Operations of all training. The backward pass takes twice the forward pass."""
    per_token = [
        2 * group.rank * (2 * group.width * len(group.sites) * group.has_basis + group.columns) for group in plan.groups
    ]
    dense_per_token = [2 * group.dense_parameters for group in plan.groups]
    # Tokens differ between the groups of a hierarchical model; their mean serves end-to-end training.
    widths = sum(group.width * len(group.sites) for group in plan.groups)
    tokens = activation_bytes // (8 * widths)
    compressed_flops = forward_flops + tokens * (sum(per_token) - sum(dense_per_token))
    total = 0
    if isinstance(recipe.model, ScratchModel):
        total += 3 * forward_flops * recipe.model.training.steps * recipe.model.training.batch_size
    for local in (recipe.fit, *recipe.quantization.training):
        if local is None or isinstance(local, EndToEnd):
            continue
        total += 3 * sum(per_token) * local.steps * local.batch_tokens
    for entry in (recipe.finetune, *recipe.quantization.training):
        if not isinstance(entry, EndToEnd):
            continue
        teacher = forward_flops if entry.objective == "distill" else 0
        total += (3 * compressed_flops + teacher) * entry.steps * entry.batch_size
    return total
