"""Bytes of memory that a run holds at most, stage by stage.

Counted in whole matrices: how many are there at a time, in float32 or float64. Two blocks of Gemma 2 2B's shapes took,
in MiB: 4409 to factorize, 4812 to train, 6475 and 2825 to find starting codes in and outside the MLPs
(``tests/test_heavy.py``), where this says 7573, 5040, 7360 and 3001.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.quantization.rest_layers import inputs_of, rest_linears
from pipeline.quantization.rest_weights import ROWS_AT_ONCE
from pipeline.recipe.plan import MLPSite, Plan
from pipeline.recipe.schema import CausalLanguageModel, EndToEnd, QuantizedEndToEnd, Recipe, TextSection

FLOAT32_BYTES, FLOAT64_BYTES, CODE_BYTES, MASK_BYTES = 4, 8, 1, 1

PROCESS_BYTES = 1_200_000_000
"""Python, PyTorch, transformers and ONNX Runtime before any weight, and free memory that is not given back."""

# --- bytes for an entry of a matrix ----------------------------------------------------------------------------

SVD_BYTES = 2 * FLOAT32_BYTES + 5 * FLOAT64_BYTES
"""Factorization, for an entry of the dense matrices W of a group: W and the finished V in float32; in float64 W, its
right singular vectors, and three forms of V (these times the singular values, then divided by the magnitude of each
row, then multiplied by a common one; :func:`pipeline.compression.factorize.svd_factors`)."""
NO_BASIS_BYTES = 4 * FLOAT32_BYTES
"""Factorization without a basis, for an entry of W: W, LAPACK's copy of it for the singular values, the factors, and
their squares, which say how large their rows are."""
OPTIMIZER_BYTES = 3 * FLOAT32_BYTES
"""Training, for an entry of a factor: its gradient and AdamW's two moments."""
BACKWARD_BYTES = 2 * FLOAT32_BYTES
"""Training, for an entry of a factor: its scaled and its fake-quantized form, which the backward pass needs."""
TRAINING_BYTES = FLOAT32_BYTES + OPTIMIZER_BYTES + BACKWARD_BYTES
"""Training, for an entry of a factor, in all: the weight and what comes with it."""
GPTQ_MOMENT_BYTES = 8 * FLOAT64_BYTES
"""GPTQ, for an entry of the n × n moment of what a matrix reads: the moment, damped, reordered, its Cholesky factor and
what lies between, eight at a time (:func:`qat.gptq.gptq`)."""
GPTQ_WEIGHT_BYTES = 15 * FLOAT32_BYTES
"""GPTQ, for an entry of the rows that it works on: weights, mask, levels, errors and gradient, in the layout's order
and in its own, and what lies between, fifteen at a time."""
REST_MOMENT_BYTES = FLOAT64_BYTES + FLOAT32_BYTES
"""Outside the MLPs, for an entry of the moment of what a linear layer reads: sum and mean."""
REST_TABLE_BYTES = CODE_BYTES + FLOAT32_BYTES
"""Outside the MLPs, for an entry of a table whose codes were found: code and value."""
REST_TRAINING_BYTES = CODE_BYTES + 2 * FLOAT32_BYTES
"""Outside the MLPs, for an entry of a table whose scales are trained: code, value and the value's gradient."""

# --- numbers held for a token ----------------------------------------------------------------------------------

LOCAL_WIDTHS, LOCAL_HIDDEN = 4, 6
"""Local training: vectors of the model's width d (input, output, target, error) and of the MLP's width n (the first
projections, the activation and what their gradients need) for each MLP."""
END_TO_END_WIDTHS, END_TO_END_HIDDEN = 24, 16
"""End-to-end training: vectors of width d and n for each block, attention and norms included. Gemma 3 270M took 182 kB
a token and block, this says 192."""


