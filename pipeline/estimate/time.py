"""How long a run's work takes on this machine: a step of training one MLP of the recipe's own shapes is timed.

Small matrices are multiplied more slowly than large ones, bfloat16 is much faster than float32 on some machines and no
faster on others, and masks, fake quantization and the optimizer take as long as the products where a step has few
tokens. All this shows in such a step, so that nothing is assumed about the machine.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.estimate.sizes import least_segments
from pipeline.estimate.work import MLPTraining, Work, mlp_operations
from pipeline.recipe.plan import GroupPlan, Plan, basis_layout, projection_layout
from pipeline.recipe.schema import Recipe
from qat.factor import Factor

MOST_TOKENS = 2048
"""Rows that the timed step reads at most; it takes a few seconds with the largest models."""
REPEATS, ENOUGH_SECONDS = 5, 2.0
"""The best of so many steps counts, or of as many as that time allows: other work on the machine makes them slower."""
DELIVERY_SECONDS = 15.0
"""Export, validation and measurements of speed, however small the model: the five runs of tiny models that the project
compares byte by byte took 11 to 24 seconds, nearly all of it for that."""
EXPECTED = 1.5
"""How many times what is counted a run may take: for starting codes, attention, norms, reading and writing."""

Seconds = Callable[[FactorizedMLP, int, torch.dtype], float]
"""Seconds of one step of training an MLP on so many tokens, its products in a dtype."""


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds of a run, at least, by what takes them: training of the dense model, passes through the whole model, each
    training of the compressed MLPs by its key in the recipe, and delivery, as long as it takes for any model."""

    dense_training: float
    passes: float
    training: dict[str, float]
    delivery: float = DELIVERY_SECONDS

    @property
    def least(self) -> float:
        """Seconds of all that is counted."""
        return self.dense_training + self.passes + sum(self.training.values()) + self.delivery

    @property
    def expected(self) -> float:
        """Seconds that are no surprise."""
        return EXPECTED * self.least


def duration(recipe: Recipe, plan: Plan, work: Work, seconds: Seconds) -> Duration:
    """How long ``work`` takes, at least; ``seconds``: how long a step with one MLP takes (:func:`seconds_of_step`)."""
    largest = max(plan.groups, key=lambda group: group.parameters)

    def rate(group: GroupPlan, tokens: int, quantized: bool, dtype: torch.dtype) -> float:
        """Operations per second of training an MLP of ``group``."""
        tokens = min(tokens, MOST_TOKENS)
        mlp = sample_mlp(recipe, group, quantized=quantized)
        return mlp_operations(_alone(group), tokens) / seconds(mlp, tokens, dtype)

    def training(part: MLPTraining) -> float:
        dtype = torch.bfloat16 if part.precision == "bfloat16" else torch.float32
        took = part.mlps / rate(largest, part.tokens, part.quantized, dtype)
        if part.others:
            took += part.others / rate(_dense(largest), part.tokens, False, dtype)
        return part.steps * took

    whole = rate(_dense(largest), MOST_TOKENS, False, torch.float32) if work.dense_training or work.passes else 1.0
    return Duration(
        dense_training=work.dense_training / whole,
        passes=work.passes / whole,
        training={part.key: training(part) for part in work.training},
    )


def seconds_of_step(mlp: FactorizedMLP, tokens: int, dtype: torch.dtype) -> float:
    """Seconds of one step of training ``mlp`` on ``tokens`` rows, products in ``dtype``: the best of a few."""
    optimizer = torch.optim.AdamW([parameter for parameter in mlp.parameters() if parameter.requires_grad])
    x, y = torch.randn(2, tokens, mlp.site.width)

    def step() -> float:
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = mlp(x)
        (output.float() - y).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - begin

    step()  # the first one also makes the optimizer's moments
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < ENOUGH_SECONDS:
        taken.append(step())
    return min(taken)


def sample_mlp(recipe: Recipe, group: GroupPlan, *, quantized: bool) -> FactorizedMLP:
    """The first MLP of ``group`` with random factors, as they are trained before or in quantization."""
    site = group.sites[0]
    no_weights = nn.Linear(site.width, site.hidden, bias=False, device="meta")
    dense = nn.ModuleDict(dict.fromkeys(site.linears, no_weights))
    dense[site.activation] = nn.GELU()
    basis = Factor(torch.randn(group.rank, group.width)) if group.has_basis else None
    projections = {}
    for name in site.linears:
        shape = (group.rank, site.hidden) if name == site.last else (site.hidden, group.rank)
        mask = torch.ones(shape, dtype=torch.bool) if recipe.compression.is_masked and group.has_basis else None
        projections[name] = Factor(torch.randn(shape), mask)
    if quantized:
        learned = recipe.quantization.learned_scales
        segments = least_segments(recipe, group)
        if basis is not None:
            basis.prepare_to_load(basis_layout(recipe, group, segments[0]), learned_scales=learned)
        for name, projection in projections.items():
            layout = projection_layout(recipe, group, site, name, segments[1])
            projection.prepare_to_load(layout, learned_scales=learned)
    return FactorizedMLP(site, group.name, dense, basis, projections)


def _alone(group: GroupPlan) -> GroupPlan:
    """A group of the first MLP of ``group`` alone, of the same rank."""
    site = group.sites[0]
    return GroupPlan(group.index, (site,), group.width, site.columns, group.rank, group.has_basis)


def _dense(group: GroupPlan) -> GroupPlan:
    """The first MLP of ``group`` as it is in the dense model."""
    site = group.sites[0]
    return GroupPlan(group.index, (site,), group.width, site.columns, group.width, has_basis=False)
