"""The recipe: everything a run depends on, as one frozen, validated value.

Unknown keys are refused at every level. A recipe is read from YAML in :mod:`pipeline.recipe.reading`; what it says
about a model (group indices, divisibility, rank) is checked against that model in :mod:`pipeline.recipe.plan`.
"""

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, Field, model_validator

from fips_ort.layout import BIT_WIDTHS, Pattern, check_block_size
from pipeline.plumbing.byte_sizes import parse_bytes
from pipeline.plumbing.records import Record

PatternName = Literal["dense", "bitmap", "1:4", "2:4", "1:8", "2:8"]
BlockSize = Literal[16, 32, 64, 128, 256]
OneWidth = Literal[2, 3, 4]
"""Bits that all values of a factor can have; segments of the rank axis can have 8, too."""
Precision = Literal["float32", "bfloat16"]
MethodName = Literal["fips", "dense"]
StartName = Literal["nearest", "gptq"]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
LARGEST_BUDGET = 2.0
"""Parameters of the factors relative to those of the dense matrices, at most."""
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class AtKeyError(ValueError):
    """A problem found by a validator of a whole section, at one of the ``key``s in it (dotted)."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def user_path(text: str) -> str:
    """A path, or a hub id, with the home folder in the place of ``~`` or ``~user``. Raises ValueError for what is no
    path, or a home folder that is not known."""
    if not text or "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("not a path: it is empty, or holds characters that no path has")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError("the home folder that it begins with is not known; write the path out")
    return expanded


UserPath = Annotated[str, AfterValidator(user_path)]
"""A path in a recipe or a sweep, ``~`` expanded; where it may also be a hub id, that stays as it is."""


class Section(Record):
    """A part of a recipe: frozen, unknown keys refused."""


# --- model -----------------------------------------------------------------------------------------------------


def _is_given(section: Section, key: str) -> bool:
    """Whether a key has another value than its default. A recipe written out in full, as in an artefact, has all keys:
    those that were not given with their defaults."""
    return bool(getattr(section, key) != type(section).model_fields[key].default)


class Training(Section):
    """Training of a classifier, or of its last layer, in the run: AdamW whose learning rate warms up linearly over 5 %
    of the steps and decays to zero by a cosine."""

    steps: Positive
    batch_size: Positive = 128
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05


class ScratchModel(Section):
    """A transformers image classifier of ``model_type`` built from ``config`` and trained in the run.

    ``augmentation``: ``affine`` slightly rotates, scales and moves each training image.
    """

    source: Literal["scratch"]
    model_type: str
    config: dict[str, Any]
    training: Training
    augmentation: Literal["none", "affine"] = "none"

    @model_validator(mode="after")
    def _keys_are_text(self) -> "ScratchModel":
        """Keys of an artefact's recipe are, which is JSON."""
        for path, value in _inner_mappings(self.config, "config"):
            for key in value:
                if not isinstance(key, str):
                    raise AtKeyError(f"{path}.{key}", "keys are text here; write it in quotes")
        return self


