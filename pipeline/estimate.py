"""``fips plan``: what a run will make and need, from the model's configuration alone; no weight is computed."""

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.adapters import find_mlps
from pipeline.models.causal_lm import language_model_class, load_language_config
from pipeline.models.image_classifier import load_config, model_class
from pipeline.plumbing.console import table_console
from pipeline.plumbing.errors import InputError
from pipeline.quantization.rest_start import ROWS_AT_ONCE
from pipeline.recipe.choices import choices_of, largest_choice
from pipeline.recipe.plan import GroupPlan, GroupSize, MLPSite, Plan, given_segments, group_size, make_plan
from pipeline.recipe.schema import (
    CausalLanguageModel,
    EndToEnd,
    ImageFolderData,
    LocalTextData,
    Recipe,
    ScratchModel,
    TextSection,
)


@dataclass(frozen=True)
class Estimate:
    """Bytes, parameters and work of a run to be.

    ``sizes``: per group; a factor left to allocation is counted with 2 bits. ``training_flops``: floating-point
    operations of all training (a multiply-add is two), which is most of a run. ``memory``: bytes held at most, by what
    the run is at; ``mapped_bytes`` of them are dense weights mapped from a checkpoint, which need not stay in memory.
    """

    plan: Plan
    parameters: int
    mlp_parameters: int
    sizes: dict[str, GroupSize]
    rest_bytes: int
    activation_bytes_per_sample: int
    factor_bytes: int
    training_flops: int
    memory: dict[str, int]
    mapped_bytes: int

    @property
    def mlp_bytes(self) -> int:
        return sum(size.stored for size in self.sizes.values())

    @property
    def artifact_bytes(self) -> int:
        """Weights only; graph, manifest and native library add about half a megabyte."""
        return self.mlp_bytes + self.rest_bytes

    @property
    def peak_memory(self) -> tuple[str, int]:
        """When most memory is held, and how much."""
        return max(self.memory.items(), key=lambda entry: entry[1])


def estimate(recipe: Recipe) -> Estimate:
    """Plan a run, with the largest choices where some are left to an allocation. Raises InputError for whatever
    :func:`pipeline.recipe.plan.make_plan` refuses, and missing inputs."""
    _check_inputs(recipe)
    choices = []
    if recipe.allocate is not None:
        choices = [choice.apply(recipe) for choice in choices_of(recipe)]
        recipe = largest_choice(recipe)
    if recipe.is_language_model:
        config, kind = load_language_config(recipe.model), language_model_class()  # type: ignore[arg-type]
    else:
        config, kind = load_config(recipe.model, labels=10), model_class()  # type: ignore[arg-type]
    # Masks of language models depend on data where tensors are on the meta device, not where they are fake.
    shapes_only = FakeTensorMode() if recipe.is_language_model else torch.device("meta")
    with shapes_only:
        model = kind.from_config(config)
    sites = find_mlps(model)
    for choice in choices:
        make_plan(choice, sites)
    plan = make_plan(recipe, sites)
    _check_rest_blocks(recipe, model, sites)
    sizes = {group.name: _group_size(recipe, group) for group in plan.groups}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    compressed = sum(group.dense_parameters for group in plan.groups)
    activation_bytes, forward_flops = _dry_run(recipe, plan, model, config, shapes_only)
    rest_bytes = _rest_bytes(recipe, model, plan)
    return Estimate(
        plan,
        parameters,
        compressed,
        sizes,
        rest_bytes,
        activation_bytes,
        # Weight, gradient and AdamW's two moments of the largest group, and its basis and projections.
        max(16 * group.parameters for group in plan.groups),
        _training_flops(recipe, plan, activation_bytes, forward_flops),
        _memory(recipe, plan, model, rest_bytes, sum(size.stored for size in sizes.values())),
        4 * parameters if _is_mapped(recipe, config) else 0,
    )