def memory_by_stage(recipe: Recipe, plan: Plan, model: Any, rest_stored: int, mlps_stored: int) -> dict[str, int]:
    """Bytes held at most, by what the run is at. ``rest_stored``, ``mlps_stored``: bytes in the artefact."""
    sites = [site for group in plan.groups for site in group.sites]
    masked = MASK_BYTES * recipe.compression.is_masked
    entries = sum(group.parameters for group in plan.groups)
    outside = _parameters(model) - sum(group.dense_parameters for group in plan.groups)
    local = [part for part in (recipe.fit, *recipe.quantization.training) if part and not isinstance(part, EndToEnd)]
    whole = [part for part in (recipe.finetune, *recipe.quantization.training) if isinstance(part, EndToEnd)]
    quantized_groups = len(local) > (recipe.fit is not None)

    # What most stages hold.
    dense = PROCESS_BYTES + FLOAT32_BYTES * _parameters(model)
    rest = FLOAT32_BYTES * outside + rest_stored  # as it will be stored: codes, and values to compute with
    factors = (FLOAT32_BYTES + masked) * entries

    stages = {
        "factorize the largest group": [
            dense,
            max((SVD_BYTES if group.has_basis else NO_BASIS_BYTES) * group.dense_parameters for group in plan.groups),
        ],
        "train the largest group": [
            dense,
            (rest + factors) * quantized_groups,
            training_bytes(recipe, plan),
            max((part.batch_tokens for part in local), default=0)
            * max(_token_bytes(group.sites, LOCAL_WIDTHS, LOCAL_HIDDEN) for group in plan.groups),
        ],
        "validate the artefact": [
            dense,
            rest,
            factors,
            FLOAT32_BYTES * entries,  # decoded in the model that stands for the artefact
            2 * (mlps_stored + rest_stored),  # in that model and in ONNX Runtime
        ],
    }
    if recipe.quantization.start == "gptq":
        widest = max(site.hidden for site in sites)
        stages["find starting codes"] = [dense, rest, factors, GPTQ_MOMENT_BYTES * widest**2]
        if recipe.is_language_model:
            stages["find starting codes outside the MLPs"] = [dense, factors, _rest_start(recipe, model, sites)]
    if whole:
        context = recipe.data.context if isinstance(recipe.data, TextSection) else 1
        tokens = context * max(part.batch_size for part in whole)
        stages["train end to end"] = [
            dense,
            rest,
            factors,
            (OPTIMIZER_BYTES + BACKWARD_BYTES) * entries,
            tokens * _token_bytes(sites, END_TO_END_WIDTHS, END_TO_END_HIDDEN),
            _rest_training(recipe, model, sites) * any(_trains_rest(part) for part in whole),
        ]
    return {stage: sum(parts) for stage, parts in stages.items()}


def training_bytes(recipe: Recipe, plan: Plan) -> int:
    """Bytes to train the factors of the largest group."""
    masked = MASK_BYTES * recipe.compression.is_masked
    return (TRAINING_BYTES + masked) * max(group.parameters for group in plan.groups)


def mapped_bytes(recipe: Recipe, config: Any, model: Any) -> int:
    """Bytes of the dense weights that are pages of a safetensors file: all where nothing has to be converted."""
    section = recipe.model
    mapped = (
        isinstance(section, CausalLanguageModel)
        and section.gguf_file is None
        and getattr(config, "dtype", None) in (torch.float32, "float32")
    )
    return FLOAT32_BYTES * _parameters(model) * mapped


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _token_bytes(sites: Sequence[MLPSite], widths: int, hidden: int) -> int:
    """Bytes held for a token in the blocks ``sites``: so many vectors of the model's and of the MLPs' width each."""
    return FLOAT32_BYTES * sum(widths * site.width + hidden * site.hidden for site in sites)


def _trains_rest(part: EndToEnd) -> bool:
    return isinstance(part, QuantizedEndToEnd) and part.train_rest


def _rest_training(recipe: Recipe, model: Any, sites: Sequence[MLPSite]) -> int:
    """Bytes to train the scales of the packed linear layers outside the MLPs."""
    if not recipe.quantization.rest.linear_bits:
        return 0
    return REST_TRAINING_BYTES * sum(linear.weight.numel() for linear in rest_linears(model, sites).values())


def _rest_start(recipe: Recipe, model: Any, sites: Sequence[MLPSite]) -> int:
    """Bytes to find starting codes outside the MLPs: moments of all linear layers there, of those that read the same
    one; their tables; and what GPTQ holds of the largest of them, of which it takes some rows at a time."""
    rest = recipe.quantization.rest
    moments = 0
    weights: list[Tensor] = []
    if rest.linear_bits:
        linears = rest_linears(model, sites)
        moments = REST_MOMENT_BYTES * sum(features**2 for _, features in inputs_of(linears))
        weights += [linear.weight for linear in linears.values()]
    if rest.embedding_bits:
        weights.append(model.get_output_embeddings().weight)
    tables = REST_TABLE_BYTES * sum(weight.numel() for weight in weights)
    return moments + tables + max(map(_gptq, weights), default=0)


def _gptq(weight: Tensor) -> int:
    rows, columns = weight.shape
    return GPTQ_MOMENT_BYTES * columns**2 + GPTQ_WEIGHT_BYTES * min(rows, ROWS_AT_ONCE) * columns