def _inner_mappings(value: Any, path: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    """All mappings in a value that has no schema, with their dotted paths."""
    if isinstance(value, dict):
        yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _inner_mappings(part, f"{path}.{key}")


class PretrainedModel(Section):
    """A fine-tuned image classifier: a Hugging Face id or a local folder (``path`` is either)."""

    source: Literal["pretrained"]
    path: UserPath
    revision: str | None = None


class PackagedOnnxModel(Section):
    """A DINOv2 backbone inside the ONNX file of an installed package, with a linear head trained in the run."""

    source: Literal["packaged_onnx"]
    package: str
    file: str
    image_size: Positive
    head: Training


class CausalLanguageModel(Section):
    """A causal language model: a Hugging Face id or a local folder; ``gguf_file`` names a GGUF file in it."""

    source: Literal["causal_lm"]
    path: UserPath
    revision: str | None = None
    gguf_file: str | None = None


class PackagedGGUFModel(Section):
    """A causal language model in a GGUF file of an installed package, whole or cut into ``file.part00`` and so on
    over the package and those it requires."""

    source: Literal["packaged_gguf"]
    package: str
    file: str


ImageModelSection = ScratchModel | PretrainedModel | PackagedOnnxModel
LanguageModelSection = CausalLanguageModel | PackagedGGUFModel
ModelSection = Annotated[ImageModelSection | LanguageModelSection, Field(discriminator="source")]


# --- data ------------------------------------------------------------------------------------------------------


class DigitsData(Section):
    """scikit-learn's digits (1,797 images), as RGB images resized to ``image_size``."""

    source: Literal["digits"]
    image_size: Positive
    test_fraction: Fraction = 0.33


class ImageFolderData(Section):
    """Image files in folders as ImageNet has them, ``path/{train,test}/LABEL/image.*`` or deeper; the label is a name
    or index that the model knows."""

    source: Literal["image_folder"]
    path: UserPath
    train: UserPath = "train"
    test: UserPath = "val"


class HubImageData(Section):
    """An image classification dataset read with ``datasets`` (a hub id, or a local folder it understands)."""

    source: Literal["hub"]
    path: UserPath
    config: str | None = None
    train: str = "train"
    test: str = "validation"
    image_column: str = "image"
    label_column: str = "label"


class TextSection(Section):
    """Text, cut into windows of ``context`` tokens (a leading ``<bos>`` included); samples are windows."""

    context: Annotated[int, Field(ge=16)] = 512


class PackagedTextData(TextSection):
    """A JSON file of an installed package: records (a list, or the values of a mapping) with text in ``field``.

    ``test_fraction`` of the records, drawn at random, is for evaluation, the others for training.
    """

    source: Literal["packaged_text"]
    package: str
    file: str
    field: str
    test_fraction: Fraction = 0.1


class LocalTextData(TextSection):
    """Local files: plain text (one document), or JSON Lines or JSON with a document in ``field`` of every record.

    Without ``test``, ``test_fraction`` of the documents (of a plain text: of its lines) is for evaluation.
    """

    source: Literal["text"]
    train: UserPath
    test: UserPath | None = None
    field: str = "text"
    test_fraction: Fraction = 0.1

    @model_validator(mode="after")
    def _only_what_is_split_has_a_fraction(self) -> "LocalTextData":
        if self.test is not None and _is_given(self, "test_fraction"):
            raise AtKeyError("test_fraction", "test is given, and nothing is split off train; leave it out")
        return self


class HubTextData(TextSection):
    """A text dataset read with ``datasets``, streamed; ``documents``: at most so many of each split are read."""

    source: Literal["hub_text"]
    path: UserPath
    config: str | None = None
    train: str = "train"
    test: str = "test"
    field: str = "text"
    documents: Positive = 20_000


ImageDataSection = DigitsData | ImageFolderData | HubImageData
TextDataSection = PackagedTextData | LocalTextData | HubTextData
DataSection = Annotated[ImageDataSection | TextDataSection, Field(discriminator="source")]


# --- vocabulary ------------------------------------------------------------------------------------------------


def _script_name(name: str) -> str:
    """A script by Unicode's name for it. Raises ValueError for what is none."""
    try:
        if not name.replace("_", "").isalpha():
            raise ValueError
        regex.compile(rf"\p{{Script={name}}}")
    except (ValueError, regex.error):
        raise ValueError(
            "not Unicode's name of a script, as Latin, Cyrillic, Greek, Arabic, Han, Hiragana and Devanagari are"
        ) from None
    return name


class VocabularySection(Section):
    """The tokens that a language model keeps; one of the keys, or both.

    ``scripts``: those that hold letters of these scripts alone, and those that hold none. ``keep``: at most so many,
    the most frequent ones in the training text. Single bytes, special and added tokens stay in any case, placeholders
    (``<unused7>``) go. Texts of all kinds can still be read and written, some in more tokens.
    """

    scripts: Annotated[list[Annotated[str, AfterValidator(_script_name)]], Field(min_length=1)] | None = None
    keep: Positive | None = None

    @model_validator(mode="after")
    def _something_is_cut(self) -> "VocabularySection":
        if self.scripts is None and self.keep is None:
            raise ValueError("give scripts or keep, or leave vocabulary out")
        return self


# --- compression -----------------------------------------------------------------------------------------------


class Sparsifier(Section):
    """How the projections become sparse during the fit.

    ``algorithm``: gradual magnitude pruning, RigL's dropping and growing, or one choice by magnitude before the first
    step. ``ranking``: magnitudes are compared within each projection (``layer``) or over the whole group
    (``group``, the paper's 'global'). ``saliency``: entries are ranked by ``magnitude``, or by their contribution to
    the output on the calibration data (``activation``). The mask is updated every ``update_every`` steps until ``end``
    of the steps. ``initial_sparsity`` is where GMP starts; ``drop_fraction`` is RigL's, with cosine decay.
    """

    algorithm: Literal["gmp", "rigl", "static"] = "gmp"
    ranking: Literal["layer", "group"] = "layer"
    saliency: Literal["magnitude", "activation"] = "magnitude"
    update_every: Positive = 50
    end: Fraction = 0.75
    initial_sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    drop_fraction: Fraction = 0.1

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> "Sparsifier":
        readers = {
            "update_every": ("gmp", "rigl"),
            "end": ("gmp", "rigl"),
            "initial_sparsity": ("gmp",),
            "drop_fraction": ("rigl",),
        }
        for key, algorithms in readers.items():
            if self.algorithm not in algorithms and _is_given(self, key):
                raise AtKeyError(key, f"is for algorithm {' or '.join(algorithms)}, not {self.algorithm}; leave it out")
        return self


class Compression(Section):
    """FiPS: groups of blocks, parameter budget, sparsity of the projections.

    ``groups``: lists of block indices, or the size of groups of consecutive blocks. ``budget``: kept fraction
    of the group's MLP parameters; above 1 for a basis of full rank, which pays by fewer bits alone. ``pattern`` of the
    projections; an n:m pattern fixes ``sparsity``.

    ``method: dense`` is the baseline without factorization: the MLPs' own matrices are quantized (as
    ``quantization.projections`` says) and trained; groups and budget do not apply.
    """

    method: MethodName = "fips"
    groups: Annotated[list[list[int]], Field(min_length=1)] | Positive = 1
    budget: Annotated[float, Field(gt=0.0, le=LARGEST_BUDGET)] = 1.0
    pattern: PatternName = "bitmap"
    sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    initialization: Literal["svd", "activation_svd", "output_aware"] = "activation_svd"
    sparsifier: Sparsifier = Sparsifier()

    @model_validator(mode="after")
    def _method_has_its_keys(self) -> "Compression":
        wanted = ("groups", "budget")
        if self.method == "fips":
            for key in wanted:
                if key not in self.model_fields_set:
                    raise AtKeyError(key, "required key is missing")
        else:
            for key in (*wanted, "sparsity", "initialization", "sparsifier"):
                if _is_given(self, key):
                    raise AtKeyError(key, "method dense does not factorize and has no such key; leave it out")
            if self.pattern != "dense":
                raise AtKeyError("pattern", f"got {self.pattern!r}; method dense keeps every weight: take dense")
        return self

    @model_validator(mode="after")
    def _sparsity_follows_pattern(self) -> "Compression":
        pattern = Pattern.parse(self.pattern)
        if pattern.is_n_of_m:
            implied: float | None = 1.0 - pattern.keep / pattern.of
        else:
            implied = 0.0 if self.pattern == "dense" else None
        if implied is None and not self.sparsity:
            raise ValueError("pattern bitmap needs a sparsity above 0 (for none, use pattern: dense)")
        if implied is not None and self.sparsity not in (None, implied):
            raise ValueError(f"pattern {self.pattern} means sparsity {implied}, not {self.sparsity}")
        if not self.is_masked and _is_given(self, "sparsifier"):
            raise AtKeyError("sparsifier", "pattern dense keeps every entry; leave it out")
        if self.is_masked and self.sparsifier.algorithm == "gmp":
            initial, final = self.sparsifier.initial_sparsity, self.target_sparsity
            if initial >= final:
                raise AtKeyError(
                    "sparsifier.initial_sparsity", f"got {initial}; sparsity rises from there, so it is below {final:g}"
                )
        if pattern.is_n_of_m and self.sparsifier.ranking == "group":
            raise ValueError(
                f"sparsifier.ranking: group is for pattern bitmap; pattern {self.pattern} ranks within each "
                f"{pattern.of} columns, so take ranking: layer"
            )
        return self

    @property
    def is_masked(self) -> bool:
        """Whether the projections are sparse: some of their entries are masked."""
        return self.pattern != "dense"

    @property
    def target_sparsity(self) -> float:
        """Fraction of the projections' entries that are zero."""
        pattern = Pattern.parse(self.pattern)
        if pattern.is_n_of_m:
            return 1.0 - pattern.keep / pattern.of
        return self.sparsity or 0.0


class Fit(Section):
    """Local error minimisation: AdamW on basis and projections against the dense MLPs' outputs."""

    steps: Positive
    batch_tokens: Positive = 2048
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0


class EndToEnd(Section):
    """Training of the factors in the whole model: ``task`` loss, or ``distill`` (KL to the dense logits).

    ``precision`` bfloat16: products in bfloat16, several times faster where the CPU has instructions for it; factors,
    scales and the optimizer stay float32."""

    objective: Literal["task", "distill"]
    steps: Positive
    batch_size: Positive = 128
    learning_rate: PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    precision: Precision = "float32"


class QuantizedEndToEnd(EndToEnd):
    """Training of the quantized factors in the whole model; with ``train_rest``, norms and the scales of n-bit linear
    layers outside the MLPs are trained with them, so that they make up for what the codes have lost."""

    train_rest: bool = False


# --- quantization ----------------------------------------------------------------------------------------------


class Grade(Section):
    """A segment of the rank axis: a ``fraction`` of the rank entries stored with ``bits``."""

    bits: Literal[2, 3, 4, 8]
    fraction: Annotated[float, Field(gt=0.0, le=1.0)]


class FactorScheme(Section):
    """How one kind of factor is quantized: symmetric, one float16 scale per ``block_size`` values.

    ``bits``: 2, 3 or 4; or segments of the rank axis, the most energetic entries first; or ``allocate``:
    reverse water-filling to ``quantization.target_stored_bits``. ``levels``: ``midtread`` has a level at zero,
    ``midrise`` uses all levels symmetrically.
    """

    bits: OneWidth | list[Grade] | Literal["allocate"]
    block_size: BlockSize
    levels: Literal["midtread", "midrise"] = "midtread"

    @model_validator(mode="after")
    def _grades_are_complete(self) -> "FactorScheme":
        if isinstance(self.bits, list):
            _check_grades(self.bits)
        return self


def _check_grades(grades: list[Grade]) -> None:
    """Raise ValueError unless ``grades`` are segments of a whole rank axis, in the order of the formats."""
    total, widths = sum(grade.fraction for grade in grades), [grade.bits for grade in grades]
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"the fractions of the segments add up to {total:g}, not 1")
    if sorted(widths, reverse=True) != widths or len(set(widths)) != len(widths):
        raise ValueError(f"segments must have falling bits, each once, out of {BIT_WIDTHS}; got {widths}")


