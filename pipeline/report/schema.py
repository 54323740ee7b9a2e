"""The report of a run: one definition of what ``report.json`` holds, of its checks and of its JSON.

One report serves image classifiers and language models; ``quality.metric`` tells which: accuracy, higher is better,
or perplexity, lower is better. Sizes are bytes, times seconds, accuracies and errors fractions of 1. Block indices
are strings where they are keys (JSON has no others).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    model_validator,
)

from pipeline.evaluation.measurements import (
    FACTOR_STAGES,
    TRAINED_STAGES,
    Agreement,
    ArtifactMemory,
    ImageDivergence,
    Quality,
    Samples,
    Speed,
    Stage,
    TextDivergence,
    TextSamples,
    TrainedStage,
    check_stages,
)
from pipeline.plumbing.hardware import Hardware
from pipeline.plumbing.records import Record
from pipeline.recipe.schema import MethodName, Recipe, StartName


class DenseModel(Record):
    """The dense model. ``parameters``: of all of it; ``mlp_parameters``: of its MLPs."""

    name: str
    model_type: str
    source: str
    parameters: PositiveInt
    mlp_parameters: PositiveInt


class Method(Record):
    """How the MLPs were compressed. ``method`` fips: shared bases and projections; dense: their own matrices,
    quantized. ``start``: how the codes were found before training."""

    method: MethodName
    start: StartName


class Group(Record):
    """Blocks that share one basis. ``width`` d, ``columns`` N and ``rank`` r of the paper.

    ``basis_bits`` and ``projection_bits``: bits → entries of the rank axis stored with them.
    ``singular_values``: what the SVD of the initialisation found, falling.

    Method dense has no basis: ``rank`` is None, ``basis_bits`` and ``singular_values`` are empty, and
    ``projection_bits`` has the one bit-width of the matrices, mapped to ``width``.
    """

    name: str
    blocks: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    width: PositiveInt
    columns: PositiveInt
    rank: PositiveInt | None
    basis_bits: dict[str, PositiveInt]
    projection_bits: dict[str, PositiveInt]
    pattern: str
    singular_values: tuple[NonNegativeFloat, ...]


class RestWeight(Record):
    """A weight outside the MLPs that is stored as codes: ``bits`` → rows stored with them. ``bytes``: with scales."""

    name: str
    bits: dict[str, PositiveInt]
    bytes: PositiveInt


class Bytes(Record):
    """Bytes of the dense model, of the artefact, and of its parts, which add up to it; :data:`MLP_PARTS` and
    :data:`PACKAGING_PARTS` name what is special in them."""

    dense_float16: PositiveInt
    artifact: PositiveInt
    mlp_dense_float16: PositiveInt
    mlp_stored: PositiveInt
    by_part: dict[str, NonNegativeInt]

    @model_validator(mode="after")
    def _parts_add_up(self) -> Self:
        if (total := sum(self.by_part.values())) != self.artifact:
            raise ValueError(f"by_part adds up to {total}, artifact is {self.artifact}")
        return self


MLP_PARTS = ("basis codes", "projection codes", "weight codes", "sparsity patterns", "scales")
"""Parts of ``bytes.by_part`` that store compressed MLPs (``weight codes``: of method dense)."""
PACKAGING_PARTS = ("graph", "native library", "tokenizer", "other files")
"""Parts that are no weights. All others are weights outside the MLPs: ``token table``, ``rest of the model``."""


class BitsPerWeight(Record):
    """Bits per weight of the original MLPs: ``paper`` counts values only, ``stored`` every byte."""

    paper: PositiveFloat
    stored: PositiveFloat


class Memory(ArtifactMemory):
    """Memory of the artefact, and of the run that made it.

    ``peak_rss_by_stage``: the largest resident set of the process that computed a stage, from the end of the stage
    before on.
    """

    pipeline_peak_rss_bytes: PositiveInt
    peak_rss_by_stage: dict[str, PositiveInt]


class Report(Record):
    """What a run was, did and found; a report that contradicts itself cannot be made.

    ``stage_bytes``: of the whole model at each stage; before quantization as stored in float16.
    ``reconstruction_error``: block index → squared error of the MLP's output relative to the mean square of the dense
    output. ``divergence``: of the artefact from the dense model. ``disk_bytes``: what the run keeps in its work folder.
    """

    schema_version: Literal[4]
    recipe: Recipe
    model: DenseModel
    compression: Method
    data: TextSamples | Samples
    versions: dict[str, str]
    hardware: Hardware
    groups: Annotated[tuple[Group, ...], Field(min_length=1)]
    dense_blocks: tuple[NonNegativeInt, ...]
    rest_weights: tuple[RestWeight, ...] = ()
    bytes: Bytes
    bits_per_weight: BitsPerWeight
    quality: Quality
    divergence: TextDivergence | ImageDivergence
    stage_bytes: dict[Stage, PositiveInt]
    reconstruction_error: dict[TrainedStage, dict[str, NonNegativeFloat]]
    parity: Agreement
    speed: Speed
    memory: Memory
    warnings: tuple[str, ...]
    seconds: dict[str, NonNegativeFloat]
    disk_bytes: NonNegativeInt
    reused_stages: tuple[str, ...]

    @property
    def stages(self) -> list[Stage]:
        """The stages the run had, in order."""
        return list(self.quality.by_stage)

    @property
    def trained_stages(self) -> list[TrainedStage]:
        """The stages with reconstruction errors, in order."""
        return [stage for stage in TRAINED_STAGES if stage in self.reconstruction_error]

    @field_serializer("recipe")
    def _with_defaults(self, recipe: Recipe) -> dict[str, Any]:
        return recipe.model_dump(mode="json")

    @model_validator(mode="after")
    def _stages_are_those_of_the_method(self) -> Self:
        stages, method = set(self.stages), self.compression.method
        if method == "fips" and "factorized" not in stages:
            raise ValueError("quality lacks the stage factorized of method fips")
        if method == "dense" and (foreign := stages & set(FACTOR_STAGES)):
            raise ValueError(f"quality has the stages {sorted(foreign)}, which method dense has not")
        check_stages("stage_bytes", self.stage_bytes, stages)
        check_stages("reconstruction_error", self.reconstruction_error, stages & set(TRAINED_STAGES))
        return self

    @model_validator(mode="after")
    def _groups_are_those_of_the_method(self) -> Self:
        grouped = {str(block) for group in self.groups for block in group.blocks}
        for stage, errors in self.reconstruction_error.items():
            if set(errors) != grouped:
                raise ValueError(
                    f"reconstruction_error.{stage} has the blocks {sorted(errors)}, the groups have {sorted(grouped)}"
                )
        method = self.compression.method
        for group in self.groups:
            has_basis = {group.rank is not None, bool(group.basis_bits), bool(group.singular_values)}
            if has_basis != {method == "fips"}:
                raise ValueError(
                    f"{group.name}: rank, basis_bits and singular_values go with method fips, and only with it; the "
                    f"method is {method}"
                )
        return self

    @model_validator(mode="after")
    def _parts_are_of_one_kind(self) -> Self:
        """Data, divergence and speed are of the kind that the metric says."""
        kinds = {
            "metric": self.quality.metric == "perplexity",
            "data": isinstance(self.data, TextSamples),
            "divergence": isinstance(self.divergence, TextDivergence),
            "speed": self.speed.unit == "tokens/s",
        }
        if len(set(kinds.values())) > 1:
            text, images = ([name for name, is_text in kinds.items() if is_text is kind] for kind in (True, False))
            raise ValueError(f"of text: {', '.join(text)}; of images: {', '.join(images)}; expected one kind")
        backends = [row.backend for row in self.speed.rows]
        for name in ("load_rss_by_backend", "run_rss_by_backend"):
            if unknown := set(getattr(self.memory, name) or ()) - set(backends):
                raise ValueError(f"memory.{name} has {sorted(unknown)}, the rows of speed have {backends}")
        return self
