"""The parts of a report that tasks and evaluation measure. They import no PyTorch, so that reading a report needs none.

Sizes are bytes, accuracies and shares fractions of 1.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Generic, Literal, Self, TypeVar, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.plumbing.records import Record

Stage = Literal["dense", "factorized", "fitted", "finetuned", "rounded", "qat", "onnx_native", "onnx_portable"]
"""Forms of the model in the order of a run. ``rounded``: the codes before any training of them, as
``quantization.start`` found them."""
STAGES: tuple[Stage, ...] = get_args(Stage)
FactorStage = Literal["factorized", "fitted", "finetuned"]
FACTOR_STAGES: tuple[FactorStage, ...] = get_args(FactorStage)
"""The stages with factors in floating point; method dense has none of them."""
TrainedStage = Literal[FactorStage, "rounded", "qat"]
TRAINED_STAGES: tuple[TrainedStage, ...] = get_args(TrainedStage)
"""The stages that change the MLPs; those after them store and run what QAT ended with."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]


# --- data ------------------------------------------------------------------------------------------------------


class Samples(Record):
    """The images of a run. ``hash``: SHA-256 of everything they can contain."""

    source: str
    hash: str
    train_samples: PositiveInt
    calibration_samples: PositiveInt
    test_samples: PositiveInt


class VocabularyCut(Record):
    """What a recipe left of a vocabulary: ``kept`` of its ``tokens``; ``respelled`` and ``respelled_in_test``: parts of
    the training text's tokens, and of the test text's, that are spelled in others."""

    tokens: PositiveInt
    kept: PositiveInt
    respelled: Share
    respelled_in_test: Share

    @model_validator(mode="after")
    def _fewer_are_kept(self) -> Self:
        if self.kept > self.tokens:
            raise ValueError(f"kept is {self.kept}, the vocabulary has {self.tokens} tokens")
        return self


class TextSamples(Samples):
    """The text of a run, in windows. ``context``: tokens of a window; the others: tokens in all. ``vocabulary``: how it
    was cut, if it was; test windows then have their number of tokens in the whole one."""

    context: PositiveInt
    train_tokens: PositiveInt
    calibration_tokens: PositiveInt
    test_tokens: PositiveInt
    vocabulary: VocabularyCut | None = None


# --- quality ---------------------------------------------------------------------------------------------------

_Value = TypeVar("_Value", bound=float)


class QualityByStage(Record, Generic[_Value]):
    """A number for each stage that the run had, on the same samples, with its standard error."""

    metric: str
    unit: str
    standard_error: dict[Stage, NonNegativeFloat]
    dense: _Value
    factorized: _Value | None = None
    fitted: _Value | None = None
    finetuned: _Value | None = None
    rounded: _Value | None = None
    qat: _Value
    onnx_native: _Value
    onnx_portable: _Value | None = None

    @property
    def by_stage(self) -> dict[Stage, _Value]:
        """The numbers of the stages that there are, in order."""
        return {stage: value for stage in STAGES if (value := getattr(self, stage)) is not None}

    @model_validator(mode="after")
    def _same_stages(self) -> Self:
        check_stages("standard_error", self.standard_error, self.by_stage)
        return self