class LocalTraining(Section):
    """Block-wise QAT: the objective of the fit, with fake-quantized factors."""

    objective: Literal["local"]
    steps: Positive
    batch_tokens: Positive = 2048
    learning_rate: PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0


class Tier(Section):
    """Rows of a token table stored with ``bits``: of the ``tokens`` that are most frequent (docs/recipes.md) among
    those of no tier before; in the last tier, of all others."""

    bits: Literal[2, 3, 4, 8]
    tokens: Positive | None = None


LinearBits = Literal[2, 3, 4, 8]
EmbeddingBits = Literal[2, 3, 4, 8] | Annotated[list[Tier], Field(min_length=2)]


class RestOfModel(Section):
    """Storage of everything outside the MLPs. Linear layers (not the classifier) can take 2, 3, 4 or 8 bits; all other
    weights are float16 or float32.

    ``embedding_bits``: of the token table of a language model and of its output layer, which share one table where the
    model ties them; or tiers of falling bits. ``block_size``: values that share a float16 scale, at most."""

    weights: Literal["float32", "float16"] = "float16"
    linear_bits: LinearBits | None = None
    embedding_bits: EmbeddingBits | None = None
    block_size: BlockSize = 64

    @model_validator(mode="after")
    def _blocks_belong_to_bits(self) -> "RestOfModel":
        if not self.is_packed and _is_given(self, "block_size"):
            raise AtKeyError("block_size", "is for linear_bits and embedding_bits; give one of them, or leave it out")
        return self

    @property
    def is_packed(self) -> bool:
        """Whether anything outside the MLPs is stored as codes."""
        return self.linear_bits is not None or self.embedding_bits is not None

    @property
    def fewest_embedding_bits(self) -> int | None:
        """Bits of the rows of a token table that have fewest; None if it is not stored as codes."""
        bits = self.embedding_bits
        return bits[-1].bits if isinstance(bits, list) else bits

    @model_validator(mode="after")
    def _tiers_are_complete(self) -> "RestOfModel":
        _check_tiers(self.embedding_bits, "embedding_bits")
        return self


