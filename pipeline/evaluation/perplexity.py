"""Quality of a language model on windows of text: perplexity, bits per byte, and divergence from the dense model.

Perplexities count tokens of the full vocabulary, also those of a model whose own vocabulary is a part of it and spells
the text in more tokens: the probability of a text is that of the tokens it is spelled in, so that the same text has one
negative log-likelihood under each model, and one number of tokens divides them all.

One evaluator for every form of a model, PyTorch or ONNX Runtime. Logits over a vocabulary of 262,144 take half a
gigabyte for a window of 512 tokens, so no more than one batch of them is ever there, and what is computed from them
is computed for a chunk of tokens at a time. The dense model's logits are not kept either, but its final hidden states
are (a few kilobytes per token), from which its output layer makes them again when another model is compared.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from pipeline.data.text import TextSplit, TextWindows
from pipeline.evaluation.measurements import PairedDifference, TextDivergence
from pipeline.models.causal_lm_parts import OutputLayer, hidden_states
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import create_array, read_json, write_aside, write_json, writing
from pipeline.plumbing.progress import OnProgress

HIDDEN_STATES = "hidden_states.npy"
_CHUNK_LOGITS = 1 << 24
"""Logits that are worked on at a time: 64 MB in float32, of which a few copies exist at once."""


class Logits(Protocol):
    """Logits [B, T, vocabulary] of a batch: a tensor, or something that makes slices ``[window, start:stop]``."""

    def __getitem__(self, index: tuple[int, slice], /) -> Tensor: ...


@dataclass(frozen=True)
class Perplexity:
    """Perplexity is exp(``nll``), the negative log-likelihood of a text in nats for each of its ``tokens``.

    Tokens are those of the full vocabulary, everywhere here. ``standard_error`` is that of ``nll``, over windows:
    tokens of a window are not independent. ``bytes``: of UTF-8, of the predicted text. ``context``: tokens of a window;
    ``stride``: tokens between the starts of two. ``text``: SHA-256 of the text's token ids. ``frequent_nll``,
    ``frequent_tokens``: the sum, and the number, of those among the frequent tokens of the training text.
    ``window_nll`` float64 [windows] and ``window_tokens`` int64 [windows]: sum and number of what each window counts.
    """

    perplexity: float
    nll: float
    standard_error: float
    tokens: int
    bytes: int
    frequent_nll: float
    frequent_tokens: int
    context: int
    stride: int
    text: str
    window_nll: Tensor
    window_tokens: Tensor
    divergence: TextDivergence | None = None

    @property
    def perplexity_error(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.standard_error

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood of the text in bits for each of its bytes, whatever the tokens."""
        return self.nll * self.tokens / (math.log(2) * self.bytes)

    @property
    def by_frequency(self) -> tuple[float, float] | None:
        """Perplexity of the frequent tokens of the training text and of all others; None if there are not both."""
        rare = self.tokens - self.frequent_tokens
        if not rare or not self.frequent_tokens:
            return None
        rare_nll = self.nll * self.tokens - self.frequent_nll
        return _exp(self.frequent_nll / self.frequent_tokens), _exp(rare_nll / rare)


# --- evaluation ------------------------------------------------------------------------------------------------


