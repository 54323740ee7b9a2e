"""Floating-point operations of a run: of its training, and of every pass through the whole model that comes with it.

A multiply-add is two operations, and the backward pass of a product takes two products. Starting codes, export and
measurements of speed are not counted, nor samples where only the data says how many there are.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.estimate.memory import FLOAT32_BYTES
from pipeline.evaluation.measurements import Stage
from pipeline.recipe.plan import GroupPlan, Plan
from pipeline.recipe.schema import EndToEnd, Fit, LocalTraining, Precision, Recipe, ScratchModel, TextSection
from pipeline.vocabulary.frequency import EXPECTED_OVER
from qat.losses import FREQUENT, SAMPLED

FORWARD_AND_BACKWARD = 3
"""Products of a trained matrix: one forward, and two backward, for the gradients of its input and of itself."""
DISTILLED_LOGITS = 5
"""Products of hidden states and a part of the token table in a step of distillation (:mod:`qat.losses`): the teacher's
and the student's logits twice each, as they are computed again in the backward pass, and one for the gradient."""
PREDICTED_LOGITS = 3
"""Products of hidden states and the whole token table in a step of training by the text itself: the logits, again in
the backward pass, and one for the gradient."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one sample causes in a pass through the dense model.

    ``activation_bytes``: of the inputs and outputs of the compressed MLPs that calibration records. ``tokens``: rows
    that the MLPs of each block read. ``body``, ``head``: operations without and in a language model's output layer; an
    image classifier's is part of its body. ``vocabulary``: rows of that output layer, ``width`` of each, else 0.
    """

    activation_bytes: int
    tokens: dict[int, int]
    body: int
    head: int
    vocabulary: int
    width: int