def _check_tiers(bits: EmbeddingBits | None, key: str) -> None:
    """Raise AtKeyError unless tiers of a token table, at ``key``, have falling bits and leave the last one the rest."""
    if not isinstance(bits, list):
        return
    widths = [tier.bits for tier in bits]
    if sorted(widths, reverse=True) != widths or len(set(widths)) != len(widths):
        raise AtKeyError(key, f"tiers must have falling bits, each once; got {widths}")
    for number, tier in enumerate(bits):
        is_last = number == len(widths) - 1
        if (tier.tokens is None) != is_last:
            said = "the last tier has all other tokens; leave it out" if is_last else "required key is missing"
            raise AtKeyError(f"{key}.{number}.tokens", said)


class Quantization(Section):
    """How factors and all other weights are quantized, and the factors then trained.

    ``start``: codes before training are the ``nearest`` levels, or those that ``gptq`` finds from the second moments of
    the activations. ``target_stored_bits``: what ``bits: allocate`` spends. ``learned_scales``: scales are trained with
    the values. ``training``: entries follow one another.
    """

    basis: FactorScheme | None = None
    projections: FactorScheme
    target_stored_bits: PositiveFloat | None = None
    start: StartName = "nearest"
    learned_scales: bool = True
    training: list[Annotated[LocalTraining | QuantizedEndToEnd, Field(discriminator="objective")]] = Field(
        default_factory=list
    )
    rest: RestOfModel = RestOfModel()

    @model_validator(mode="after")
    def _target_goes_with_allocation(self) -> "Quantization":
        allocated = "allocate" in (self.basis and self.basis.bits, self.projections.bits)
        if allocated != (self.target_stored_bits is not None):
            raise ValueError("target_stored_bits goes with bits: allocate, and only with it")
        return self

    @model_validator(mode="after")
    def _scales_are_learned_in_training(self) -> "Quantization":
        if not self.training and _is_given(self, "learned_scales"):
            raise AtKeyError("learned_scales", "without training nothing is learned; leave it out")
        return self