def check_stages(name: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise ValueError if ``name`` has other stages than those that the quality says it should have."""
    if set(found) != set(expected):
        raise ValueError(f"{name} has the stages {sorted(found)}, quality has {sorted(expected)} for it")


class AccuracyByStage(QualityByStage[Share]):
    """Top-1 accuracy on ``samples`` images, with binomial standard errors."""

    metric: Literal["accuracy"]
    unit: Literal["fraction"]
    samples: PositiveInt


class PairedDifference(Record):
    """Difference of one model from another, window by window: of the mean negative log-likelihoods in nats a token,
    with its standard error over windows, and ``ratio`` of the perplexities, which is exp(``nll``)."""

    nll: float
    standard_error: NonNegativeFloat
    ratio: PositiveFloat

    @property
    def ratio_error(self) -> float:
        """Standard error of the ratio, to first order."""
        return self.ratio * self.standard_error


class PerplexityByFrequency(Record):
    """Perplexity of the frequent tokens of the training text, which together make up nine tenths of it, and of the rare
    ones: all others."""

    frequent: PositiveFloat
    rare: PositiveFloat


class PerplexityByStage(QualityByStage[PositiveFloat]):
    """Perplexity: exp of the mean negative log-likelihood of ``tokens`` tokens in ``windows`` windows of ``context``
    tokens, which start ``stride`` tokens apart. ``standard_error``: of the perplexity, over windows.

    Tokens are those of the dense model's vocabulary at every stage, also where the recipe cuts it and the text is
    spelled in more. ``bytes``: of the same text in UTF-8. ``frequent_tokens``: how many of the tokens are among the
    frequent ones of the training text; ``by_frequency`` is empty where the text has not both kinds.
    """

    metric: Literal["perplexity"]
    unit: Literal["perplexity"]
    tokens: PositiveInt
    context: PositiveInt
    stride: PositiveInt
    windows: PositiveInt
    bytes: PositiveInt
    bits_per_byte: dict[Stage, PositiveFloat]
    frequent_tokens: NonNegativeInt
    by_frequency: dict[Stage, PerplexityByFrequency]
    difference_to_dense: dict[Stage, PairedDifference]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        most = self.windows * self.context
        if self.frequent_tokens > self.tokens:
            raise ValueError(f"frequent_tokens is {self.frequent_tokens}, of {self.tokens} tokens")
        if self.tokens > most:
            raise ValueError(
                f"tokens is {self.tokens}, {self.windows} windows of {self.context} tokens have at most {most}"
            )
        if self.stride > self.context:
            raise ValueError(f"stride is {self.stride}, expected 1 to {self.context}, the context")
        check_stages("bits_per_byte", self.bits_per_byte, self.by_stage)
        check_stages("by_frequency", self.by_frequency, self.by_stage if self.by_frequency else ())
        check_stages("difference_to_dense", self.difference_to_dense, self.by_stage.keys() - {"dense"})
        for stage, difference in self.difference_to_dense.items():
            # Sums over windows in another order differ by rounding; anything more is another set of tokens.
            nats = math.log(difference.ratio), math.log(self.by_stage[stage]) - math.log(self.dense)
            if any(abs(value - difference.nll) > 1e-4 for value in nats):
                raise ValueError(
                    f"difference_to_dense.{stage}.nll is {difference.nll:.6g}, its ratio and the perplexities say "
                    f"{nats[0]:.6g} and {nats[1]:.6g}"
                )
        for stage, bits in self.bits_per_byte.items():
            expected = math.log2(self.by_stage[stage]) * self.tokens / self.bytes
            if abs(bits - expected) > 1e-4:
                raise ValueError(f"bits_per_byte.{stage} is {bits:.6g}, the perplexity says {expected:.6g}")
        return self


Quality = Annotated[AccuracyByStage | PerplexityByStage, Field(discriminator="metric")]


class ImageDivergence(Record):
    """Divergence of a model from the dense one: mean and 99th percentile over images of KL(dense ‖ model) in nats, and
    the share of images with the same top label."""

    kl_mean: NonNegativeFloat
    kl_p99: NonNegativeFloat
    same_top1: Share


class TextDivergence(Record):
    """Divergence of a model from the dense one, over predicted ``tokens``: mean and percentiles of KL(dense ‖ model) in
    nats, and the share of tokens for which both find the same next token most likely.

    Where the recipe cuts the vocabulary, the dense model's distribution is that over the tokens that are kept, and
    ``tokens`` are those that both models predict at the same place."""

    tokens: PositiveInt
    kl_mean: NonNegativeFloat
    kl_median: NonNegativeFloat
    kl_p90: NonNegativeFloat
    kl_p99: NonNegativeFloat
    kl_p999: NonNegativeFloat
    kl_max: NonNegativeFloat
    same_top1: Share

    @property
    def percentiles(self) -> tuple[float, ...]:
        """Median, 90 %, 99 %, 99.9 % and the largest."""
        return self.kl_median, self.kl_p90, self.kl_p99, self.kl_p999, self.kl_max

    @model_validator(mode="after")
    def _percentiles_rise(self) -> Self:
        if tuple(sorted(self.percentiles)) != self.percentiles:
            raise ValueError(f"kl_median, kl_p90, kl_p99, kl_p999 and kl_max do not rise: {self.percentiles}")
        return self


class LogitDifference(Record):
    """Largest difference of two sets of logits, absolute and relative to the largest logit."""

    max_abs: NonNegativeFloat
    relative: NonNegativeFloat


class Agreement(Record):
    """How far the three ways to run an artefact agree, with float32 activations; ``tolerance`` is for ``relative``.

    ``rounding``: what int8 activations change, where the artefact permits them.
    """

    native_vs_torch: LogitDifference
    portable_vs_torch: LogitDifference
    native_vs_portable: LogitDifference
    rounding: LogitDifference | None = None
    tolerance: PositiveFloat
    same_predictions: bool


# --- speed and memory ------------------------------------------------------------------------------------------

NATIVE = "artefact, native kernels"
"""Name of the backend that every speed is about, in the first of its rows."""


class ImageSpeedRow(Record):
    """Speed of one backend. The ratio is to the dense model at float32, None where that was left out."""

    backend: str
    images_per_second: PositiveFloat
    ratio_to_float32: PositiveFloat | None


class ImageSpeed(Record):
    """Speed on batches of ``batch`` images. ``rows``: the artefact with native kernels first. ``left_out``: why a
    baseline is not among them, by its name."""

    unit: Literal["images/s"]
    batch: PositiveInt
    threads: PositiveInt
    rows: Annotated[tuple[ImageSpeedRow, ...], Field(min_length=1)]
    left_out: dict[str, str] = Field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Images per second with native kernels."""
        return self.rows[0].images_per_second

    @property
    def ratio_to_dense(self) -> float | None:
        """Speed of native kernels relative to the dense model at float32, None where that was left out."""
        return self.rows[0].ratio_to_float32


class TokenSpeedRow(Record):
    """Speed of one backend. The ratios are to the same model exported at int4 by onnxruntime-genai's builder, None
    where that was left out.

    ``load_seconds``: of loading it in a new process. ``weight_bytes``: stored bytes of weights that one generated token
    needs (:func:`pipeline.evaluation.weights_read.weight_bytes_per_token`). ``read_fraction``: how long a plain read of
    so many bytes takes, as a fraction of the time that a generated token takes. All three are None where they are not
    known, as in reports of earlier versions.
    """

    backend: str
    prefill_tokens_per_second: PositiveFloat
    decode_tokens_per_second: PositiveFloat
    prefill_ratio_to_int4: PositiveFloat | None
    decode_ratio_to_int4: PositiveFloat | None
    load_seconds: PositiveFloat | None = None
    weight_bytes: PositiveInt | None = None
    read_fraction: PositiveFloat | None = None


class TokenSpeed(Record):
    """Speed on a prompt of ``prompt_tokens``, then ``generated_tokens`` one by one. ``rows``: the artefact with native
    kernels first. ``left_out``: why a baseline, or what loading it takes, is not among them, by its name.
    ``read_bytes_per_second``: of a plain read loop over as many bytes as a token of the artefact needs, on as many
    threads."""

    unit: Literal["tokens/s"]
    prompt_tokens: PositiveInt
    generated_tokens: PositiveInt
    threads: PositiveInt
    rows: Annotated[tuple[TokenSpeedRow, ...], Field(min_length=1)]
    left_out: dict[str, str] = Field(default_factory=dict)
    read_bytes_per_second: PositiveFloat | None = None

    @property
    def rate(self) -> float:
        """Tokens per second of decoding with native kernels."""
        return self.rows[0].decode_tokens_per_second

    @property
    def ratio_to_dense(self) -> float | None:
        """Speed of decoding with native kernels relative to the dense model at int4, None where that was left out."""
        return self.rows[0].decode_ratio_to_int4


Speed = Annotated[ImageSpeed | TokenSpeed, Field(discriminator="unit")]


class ArtifactMemory(Record):
    """Resident memory of a process that has loaded the artefact, and the largest of one that runs it.

    ``load_rss_by_backend``: backend of a row of the speed → by how much loading it raises the resident memory of a
    process that has imported onnxruntime-genai, which takes ``base_rss_bytes`` before. ``run_rss_by_backend``: the same
    once it has generated tokens, when all weights that are mapped from files have been read.
    """

    load_rss_bytes: int
    peak_rss_bytes: PositiveInt
    load_rss_by_backend: dict[str, int] | None = None
    run_rss_by_backend: dict[str, int] | None = None
    base_rss_bytes: PositiveInt | None = None


class Benchmark(Record):
    """How fast the artefact runs, beside the dense model, and the memory that it takes."""

    speed: Speed
    memory: ArtifactMemory