@dataclass(frozen=True, kw_only=True)
class MLPTraining:
    """Training of the compressed MLPs, in groups by themselves or in the whole model.

    ``key``: its place in the recipe. ``tokens``: rows that an MLP reads in a step, in the largest group. ``mlps``,
    ``others``: operations of a step in the compressed MLPs, and outside them (teacher included).
    """

    key: str
    steps: int
    tokens: int
    mlps: int
    others: int
    quantized: bool
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of a run. ``dense_training``: of training the dense model. ``passes``: of calibration, evaluation,
    allocation and expected tokens, through the whole model. ``training``: of the compressed MLPs, in the recipe's
    order."""

    dense_training: int
    passes: int
    training: tuple[MLPTraining, ...]


def count_work(recipe: Recipe, plan: Plan, passed: Pass, measured: int) -> Work:
    """The operations of a run; ``plan``: with the largest choices, where some are left to an allocation, which measures
    ``measured`` of them."""
    dense = 0
    if isinstance(recipe.model, ScratchModel):
        training = recipe.model.training
        dense = FORWARD_AND_BACKWARD * passed.body * training.steps * training.batch_size
    evaluated = (recipe.evaluation.samples or 0) * evaluations(recipe)
    if isinstance(recipe.data, TextSection) and recipe.evaluation.stride is not None:
        evaluated *= math.ceil(recipe.data.context / recipe.evaluation.stride)  # windows that overlap
    if recipe.allocate is not None:
        evaluated += recipe.allocate.samples * measured
    if isinstance(recipe.data, TextSection):
        evaluated += expectations(recipe) * math.ceil(EXPECTED_OVER / recipe.data.context)
    return Work(
        dense_training=dense,
        passes=(recipe.calibration.samples or 0) * passed.body + evaluated * (passed.body + passed.head),
        training=tuple(_training(recipe, plan, passed, key, part) for key, part in trainings(recipe).items()),
    )


def trainings(recipe: Recipe) -> dict[str, Fit | EndToEnd | LocalTraining]:
    """The parts of a recipe that train the compressed MLPs, by their keys, in the order of a run."""
    unquantized = {"fit": recipe.fit, "finetune": recipe.finetune}
    quantized = {f"quantization.training.{n}": part for n, part in enumerate(recipe.quantization.training)}
    return {key: part for key, part in (*unquantized.items(), *quantized.items()) if part is not None}


def evaluations(recipe: Recipe) -> int:
    """How often the whole model passes over the test samples, in one form or another (:mod:`pipeline.run`)."""
    is_fips = recipe.compression.method == "fips"
    forms: dict[Stage, bool] = {
        "dense": True,
        "factorized": is_fips,
        "fitted": recipe.fit is not None,
        "finetuned": recipe.finetune is not None,
        "rounded": bool(recipe.quantization.training),
        "qat": True,
        "onnx_native": True,
        "onnx_portable": not recipe.is_language_model,
    }
    return sum(forms.values())


def expectations(recipe: Recipe) -> int:
    """How often the dense model is asked which tokens it expects (:mod:`pipeline.vocabulary.frequency`): for a
    vocabulary that is cut to a size, and for a token table in tiers."""
    tables = [recipe.quantization.rest.embedding_bits]
    if recipe.allocate is not None:
        tables += recipe.allocate.embedding_bits or []
    cut = recipe.vocabulary is not None and recipe.vocabulary.keep is not None
    return cut + any(isinstance(bits, list) for bits in tables)


def mlp_operations(group: GroupPlan, tokens: int) -> int:
    """Operations of a step of training the MLPs of a group, each on ``tokens`` rows: those of x U, V and U again."""
    columns = 2 * group.width * len(group.sites) * group.has_basis + group.columns
    return FORWARD_AND_BACKWARD * 2 * tokens * group.rank * columns


def _training(
    recipe: Recipe, plan: Plan, passed: Pass, key: str, part: Fit | EndToEnd | LocalTraining
) -> MLPTraining:
    quantized = key.startswith("quantization")
    largest = max(plan.groups, key=lambda group: group.parameters)
    if not isinstance(part, EndToEnd):
        return MLPTraining(
            key=key,
            steps=part.steps,
            tokens=part.batch_tokens,
            mlps=sum(mlp_operations(group, part.batch_tokens) for group in plan.groups),
            others=0,
            quantized=quantized,
            precision="float32",
        )
    tokens = {group.name: part.batch_size * passed.tokens[group.sites[0].block] for group in plan.groups}
    mlps = sum(mlp_operations(group, tokens[group.name]) for group in plan.groups)
    dense_mlps = sum(2 * tokens[group.name] * group.dense_parameters for group in plan.groups)
    teacher = part.batch_size * passed.body
    others = FORWARD_AND_BACKWARD * (teacher - dense_mlps)
    if part.objective == "distill":
        others += teacher
    if isinstance(recipe.data, TextSection):
        distills = part.objective == "distill"
        vocabulary = min(passed.vocabulary, FREQUENT + SAMPLED) if distills else passed.vocabulary
        predicted = recipe.data.context - (not distills)  # nothing follows a window's last token
        products = DISTILLED_LOGITS if distills else PREDICTED_LOGITS
        others += products * 2 * part.batch_size * predicted * passed.width * vocabulary
    return MLPTraining(
        key=key,
        steps=part.steps,
        tokens=tokens[largest.name],
        mlps=mlps,
        others=others,
        quantized=quantized,
        precision=part.precision,
    )


def dry_run(
    recipe: Recipe, plan: Plan, model: Any, config: Any, shapes_only: AbstractContextManager[Any]
) -> Pass:
    """One sample through a ``model`` without values, in the context ``shapes_only``: counted without computing."""
    tokens: dict[int, int] = {}
    sites = [site for group in plan.groups for site in group.sites]

    def count(block: int, width: int) -> Any:
        def hook(_module: nn.Module, arguments: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            tokens[block] = arguments[0].numel() // width

        return hook

    for site in sites:
        model.get_submodule(site.path).register_forward_hook(count(site.block, site.width))
    model.eval()
    head = vocabulary = width = 0
    with shapes_only, torch.inference_mode(), FlopCounterMode(display=False) as counter:
        if isinstance(recipe.data, TextSection):
            input_ids = torch.zeros(1, recipe.data.context, dtype=torch.int64)
            model.base_model(input_ids=input_ids, use_cache=False)
            vocabulary, width = model.get_output_embeddings().weight.shape
            head = 2 * recipe.data.context * vocabulary * width
        else:
            size = config.image_size
            model(pixel_values=torch.empty(1, 3, *((size, size) if isinstance(size, int) else size)))
    return Pass(
        activation_bytes=sum(2 * FLOAT32_BYTES * tokens[site.block] * site.width for site in sites),
        tokens=tokens,
        body=counter.get_total_flops(),
        head=head,
        vocabulary=vocabulary,
        width=width,
    )