def _target(target: float | str) -> float | str:
    """A number of stored bits per weight, or a size as text. Raises ValueError for what is neither."""
    if isinstance(target, str):
        parse_bytes(target)
    elif not 0 < target <= _MOST_STORED_BITS:
        raise ValueError(
            f"stored bits per weight are above 0 and at most {_MOST_STORED_BITS}; write the size of an artefact with "
            "its unit, as in 135MB"
        )
    return target


_MOST_STORED_BITS = 64
"""A factorization of a budget of 2 with 32 bits a value: beyond it, a number is a size without its unit."""


class Allocate(Section):
    """Rank, sparsity and bits chosen together to meet ``target``: stored bits per original weight of the compressed
    MLPs, all bytes counted; or, as text (``135MB``), bytes of the whole artefact.

    Every combination of ``budgets``, ``sparsities`` (pattern bitmap only) and ``bits`` (of the projections) is tried on
    every group alone, and measured by the divergence from the dense model that it causes on ``samples`` training
    samples; the recipe's own value stands where a list is not given. Where bytes of the artefact are given,
    ``linear_bits`` are tried on the linear layers outside the MLPs, those that read the same input together, and
    ``embedding_bits`` on the token table.
    """

    target: Annotated[float | str, AfterValidator(_target)]
    budgets: Annotated[list[Annotated[float, Field(gt=0.0, le=LARGEST_BUDGET)]], Field(min_length=1)] | None = None
    sparsities: Annotated[list[Fraction], Field(min_length=1)] | None = None
    bits: Annotated[list[OneWidth | list[Grade]], Field(min_length=1)] | None = None
    linear_bits: Annotated[list[LinearBits], Field(min_length=1)] | None = None
    embedding_bits: Annotated[list[EmbeddingBits], Field(min_length=1)] | None = None
    samples: Positive = 8

    @property
    def artifact_bytes(self) -> int | None:
        """Bytes that the whole artefact may have; None if the target is stored bits of the MLPs."""
        return parse_bytes(self.target) if isinstance(self.target, str) else None

    @property
    def stored_bits(self) -> float:
        """Stored bits per weight of the compressed MLPs, where the target is these."""
        assert not isinstance(self.target, str)
        return self.target

    @model_validator(mode="after")
    def _something_is_open(self) -> "Allocate":
        lists = ("budgets", "sparsities", "bits", "linear_bits", "embedding_bits")
        if all(getattr(self, key) is None for key in lists):
            raise ValueError(f"nothing to choose from; give {', '.join(lists[:-1])} or {lists[-1]}")
        for key in ("linear_bits", "embedding_bits"):
            if getattr(self, key) is not None and self.artifact_bytes is None:
                raise AtKeyError(
                    key,
                    f"target: {self.target} is stored bits of the MLPs, and this lies outside them; give the target as "
                    "bytes of the whole artefact (135MB), or leave this out",
                )
        for number, choice in enumerate(self.embedding_bits or []):
            _check_tiers(choice, f"embedding_bits.{number}")
        for number, bits in enumerate(self.bits or []):
            if isinstance(bits, list):
                try:
                    _check_grades(bits)
                except ValueError as error:
                    raise AtKeyError(f"bits.{number}", str(error)) from None
        return self