def print_estimate(recipe: Recipe, estimated: Estimate) -> None:
    """A table of the groups and what the run needs, on standard output; with a warning if this machine lacks it."""
    console = table_console()
    calibration_samples = recipe.calibration.samples
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
    sizes = f"{estimated.parameters:,} parameters, {estimated.mlp_parameters:,} in compressed MLPs"
    console.print(f"{recipe.name}: {sizes}")
    console.print(table)
    if recipe.allocate is not None:
        left = round(recipe.allocate.target * estimated.mlp_parameters / 8)
        console.print(
            f"with the largest choices of `allocate`, which has {left:,} bytes for these MLPs at "
            f"{recipe.allocate.target:g} stored bits per weight"
        )
    if estimated.plan.dense_blocks:
        console.print(f"left dense: blocks {list(estimated.plan.dense_blocks)}")
    dense = 2 * estimated.parameters
    console.print(
        f"weights of the artefact  {estimated.artifact_bytes:,} bytes, {100 * estimated.artifact_bytes / dense:.1f} % "
        f"of {dense:,} in float16 (graph, manifest and native library come on top)"
    )
    per_sample = estimated.activation_bytes_per_sample
    total = f", {per_sample * calibration_samples:,} in all" if calibration_samples else ""
    sample = f"window of {recipe.data.context} tokens" if isinstance(recipe.data, TextSection) else "image"
    console.print(f"disk for calibration     {per_sample:,} bytes per {sample}{total}")
    when, peak = estimated.peak_memory
    console.print(
        f"memory                   about {peak:,} bytes, most of it to {when}: {4 * estimated.parameters:,} for the "
        f"dense model, {estimated.factor_bytes:,} to train the largest group"
    )
    if estimated.mapped_bytes:
        console.print(
            f"                         of these, {estimated.mapped_bytes:,} are mapped from the checkpoint: the system "
            f"takes them back where memory is short, so {peak - estimated.mapped_bytes:,} can do"
        )
    minutes = estimated.training_flops / multiply_rate() / 60
    console.print(
        f"time to train            at least {minutes:.1f} minutes here: {estimated.training_flops / 1e12:,.1f} TFLOP "
        "at the speed of a large matrix product; expect two to three times that"
    )
    for shortage in shortages(estimated, calibration_samples):
        console.print(f"warning: {shortage}")


def shortages(estimated: Estimate, calibration_samples: int | None) -> list[str]:
    """What this machine has less of than the run needs, in plain words."""
    found = []
    when, peak = estimated.peak_memory
    least, there = peak - estimated.mapped_bytes, psutil.virtual_memory().total
    if least > there:
        found.append(
            f"this machine has {there:,} bytes of memory, and the run needs about {least:,} to {when}; "
            "train locally, with smaller groups or a smaller compression.budget"
        )
    disk = estimated.activation_bytes_per_sample * (calibration_samples or 1)
    free = shutil.disk_usage(Path.cwd()).free
    if disk > free:
        found.append(
            f"{free:,} bytes are free on the disk of this folder, and calibration takes {disk:,}; lower "
            "calibration.samples"
        )
    return found


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


def _check_rest_blocks(recipe: Recipe, model: Any, sites: Sequence[MLPSite]) -> None:
    """Raise InputError where ``quantization.rest.block_size`` does not divide what it has to."""
    rest = recipe.quantization.rest
    uneven = []
    for name, linear in _rest_linears(model, sites).items():
        if rest.linear_bits and linear.in_features % rest.block_size:
            uneven.append(f"{name}: {linear.in_features}")
    if rest.embedding_bits and model.config.hidden_size % rest.block_size:
        uneven.append(f"token table: {model.config.hidden_size}")
    if uneven:
        more = f" and {len(uneven) - 3} more" if len(uneven) > 3 else ""
        raise InputError(
            f"recipe {recipe.name}: quantization.rest.block_size: {rest.block_size} does not divide the inputs of "
            f"{', '.join(uneven[:3])}{more}; take a smaller one"
        )


def _rest_linears(model: Any, sites: Sequence[MLPSite]) -> dict[str, nn.Linear]:
    """Linear layers outside the MLPs that the rest's bits apply to, not the classifier or output layer."""
    mlps = {f"{site.path}.{name}" for site in sites for name in (*site.first, site.last)}
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name != "classifier" and name not in mlps
    }


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


PROCESS_BYTES = 1_200_000_000
"""Of Python, PyTorch, transformers and ONNX Runtime before any weight, and of free memory that is not given back."""


def _is_mapped(recipe: Recipe, config: Any) -> bool:
    """Whether the dense weights are pages of a safetensors file: they are where nothing has to be converted."""
    section = recipe.model
    return (
        isinstance(section, CausalLanguageModel)
        and section.gguf_file is None
        and getattr(config, "dtype", None) in (torch.float32, "float32")
    )


