"""Distillation of a language model: KL divergence of next-token distributions without whole logits.

A batch of 2,048 tokens over Gemma's vocabulary of 262,144 would take 2 GB of logits per model, most of it for
tokens that never occur in the text at hand. Both distributions are therefore compared on a part of the
vocabulary: the tokens most frequent in the training text, each as it is, and a random sample of all others, drawn
anew at each step, each standing for as many as it was drawn from (its logit raised by the logarithm of their
number per sample; importance sampling of the partition function, as in sampled softmax, Jean et al., arXiv
1412.2007). Memory: a chunk of tokens times that part.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

FREQUENT = 12_288
SAMPLED = 4_096
CHUNK = 512


@dataclass(frozen=True)
class Vocabulary:
    """Token ids by how they enter the divergence: all ``frequent`` ones, a sample of the ``others``; int64."""

    frequent: Tensor
    others: Tensor

    @staticmethod
    def of(counts: Tensor) -> "Vocabulary":
        """From the occurrences of each token id in the training text, int64 [vocabulary]."""
        order = torch.argsort(counts, descending=True, stable=True)
        if len(order) <= FREQUENT + SAMPLED:
            return Vocabulary(order, order[:0])
        return Vocabulary(order[:FREQUENT], order[FREQUENT:])

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(ids int64 [n], logit offsets float32 [n]) of one step."""
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

    ``student``, ``teacher``: final hidden states [tokens, d]; the tables: rows of the output layers for the
    chosen part of the vocabulary [n, d]; products are computed in the tables' dtype, the rest in float32. ``softcap``:
    Gemma 2's bound of the logits. ``offsets``: of :meth:`Vocabulary.sample`. Logits of one chunk of tokens at a time
    are held, in the backward pass too (they are computed again).
    """

    def divergence(hidden: Tensor, target: Tensor) -> Tensor:
        q = _log_probabilities(hidden, student_table, offsets, softcap)
        with torch.no_grad():
            p = _log_probabilities(target, teacher_table, offsets, softcap)
        return F.kl_div(q, p, log_target=True, reduction="sum")

    total = student.new_zeros((), dtype=torch.float32)
    for hidden, target in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
        part = checkpoint(divergence, hidden, target, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(part, Tensor)
        total = total + part
    return total / len(student)


def _log_probabilities(hidden: Tensor, table: Tensor, offsets: Tensor, softcap: float | None) -> Tensor:
    logits = (hidden.to(table.dtype) @ table.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits + offsets, dim=1)