class Export(Section):
    """How the artefact is written.

    ``accuracy_level`` 0: float32 activations; 4: int8 activations where the kernels can use them. ``max_shard_size``:
    bytes of a file of weights at most.
    """

    accuracy_level: Literal[0, 4] = 0
    max_shard_size: Annotated[int, Field(ge=4096)] = 2_000_000_000


class Evaluation(Section):
    """How quality is measured.

    ``samples``: how many test samples (images, or windows of text), in order; all if not given.
    ``stride``: tokens between the starts of two windows, only the last of which count in each; by default a
    whole window."""

    samples: Positive | None = None
    batch_size: Positive = 64
    stride: Positive | None = None


class Calibration(Section):
    """What activations of the dense model are recorded on.

    ``samples``: how many training samples (images, or windows of text), drawn at random; all if not given.
    """

    samples: Positive | None = None
    batch_size: Positive = 64


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelSection
    data: DataSection
    vocabulary: VocabularySection | None = None
    calibration: Calibration = Calibration()
    compression: Compression
    fit: Fit | None = None
    finetune: EndToEnd | None = None
    quantization: Quantization
    allocate: Allocate | None = None
    export: Export = Export()
    evaluation: Evaluation = Evaluation()

    @property
    def is_language_model(self) -> bool:
        """Whether ``model`` is a language model; else it is an image classifier."""
        return isinstance(self.model, LanguageModelSection)

    @model_validator(mode="after")
    def _model_reads_data(self) -> "Recipe":
        is_text = isinstance(self.data, TextSection)
        if is_text != self.is_language_model:
            raise AtKeyError(
                "data.source",
                f"{self.data.source} is {'text' if is_text else 'images'}; model.source: {self.model.source} is "
                f"{'a language model' if self.is_language_model else 'an image classifier'}",
            )
        if not is_text and self.vocabulary is not None:
            raise AtKeyError("vocabulary", "is for language models; leave it out")
        rest = self.quantization.rest
        if not is_text and (rest.embedding_bits is not None or self.evaluation.stride is not None):
            key = "evaluation.stride" if rest.embedding_bits is None else "quantization.rest.embedding_bits"
            raise AtKeyError(key, "is for language models; leave it out")
        return self

    @model_validator(mode="after")
    def _method_has_its_parts(self) -> "Recipe":
        is_fips = self.compression.method == "fips"
        if is_fips != (self.quantization.basis is not None):
            said = "required key is missing" if is_fips else "compression.method dense has no basis; leave it out"
            raise AtKeyError("quantization.basis", said)
        if is_fips and self.fit is None and self.compression.pattern != "dense":
            pattern = self.compression.pattern
            said = f"required key is missing: with pattern {pattern}, projections become sparse in the fit"
            raise AtKeyError("fit", said)
        for key in ("fit", "finetune"):
            if not is_fips and getattr(self, key) is not None:
                raise AtKeyError(key, "trains unquantized factors; compression.method dense has none, leave it out")
        return self

    @model_validator(mode="after")
    def _allocation_has_its_parts(self) -> "Recipe":
        if self.allocate is None:
            return self
        if self.compression.method == "dense":
            raise AtKeyError("allocate", "method dense has no rank, sparsity or graded bits to choose; leave it out")
        if self.allocate.sparsities is not None and self.compression.pattern != "bitmap":
            pattern = self.compression.pattern
            raise AtKeyError("allocate.sparsities", f"pattern {pattern} fixes the sparsity; take pattern bitmap")
        for key in ("linear_bits", "embedding_bits"):
            if getattr(self.allocate, key) is not None and getattr(self.quantization.rest, key) is None:
                raise AtKeyError(
                    f"allocate.{key}",
                    f"chooses in the place of quantization.rest.{key}, which is not given; give that too, or leave "
                    "this out",
                )
        if self.quantization.target_stored_bits is not None:
            raise AtKeyError("allocate", "chooses the bits, and so does quantization: bits allocate; take one of them")
        return self

    @model_validator(mode="after")
    def _blocks_hold_whole_bytes(self) -> "Recipe":
        try:
            check_block_size(self.quantization.projections.block_size, Pattern.parse(self.compression.pattern))
        except ValueError as error:
            raise AtKeyError("quantization.projections", str(error)) from None
        return self
