"""The two measures of quality in words and numbers: accuracy, where higher is better, and perplexity, where lower is.

Both classes answer the same questions, so that sections and plots are written once. Accuracies are told apart by
differences in points, perplexities by ratios, because a loss in nats is the logarithm of one.
"""

from dataclasses import dataclass

from pipeline.evaluation.measurements import AccuracyByStage, PerplexityByStage, Stage
from pipeline.report.schema import Report
from pipeline.report.units import (
    accuracy_decimals,
    format_percent,
    format_perplexity,
    format_points,
    format_ratio,
)


@dataclass(frozen=True)
class AccuracyMeasure:
    """Accuracy on images; differences are in percentage points."""

    quality: AccuracyByStage

    name = "accuracy"
    better = "higher is better"
    header = (
        "accuracy",
        "standard error (points)",
        "change from the stage before (points)",
        "change from dense (points)",
    )

    @property
    def _decimals(self) -> int:
        return accuracy_decimals(self.quality.samples)

    @property
    def extent(self) -> str:
        return f"{self.quality.samples:,} test samples"

    @property
    def note(self) -> str:
        return (
            f"Top-1 accuracy, higher is better, on the same {self.extent} at every stage. The standard error is that "
            "of one accuracy."
        )

    def value(self, stage: Stage) -> str:
        return format_percent(self.quality.by_stage[stage], self._decimals)

    def error(self, stage: Stage) -> str:
        return f"{100 * self.quality.standard_error[stage]:.{self._decimals}f}"

    def measured(self, stage: Stage) -> str:
        """Value and standard error."""
        return f"{100 * self.quality.by_stage[stage]:.{self._decimals}f} ± {self.error(stage)} %"

    def context(self, stage: Stage) -> str:
        """Say what to know beside the value."""
        return f"±{self.error(stage)} points; dense: {self.value('dense')}"

    def change(self, stage: Stage, since: Stage) -> str:
        return f"{self._points(stage, since)} points"

    def against_dense(self, stage: Stage) -> str:
        """The difference to the dense model beside the standard error it was measured with."""
        difference = self.quality.by_stage[stage] - self.quality.dense
        within = abs(difference) <= self.quality.standard_error[stage]
        return (
            f"{self.change(stage, 'dense')} against the dense model, "
            f"{'within' if within else 'more than'} one standard error (±{self.error(stage)} points)"
        )

    def cells(self, stage: Stage, before: Stage | None) -> tuple[str, str, str, str]:
        """Fill the columns of :attr:`header`; ``before`` is the stage that ``stage`` started from."""
        changes = ("–", "–") if before is None else (self._points(stage, before), self._points(stage, "dense"))
        return self.value(stage), f"±{self.error(stage)}", *changes

    def _points(self, stage: Stage, since: Stage) -> str:
        return format_points(self.quality.by_stage[stage] - self.quality.by_stage[since], self._decimals)


@dataclass(frozen=True)
class PerplexityMeasure:
    """Perplexity of language models; differences are ratios, those to the dense model paired over windows."""

    quality: PerplexityByStage

    name = "perplexity"
    better = "lower is better"
    header = ("perplexity", "standard error", "× the stage before", "× dense (paired)")

    @property
    def extent(self) -> str:
        quality = self.quality
        return (
            f"{quality.tokens:,} tokens in {quality.windows:,} windows (context {quality.context:,}, "
            f"stride {quality.stride:,})"
        )

    @property
    def note(self) -> str:
        return (
            f"Perplexity, lower is better, over the same {self.extent} at every stage. Its standard error is that of "
            "one perplexity; the ratio to dense is more precise, because both models are compared window by window."
        )

    def value(self, stage: Stage) -> str:
        return format_perplexity(self.quality.by_stage[stage], self.quality.standard_error[stage])[0]

    def error(self, stage: Stage) -> str:
        return format_perplexity(self.quality.by_stage[stage], self.quality.standard_error[stage])[1]

    def measured(self, stage: Stage) -> str:
        """Value, standard error and, if not dense itself, the ratio to dense."""
        text = f"{self.value(stage)} ± {self.error(stage)}"
        return text if stage == "dense" else f"{text} ({self._times(stage, 'dense')} × dense)"

    def context(self, stage: Stage) -> str:
        """Say what to know beside the value."""
        return f"±{self.error(stage)}; {self._times(stage, 'dense')} × dense ({self.value('dense')})"

    def change(self, stage: Stage, since: Stage) -> str:
        return f"× {self._times(stage, since)}"

    def against_dense(self, stage: Stage) -> str:
        """The ratio to the dense model beside the standard error it was measured with."""
        difference = self.quality.difference_to_dense[stage]
        within = abs(difference.nll) <= difference.standard_error
        direction = "worse" if difference.nll > 0 else "better"
        return f"{self._ratio(stage)} times the dense model's perplexity (paired over windows), " + (
            "within one standard error of equal" if within else f"more than one standard error {direction}"
        )

    def cells(self, stage: Stage, before: Stage | None) -> tuple[str, str, str, str]:
        """Fill the columns of :attr:`header`; ``before`` is the stage that ``stage`` started from."""
        changes = ("–", "–") if before is None else (self._times(stage, before), self._ratio(stage))
        return self.value(stage), f"±{self.error(stage)}", *changes

    def _times(self, stage: Stage, since: Stage) -> str:
        return format_ratio(self.quality.by_stage[stage] / self.quality.by_stage[since])

    def _ratio(self, stage: Stage) -> str:
        """The paired ratio to dense with its standard error."""
        difference = self.quality.difference_to_dense[stage]
        return format_ratio(difference.ratio, difference.ratio_error)


Measure = AccuracyMeasure | PerplexityMeasure


def measure_of(report: Report) -> Measure:
    quality = report.quality
    return PerplexityMeasure(quality) if isinstance(quality, PerplexityByStage) else AccuracyMeasure(quality)
