"""Losses of a language model from final hidden states, without whole logits: cross-entropy and distillation.

A batch of 2,048 tokens over Gemma's vocabulary of 262,144 would take 2 GB of logits per model. Logits are therefore
made for a chunk of tokens at a time, and again in the backward pass.

Cross-entropy is exact, over the whole vocabulary. Distillation compares two models, and most of a vocabulary never
occurs in the text at hand, so it compares them on a part: the tokens most frequent in the training text, each as it
is, and a random sample of all others, drawn anew at each step, each standing for as many as it was drawn from (its
logit raised by the logarithm of their number per sample; importance sampling of the partition function, as in sampled
softmax, Jean et al., arXiv 1412.2007).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 24
"""Logits over the whole vocabulary that are made at a time: those of 64 tokens of Gemma's. Chunks of 128 or 512 tokens
were no faster."""
FREQUENT = 12_288
"""Tokens that are compared at every step of distillation."""
SAMPLED = 4_096
"""Tokens drawn from all others at each step."""
CHUNK_TOKENS = 512
"""Tokens that are compared at a time, on a part of the vocabulary."""


def next_token_loss(hidden: Tensor, targets: Tensor, table: Tensor, softcap: float | None = None) -> Tensor:
    """Mean over tokens of the cross-entropy of the next token, in nats.

    ``hidden``: final hidden states [tokens, d]; ``targets``: the id that follows each, int64 [tokens]; ``table``: all
    rows of the output layer [vocabulary, d]; the product is computed in its dtype, the rest in float32. ``softcap``:
    Gemma 2's bound of the logits. Memory, whatever the number of tokens: ``CHUNK_LOGITS`` in float32, 64 MiB, three
    to five times over; Gemma's vocabulary took 280 MiB, with a soft cap 345 MiB.
    """

    def cross_entropy(states: Tensor, following: Tensor) -> Tensor:
        return F.cross_entropy(_logits(states, table, softcap), following, reduction="sum")

    tokens_at_once = max(1, CHUNK_LOGITS // len(table))
    return _sum_over_chunks(cross_entropy, hidden, targets, tokens_at_once) / len(hidden)


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of a vocabulary, int64, in two parts: the ``frequent`` ones, which enter every divergence, and the
    ``others``, of which a sample does."""

    frequent: Tensor
    others: Tensor

    @staticmethod
    def of(counts: Tensor) -> "Vocabulary":
        """Divide a vocabulary by the occurrences of each token id in the training text, int64 [vocabulary]."""
        order = torch.argsort(counts, descending=True, stable=True)
        if len(order) <= FREQUENT + SAMPLED:
            return Vocabulary(order, order[:0])
        return Vocabulary(order[:FREQUENT], order[FREQUENT:])

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the part of one step: (ids int64 [n], logit offsets float32 [n])."""
        if not len(self.others):
            return self.frequent, torch.zeros(len(self.frequent))
        drawn = self.others[torch.randperm(len(self.others), generator=generator)[:SAMPLED]]
        weight = math.log(len(self.others) / SAMPLED)
        offsets = torch.cat([torch.zeros(len(self.frequent)), torch.full((SAMPLED,), weight)])
        return torch.cat([self.frequent, drawn]), offsets


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    student_table: Tensor,
    teacher_table: Tensor,
    offsets: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student) in nats.

    ``student``, ``teacher``: final hidden states [tokens, d]; the tables: rows of the output layers for the chosen part
    of the vocabulary [n, d]; products are computed in the tables' dtype, the rest in float32. ``softcap``: Gemma 2's
    bound of the logits. ``offsets``: of :meth:`Vocabulary.sample`. Memory: the logits of ``CHUNK_TOKENS`` tokens over
    that part, a few times over: 32 MiB each in float32 where the vocabulary is large.
    """

    def divergence(hidden: Tensor, target: Tensor) -> Tensor:
        q = torch.log_softmax(_logits(hidden, student_table, softcap) + offsets, dim=1)
        with torch.no_grad():
            p = torch.log_softmax(_logits(target, teacher_table, softcap) + offsets, dim=1)
        return F.kl_div(q, p, log_target=True, reduction="sum")

    return _sum_over_chunks(divergence, student, teacher, CHUNK_TOKENS) / len(student)


def _logits(hidden: Tensor, table: Tensor, softcap: float | None) -> Tensor:
    """Logits float32 [tokens, n] of hidden states [tokens, d] by the rows [n, d] of an output layer."""
    logits = (hidden.to(table.dtype) @ table.T).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _sum_over_chunks(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, other: Tensor, size: int) -> Tensor:
    """Sum of ``loss`` over chunks of ``size`` rows of both tensors; the backward pass computes each chunk again."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk in zip(hidden.split(size), other.split(size), strict=True):
        part = checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(part, Tensor)
        total = total + part
    return total