def evaluate_perplexity(
    logits_of: Callable[[Tensor], Logits],
    windows: TextWindows,
    batch_size: int,
    stride: int | None = None,
    progress: OnProgress | None = None,
    reference: "DenseReference | None" = None,
) -> Perplexity:
    """Measure the perplexity of ``logits_of`` (token ids int64 [B, T] → logits [B, T, vocabulary]) on all ``windows``.

    With a ``stride`` the windows overlap and each counts its last ``stride`` tokens only, so that most are predicted
    from a longer past; by default they lie side by side. With a ``reference`` the result has the divergence from it.
    Raises InputError for logits that are not finite, a stride that does not fit, and text that is too short for a
    standard error.
    """
    windows = windows.strided(stride)
    check_windows(windows)
    sizes, predicted, counted = windows.sizes(), windows.predicted(), windows.counted()
    sums = torch.zeros(len(windows), dtype=torch.float64)
    frequent = torch.zeros((), dtype=torch.float64)
    comparison = _Comparison(reference, counted) if reference is not None else None
    chunk_size = 0
    for first in range(0, len(windows), batch_size):
        indices = range(first, min(first + batch_size, len(windows)))
        input_ids = windows.batch(indices)
        with torch.no_grad():
            logits = logits_of(input_ids)
            chunk_size = chunk_size or max(1, _CHUNK_LOGITS // logits[0, slice(0, 1)].shape[-1])
            for row, window in enumerate(indices):
                expected, done = windows.targets(window), 0
                for positions in _chunks(int(sizes[window]), int(predicted[window]), chunk_size):
                    chunk = logits[row, positions].float()
                    maximum, total = _exponential_sum(chunk)
                    normalizer = maximum.double() + total.double().log()
                    if not torch.isfinite(normalizer).all() or not torch.isfinite(chunk.amin()):
                        raise InputError(
                            f"the logits of test window {window} are not finite: the weights or activations overflow, "
                            "or training diverged (try a lower learning_rate)"
                        )
                    targets = input_ids[row, positions.start + 1 : positions.stop + 1]
                    chosen = chunk.gather(1, targets[:, None])[:, 0].double()
                    losses = normalizer - chosen
                    here = slice(done, done + len(targets))
                    sums[window] += losses.sum()
                    frequent += losses[expected.frequent[here]].sum()
                    if comparison is not None:
                        comparison.add(window, expected.full[here], chunk, normalizer)
                    done += len(targets)
        if progress is not None:
            so_far = sums[: indices.stop].sum() / counted[: indices.stop].sum()
            progress(indices.stop, len(windows), f"perplexity {_exp(float(so_far)):.3f}")
    return _summarize(sums, float(frequent), windows, comparison.result() if comparison is not None else None)


def paired_difference(model: Perplexity, baseline: Perplexity) -> PairedDifference:
    """Compare how well ``model`` and ``baseline`` predict the same text; a positive difference means that ``model`` is
    worse.

    The error is that of the differences window by window, far below that of either value: a window that is hard for
    one model is hard for the other. Raises ValueError when the texts, windows or strides are not the same.
    """
    for name in ("text", "context", "stride"):
        if getattr(model, name) != getattr(baseline, name):
            raise ValueError(f"{name} {getattr(model, name)} against {getattr(baseline, name)}: not comparable")
    difference, error = _ratio_of_sums(
        model.window_nll - baseline.window_nll, model.window_tokens, _correlated_windows(model.context, model.stride)
    )
    return PairedDifference(nll=difference, standard_error=error, ratio=_exp(difference))


def check_windows(windows: TextWindows) -> None:
    """Raise InputError when there are too few windows for a standard error."""
    if len(windows) <= _correlated_windows(windows.context, windows.step):
        raise InputError(
            f"evaluation: {len(windows)} windows are too few for a standard error; evaluation.samples should be at "
            "least 2, and the test text long enough for them"
        )


def _chunks(context: int, count: int, size: int) -> Iterator[slice]:
    """Yield the positions whose logits predict the last ``count`` tokens of a window, at most ``size`` at a time."""
    stop = context - 1
    for start in range(stop - count, stop, size):
        yield slice(start, min(start + size, stop))


def _exponential_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum m and Σ exp(logit - m) over the last axis, float32 [tokens] each."""
    maximum = logits.amax(dim=-1)
    return maximum, (logits - maximum[:, None]).exp_().sum(dim=-1)


def _summarize(sums: Tensor, frequent: float, windows: TextWindows, divergence: TextDivergence | None) -> Perplexity:
    counts = windows.counted()
    nll, error = _ratio_of_sums(sums, counts, _correlated_windows(windows.context, windows.step))
    return Perplexity(
        perplexity=_exp(nll),
        nll=nll,
        standard_error=error,
        tokens=int(counts.sum()),
        bytes=windows.counted_bytes(),
        frequent_nll=frequent,
        frequent_tokens=windows.counted_frequent(),
        context=windows.context,
        stride=windows.step,
        text=windows.text,
        window_nll=sums,
        window_tokens=counts,
        divergence=divergence,
    )


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:  # of a model far worse than one that knows nothing
        return math.inf


def _correlated_windows(context: int, stride: int) -> int:
    """Count the consecutive windows that see the same text: overlapping ones are no independent samples."""
    return max(1, math.ceil((context - 1) / stride))


def _ratio_of_sums(sums: Tensor, counts: Tensor, grouped: int) -> tuple[float, float]:
    """Compute ``Σ sums / Σ counts`` and its standard error as a ratio estimator, from ``grouped`` windows together.

    With samples s_i and n_i of G groups and r = Σs/Σn: error² = G/(G-1) Σ(s_i - r n_i)² / (Σn)².
    """
    total = float(counts.sum())
    ratio = float(sums.sum()) / total
    groups = [(float(s.sum()), int(n.sum())) for s, n in zip(sums.split(grouped), counts.split(grouped), strict=True)]
    squares = sum((s - ratio * n) ** 2 for s, n in groups)
    return ratio, math.sqrt(len(groups) / (len(groups) - 1) * squares) / total


# --- PyTorch models --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LazyLogits:
    """Logits [B, T, vocabulary] that are made from ``hidden`` [B, T, d] when they are asked for."""

    hidden: Tensor
    output_layer: OutputLayer

    def __getitem__(self, index: tuple[int, slice], /) -> Tensor:
        return self.output_layer(self.hidden[index])


def lazy_logits(model: Any) -> Callable[[Tensor], LazyLogits]:
    """Turn a PyTorch causal language model into ``logits_of`` of :func:`evaluate_perplexity`, with logits made in
    chunks."""
    output_layer = OutputLayer(model)
    return lambda input_ids: LazyLogits(hidden_states(model, input_ids), output_layer)


# --- dense reference -------------------------------------------------------------------------------------------


def evaluate_dense(
    model: Any,
    windows: TextSplit,
    batch_size: int,
    stride: int | None,
    folder: Path,
    progress: OnProgress | None = None,
) -> Perplexity:
    """Measure the perplexity of the dense PyTorch model and leave its final hidden states in ``folder`` for
    :class:`DenseReference`: float32 [predicted tokens, d], in the order of evaluation.

    Raises InputError as :func:`evaluate_perplexity` does, and where the disk has no room for the states.
    """
    strided = windows.strided(stride)
    counts = strided.predicted()
    output_layer = OutputLayer(model)
    path = folder / HIDDEN_STATES
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        states = create_array(temporary, (int(counts.sum()), model.config.hidden_size))
    written = window = 0

    def logits_of(input_ids: Tensor) -> LazyLogits:
        nonlocal written, window
        hidden = hidden_states(model, input_ids)
        for row in hidden:
            count = int(counts[window])
            states[written : written + count] = row[-1 - count : -1].float().numpy()
            written, window = written + count, window + 1
        return LazyLogits(hidden, output_layer)

    try:
        quality = evaluate_perplexity(logits_of, windows, batch_size, stride, progress)
        assert written == len(states)
        with writing(path):
            states.flush()
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return quality


class DenseReference:
    """The dense model's logits on the windows of :func:`evaluate_dense`, made again a chunk at a time.

    ``folder``: where that function left the hidden states. ``model``: the dense model, of which only the output layer
    is used; one with the rows of a part of the vocabulary gives the distribution over this part.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self._states = np.load(folder / HIDDEN_STATES, mmap_mode="r")
        self._output_layer = OutputLayer(model)

    def __len__(self) -> int:
        return int(self._states.shape[0])

    def logits(self, tokens: Tensor) -> Tensor:
        """Make the logits float32 [n, vocabulary] of predicted ``tokens``, by their number in the order of evaluation,
        int64 [n]."""
        return self._output_layer(torch.from_numpy(self._states[tokens.numpy()]))


class _Comparison:
    """KL(dense ‖ model) of every predicted token, and whether both have the same most likely one. Where the model's
    token is not the same as the dense one's at the same place in the text, there is nothing to compare."""

    def __init__(self, reference: DenseReference, counted: Tensor) -> None:
        """``counted``: how many tokens of the dense model each window counts, int64 [windows]."""
        if len(reference) != int(counted.sum()):
            raise ValueError(f"{int(counted.sum())} tokens are compared with {len(reference)} of the dense model")
        self._reference = reference
        self._before = counted.cumsum(0) - counted
        self._kl: list[Tensor] = []
        self._same: list[Tensor] = []

    def add(self, window: int, places: Tensor, logits: Tensor, normalizer: Tensor) -> None:
        """Compare ``logits`` float32 [n, vocabulary] of tokens of ``window`` with the dense model's.

        ``places``: which of the window's tokens of the dense model each is, int64 [n], -1 if none. ``normalizer``
        float64 [n]: the logarithm of the sum of the logits' exponentials.
        """
        comparable = places >= 0
        if not comparable.any():
            return
        dense = self._reference.logits(self._before[window] + places[comparable])
        if not comparable.all():
            logits, normalizer = logits[comparable], normalizer[comparable]
        self._same.append(dense.argmax(dim=-1) == logits.argmax(dim=-1))
        # Σ p (log p - log q) with log p = dense - log Σ exp(dense), and the same for q. Means of differences of
        # logits lose less in float32 than differences of logarithms of probabilities.
        difference = dense - logits
        maximum = dense.amax(dim=-1)
        weights = dense.sub_(maximum[:, None]).exp_()
        total = weights.sum(dim=-1)
        dense_normalizer = maximum.double() + total.double().log()
        mean = difference.mul_(weights).sum(dim=-1).double() / total.double()
        self._kl.append((mean - (dense_normalizer - normalizer)).clamp(min=0.0))

    def result(self) -> TextDivergence:
        kl, same = torch.cat(self._kl), torch.cat(self._same)
        median, p90, p99, p999 = (float(value) for value in np.quantile(kl.numpy(), [0.5, 0.9, 0.99, 0.999]))
        return TextDivergence(
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_median=median,
            kl_p90=p90,
            kl_p99=p99,
            kl_p999=p999,
            kl_max=float(kl.max()),
            same_top1=float(same.double().mean()),
        )


# --- files -----------------------------------------------------------------------------------------------------


def save_perplexity(quality: Perplexity, folder: Path) -> None:
    """Write ``perplexity.json`` and what each window counts beside it into ``folder``."""
    tensors = {"nll": quality.window_nll.numpy(), "tokens": quality.window_tokens.numpy()}
    fields = {key: value for key, value in vars(quality).items() if key not in ("window_nll", "window_tokens")}
    divergence = None if quality.divergence is None else quality.divergence.model_dump()
    write_aside(folder / "windows.safetensors", lambda path: save_file(tensors, path))
    write_json(folder / "perplexity.json", {**fields, "divergence": divergence})


def load_perplexity(folder: Path) -> Perplexity:
    """Read what :func:`save_perplexity` has written into ``folder``."""
    tensors = {key: torch.from_numpy(value) for key, value in load_file(folder / "windows.safetensors").items()}
    fields = read_json(folder / "perplexity.json")
    divergence = fields.pop("divergence")
    return Perplexity(
        **fields,
        window_nll=tensors["nll"],
        window_tokens=tensors["tokens"],
        divergence=None if divergence is None else TextDivergence(**divergence),
    )