def _memory(recipe: Recipe, plan: Plan, model: Any, rest_bytes: int, mlp_bytes: int) -> dict[str, int]:
    """Bytes held at most, by what the run is at.

    Counted in whole matrices: how many are there at a time, in float32 (4 bytes an entry) or float64 (8). Factors
    have a mask of a byte an entry where they are sparse; in training also a gradient, AdamW's two moments and two
    forms that the backward pass needs. GPTQ holds the n × n moment of what a matrix reads eight times. Two blocks of
    Gemma 2 2B's shapes took, in MiB: 4409 to factorize, 4812 to train, 6475 and 2825 to find starting codes in and
    outside the MLPs (``tests/test_heavy.py``), where this says 7573, 5040, 7360 and 3001.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    compressed = sum(group.dense_parameters for group in plan.groups)
    sites = [site for group in plan.groups for site in group.sites]
    masked = recipe.compression.is_masked
    held = (4 + masked) * sum(group.parameters for group in plan.groups)
    largest = max(group.parameters for group in plan.groups)
    widest = max(site.hidden for site in sites)
    dense = PROCESS_BYTES + 4 * parameters
    rest = 4 * (parameters - compressed) + rest_bytes
    local = [part for part in (recipe.fit, *recipe.quantization.training) if part and not isinstance(part, EndToEnd)]
    whole = [part for part in (recipe.finetune, *recipe.quantization.training) if isinstance(part, EndToEnd)]
    batch = max((part.batch_tokens for part in local), default=0)
    per_token = max(sum(4 * (4 * site.width + 6 * site.hidden) for site in group.sites) for group in plan.groups)
    stages = {
        "factorize the largest group": dense
        + max((48 if group.has_basis else 16) * group.dense_parameters for group in plan.groups),
        "train the largest group": dense
        + (rest + held if len(local) > (recipe.fit is not None) else 0)
        + (24 + masked) * largest
        + batch * per_token,
        "validate the artefact": dense + rest + held + 4 * sum(group.parameters for group in plan.groups)
        + 2 * mlp_bytes + 2 * rest_bytes,
    }
    if recipe.quantization.start == "gptq":
        stages["find starting codes"] = dense + rest + held + 64 * widest**2
        if recipe.is_language_model:
            stages["find starting codes outside the MLPs"] = dense + held + _rest_start_memory(recipe, model, sites)
    if whole:
        context = recipe.data.context if isinstance(recipe.data, TextSection) else 1
        tokens = context * max(part.batch_size for part in whole)
        # For the backward pass; Gemma 3 270M took 182 kB a token and block, this says 192.
        per_token = sum(4 * (24 * site.width + 16 * site.hidden) for site in sites)
        stages["train end to end"] = dense + rest + held + 20 * sum(group.parameters for group in plan.groups)
        stages["train end to end"] += tokens * per_token
        if recipe.quantization.rest.linear_bits and any(getattr(part, "train_rest", False) for part in whole):
            # Levels in a byte, and values and their gradient in float32.
            stages["train end to end"] += 9 * sum(
                linear.weight.numel() for linear in _rest_linears(model, sites).values()
            )
    return stages


def _rest_start_memory(recipe: Recipe, model: Any, sites: Sequence[MLPSite]) -> int:
    """Moments of all linear layers outside the MLPs, of those that read the same one; their tables; and what GPTQ
    holds of the largest of them, of which it takes some rows at a time."""
    rest = recipe.quantization.rest
    head = model.get_output_embeddings()
    moments: dict[tuple[str, int], int] = {}
    tables = work = 0
    for name, module in _rest_linears(model, sites).items():
        if rest.linear_bits:
            moments[name.rpartition(".")[0], module.in_features] = 12 * module.in_features**2
            tables += 5 * module.weight.numel()
            work = max(work, _gptq_memory(module.weight))
    if rest.embedding_bits:
        tables += 5 * head.weight.numel()
        work = max(work, _gptq_memory(head.weight))
    return sum(moments.values()) + tables + work


def _gptq_memory(weight: torch.Tensor) -> int:
    rows, columns = weight.shape
    return 64 * columns**2 + 60 * min(rows, ROWS_AT_ONCE) * columns


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
