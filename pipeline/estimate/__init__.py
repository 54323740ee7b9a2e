"""What a run will make and need, from the model's configuration alone; no weight is computed.

Sizes of what is stored (:mod:`pipeline.estimate.sizes`), memory (:mod:`pipeline.estimate.memory`) and work
(:mod:`pipeline.estimate.work`) are counted here; how long the work takes on a machine is measured in
:mod:`pipeline.estimate.time`, and ``fips plan`` prints it all (:mod:`pipeline.estimate.printing`).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.estimate.checks import check_filling, check_lengths
from pipeline.estimate.inputs import check_inputs
from pipeline.estimate.memory import FLOAT32_BYTES, mapped_bytes, memory_by_stage, training_bytes
from pipeline.estimate.sizes import least_size
from pipeline.estimate.vocabulary import VocabularyEstimate, estimate_vocabulary
from pipeline.estimate.work import Work, count_work, dry_run
from pipeline.models.adapters import find_mlps
from pipeline.models.causal_lm import (
    is_here,
    language_model_class,
    load_generation_config,
    load_language_config,
    load_tokenizer,
    notes_on,
)
from pipeline.models.export_check import check_graph, check_saved_config
from pipeline.models.image_classifier import load_config, model_class
from pipeline.plumbing.errors import InputError, one_line
from pipeline.quantization.rest_layers import check_tiers, fitted_rest, inputs_of, rest_linears
from pipeline.quantization.rest_sizes import rest_bytes
from pipeline.recipe.choices import choices_of, largest_choice, rest_choices
from pipeline.recipe.plan import FittedRows, GroupSize, MLPSite, Plan, fitted_rows, make_plan
from pipeline.recipe.schema import LanguageModelSection, Recipe
from pipeline.vocabulary.cut import CutVocabulary
from pipeline.vocabulary.cut_model import renumber


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Parameters, bytes and work of a run to be.

    ``sizes``: bytes of each group's packed factors, by its name; a factor left to allocation is counted with 2 bits.
    ``rest_bytes``: of all weights outside the compressed MLPs, as they are stored. ``fitted``: rows that the recipe's
    block sizes do not divide. ``activation_bytes_per_sample``: on disk, of what calibration records.
    ``group_training_bytes``: memory to train the factors of the largest group.
    ``least_bytes``: of all weights with the smallest choices of an allocation; None without one.
    ``dense_parameters``: of the model as it is given, more than ``parameters`` if its ``vocabulary`` is cut.
    ``memory``: bytes held at most, by what the run is at; ``mapped_bytes`` of them are dense weights mapped from a
    checkpoint, which need not stay in memory. ``work``: operations that take most of the time. ``notes``: what the user
    should know of how the model is taken, and of the inputs, a sentence each.
    """

    plan: Plan
    parameters: int
    mlp_parameters: int
    sizes: dict[str, GroupSize]
    rest_bytes: int
    least_bytes: int | None
    fitted: tuple[FittedRows, ...]
    activation_bytes_per_sample: int
    group_training_bytes: int
    memory: dict[str, int]
    mapped_bytes: int
    work: Work
    dense_parameters: int
    vocabulary: VocabularyEstimate | None
    notes: tuple[str, ...] = ()

    @property
    def mlp_bytes(self) -> int:
        """Bytes of all packed factors."""
        return sum(size.stored for size in self.sizes.values())

    @property
    def artifact_bytes(self) -> int:
        """Bytes of all weights; graph, manifest and native library add about half a megabyte."""
        return self.mlp_bytes + self.rest_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense model in memory, in float32."""
        return FLOAT32_BYTES * self.dense_parameters

    @property
    def peak_memory(self) -> tuple[str, int]:
        """When most memory is held, and how much."""
        return max(self.memory.items(), key=lambda entry: entry[1])


def estimate(recipe: Recipe, *, fetch: bool = False) -> Estimate:
    """Plan a run, with the largest choices where some are left to an allocation.

    ``fetch``: the tokenizer of a language model on the hub is downloaded, to be asked as one on this machine is. Raises
    InputError for whatever :func:`pipeline.recipe.plan.make_plan` refuses, missing inputs, rows that cannot be filled
    up, and what could not be exported.
    """
    notes = check_inputs(recipe)
    choices = []
    wanted = recipe
    if recipe.allocate is not None:
        choices = [choice.apply(recipe) for choice in choices_of(recipe)]
        recipe = largest_choice(recipe)
    estimated = estimate_vocabulary(recipe)
    cut, vocabulary = (None, None) if estimated is None else estimated
    config, model, shapes_only = _shapes(recipe, cut)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dense_parameters, tables = parameters, 0
    if cut is not None:
        # Tables with the whole vocabulary, which a run holds beside those that it cuts out of them.
        tables = _tables(model) // len(cut.kept) * cut.rows
        dense_parameters += tables - _tables(model)
    sites = find_mlps(model)
    plans = [(choice, make_plan(choice, sites)) for choice in choices]
    plan = make_plan(recipe, sites)
    check_filling(recipe, model, plan)
    check_tiers(recipe, model)
    least, measured = None, 0
    if recipe.allocate is not None:
        rest_sizes = [(rest_bytes(own, model, sites, plan), own) for own in rest_choices(recipe)]
        (least_rest, _), (_, recipe) = (choose(rest_sizes, key=lambda entry: entry[0]) for choose in (min, max))
        least = _least_bytes(plans) + least_rest
        measured = len(choices) * len(plan.groups) + _choices_outside(wanted, model, sites)
        _check_target(wanted, least)
    if isinstance(recipe.model, LanguageModelSection) and (fetch or is_here(recipe.model)):
        generation = load_generation_config(recipe.model)
        if cut is not None and generation is not None:
            renumber(generation, None, cut.new_ids)
        tokenizer = load_tokenizer(recipe.model) if cut is None else cut.tokenizer
        check_saved_config(recipe.model, config, tokenizer, generation)
        notes = (*notes_on(recipe.model), *notes)
    sizes = {group.name: least_size(recipe, group) for group in plan.groups}
    rest = rest_bytes(recipe, model, sites, plan)
    with _fitting_together():
        passed = dry_run(recipe, plan, model, config, shapes_only)
    return Estimate(
        plan=plan,
        parameters=parameters,
        mlp_parameters=sum(group.dense_parameters for group in plan.groups),
        sizes=sizes,
        rest_bytes=rest,
        least_bytes=least,
        fitted=(*fitted_rows(plan), *fitted_rest(recipe, model, sites)),
        activation_bytes_per_sample=passed.activation_bytes,
        group_training_bytes=training_bytes(recipe, plan),
        memory={
            stage: size + FLOAT32_BYTES * tables
            for stage, size in memory_by_stage(
                recipe, plan, model, rest, sum(size.stored for size in sizes.values())
            ).items()
        },
        mapped_bytes=mapped_bytes(recipe, config, model),
        work=count_work(wanted, plan, passed, measured),
        dense_parameters=dense_parameters,
        vocabulary=vocabulary,
        notes=notes,
    )


def _least_bytes(plans: Sequence[tuple[Recipe, Plan]]) -> int:
    """Bytes of all packed factors, each group with the smallest of the choices, given with what they make of a model.
    """
    sizes: dict[str, int] = {}
    for choice, plan in plans:
        for group in plan.groups:
            size = least_size(choice, group).stored
            sizes[group.name] = min(size, sizes.get(group.name, size))
    return sum(sizes.values())


def _choices_outside(recipe: Recipe, model: Any, sites: Sequence[MLPSite]) -> int:
    """How many choices an allocation measures outside the MLPs."""
    assert recipe.allocate is not None
    linears, tables = (len(bits or []) for bits in (recipe.allocate.linear_bits, recipe.allocate.embedding_bits))
    return tables + (linears * len(inputs_of(rest_linears(model, sites))) if linears else 0)


def _check_target(recipe: Recipe, least: int) -> None:
    """Raise InputError if an artefact has to be smaller than its weights are with the smallest choices, ``least``."""
    assert recipe.allocate is not None
    target = recipe.allocate.artifact_bytes
    if target is not None and target < least:
        raise InputError(
            f"recipe {recipe.name}: allocate.target: {recipe.allocate.target} is below what the weights alone take "
            f"with the smallest choices, {least:,} bytes; raise it, or allow smaller budgets or fewer bits"
        )


def _tables(model: Any) -> int:
    """Parameters of the token table and the output layer, counted once if they are one."""
    tables = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(table.numel() for table in tables.values())


def _shapes(recipe: Recipe, cut: CutVocabulary | None) -> tuple[Any, Any, AbstractContextManager[Any]]:
    """(configuration, model without values, context in which the model can be called) of a recipe, with the vocabulary
    ``cut`` if it is not None."""
    shapes_only: AbstractContextManager[Any]
    if isinstance(recipe.model, LanguageModelSection):
        config, kind = load_language_config(recipe.model), language_model_class()
        check_lengths(recipe, config)
        check_graph(recipe.model, config)
        if cut is not None:
            renumber(config, len(cut.kept), cut.new_ids)
        # Masks of language models depend on data where tensors are on the meta device, not where they are fake.
        shapes_only = FakeTensorMode()
    else:
        # The number of labels, where it comes from the data, changes the size of one small layer.
        config, kind = load_config(recipe.model, labels=10), model_class()
        shapes_only = torch.device("meta")
    with shapes_only, _fitting_together():
        return config, kind.from_config(config), shapes_only


@contextmanager
def _fitting_together() -> Iterator[None]:
    """Make what transformers and PyTorch raise for settings of a model that contradict each other an InputError."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"model: its configuration does not fit together, no sample goes through it: {one_line(error)}"
        ) from error
