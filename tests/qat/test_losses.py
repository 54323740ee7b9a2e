"""Losses without whole logits against those of whole logits: cross-entropy, and the divergence on a part of the
vocabulary."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat import losses
from qat.losses import Vocabulary, distillation_loss, next_token_loss

TOKENS, WIDTH, ENTRIES = 40, 16, 300


def states(seed: int) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def table(seed: int) -> Tensor:
    """Rows of an output layer, the first ones larger, as those of frequent tokens are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ENTRIES, WIDTH, generator=generator) * torch.linspace(0.6, 0.15, ENTRIES)[:, None]


def targets() -> Tensor:
    return torch.randint(0, ENTRIES, (TOKENS,), generator=torch.Generator().manual_seed(6))


def exact(student: Tensor, teacher: Tensor, tables: tuple[Tensor, Tensor], softcap: float | None = None) -> Tensor:
    """KL(teacher ‖ student), mean over tokens, from whole logits."""
    logits = [hidden @ rows.T for hidden, rows in zip((student, teacher), tables, strict=True)]
    if softcap is not None:
        logits = [softcap * torch.tanh(part / softcap) for part in logits]
    q, p = (torch.log_softmax(part, dim=1) for part in logits)
    return (p.exp() * (p - q)).sum(dim=1).mean()


# --- cross-entropy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
# In logits: less than one token's, one token's, seven tokens', all but one, all, more than all.
@pytest.mark.parametrize("chunk", [1, ENTRIES, 7 * ENTRIES + 5, (TOKENS - 1) * ENTRIES, TOKENS * ENTRIES, 1 << 24])
def test_cross_entropy_is_that_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, chunk: int, softcap: float | None
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    hidden, expected_hidden = states(4).requires_grad_(), states(4).requires_grad_()
    loss = next_token_loss(hidden, targets(), table(1), softcap)
    logits = expected_hidden @ table(1).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, expected_hidden)[0], rtol=1e-5, atol=1e-8)


def test_cross_entropy_by_hand() -> None:
    """Logits log 1, log 2, log 5 of the three ids: their probabilities are 1/8, 1/4 and 5/8."""
    rows = torch.tensor([[1.0], [2.0], [5.0]]).log()
    loss = next_token_loss(torch.ones(4, 1), torch.tensor([0, 1, 2, 2]), rows)
    assert float(loss) == pytest.approx((math.log(8) + math.log(4) + 2 * math.log(8 / 5)) / 4, rel=1e-6)


def test_cross_entropy_with_a_table_in_bfloat16_is_close() -> None:
    loss = next_token_loss(states(4), targets(), table(1).bfloat16())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(next_token_loss(states(4), targets(), table(1))), rel=0.01)
    assert float(loss) != float(next_token_loss(states(4), targets(), table(1)))


def test_logits_of_one_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made in the forward pass and again in the backward pass, for which none are kept."""
    made: list[int] = []
    kept: list[torch.Size] = []
    make = losses._logits

    def record(hidden: Tensor, rows: Tensor, softcap: float | None) -> Tensor:
        made.append(len(hidden) * len(rows))
        return make(hidden, rows, softcap)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    monkeypatch.setattr(losses, "_logits", record)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 9 * ENTRIES)
    hidden = states(4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(hidden, targets(), table(1))
    assert made == [9 * ENTRIES] * 4 + [4 * ENTRIES]
    assert all(ENTRIES not in shape for shape in kept)
    loss.backward()
    assert sorted(made) == sorted(2 * ([9 * ENTRIES] * 4 + [4 * ENTRIES]))


# --- divergence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_whole_vocabulary_gives_the_divergence_and_its_gradient(softcap: float | None) -> None:
    tables = table(1), table(2)
    vocabulary = Vocabulary.of(torch.randint(0, 9, (ENTRIES,), generator=torch.Generator().manual_seed(3)))
    ids, offsets = vocabulary.sample(torch.Generator())
    assert sorted(ids.tolist()) == list(range(ENTRIES))
    assert torch.equal(offsets, torch.zeros(ENTRIES))
    student, teacher = states(4).requires_grad_(), states(5)
    loss = distillation_loss(student, teacher, tables[0][ids], tables[1][ids], offsets, softcap)
    expected_student = states(4).requires_grad_()
    expected = exact(expected_student, teacher, tables, softcap)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, expected_student)[0], rtol=1e-4, atol=1e-7)


def test_no_divergence_from_itself() -> None:
    student = states(0).requires_grad_()
    loss = distillation_loss(student, states(0), table(1), table(1), torch.zeros(ENTRIES))
    assert abs(float(loss.detach())) < 1e-6
    assert float(torch.autograd.grad(loss, student)[0].abs().max()) < 1e-6


@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 3 * TOKENS])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        student = states(4).requires_grad_()
        loss = distillation_loss(student, states(5), table(1), table(2), torch.zeros(ENTRIES), 5.0)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    expected = loss_and_gradient()
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    for actual, value in zip(loss_and_gradient(), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-8)


def test_tables_in_bfloat16_are_close() -> None:
    tables = table(1), table(2)
    loss = distillation_loss(
        states(4), states(5), tables[0].bfloat16(), tables[1].bfloat16(), torch.zeros(ENTRIES)
    )
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact(states(4), states(5), tables)), rel=0.02)


# --- a part of the vocabulary ----------------------------------------------------------------------------------


@pytest.fixture
def small_part(monkeypatch: pytest.MonkeyPatch) -> Vocabulary:
    """40 frequent tokens, the first; 60 of the 260 others are drawn at each step."""
    monkeypatch.setattr(losses, "FREQUENT", 40)
    monkeypatch.setattr(losses, "SAMPLED", 60)
    return Vocabulary.of(torch.arange(ENTRIES, 0, -1))


def test_part_is_the_frequent_tokens_and_a_sample_of_the_others(small_part: Vocabulary) -> None:
    assert small_part.frequent.tolist() == list(range(40))
    first, offsets = small_part.sample(torch.Generator().manual_seed(0))
    assert first[:40].tolist() == list(range(40))
    assert len(set(first.tolist())) == 100
    assert min(first[40:].tolist()) >= 40
    torch.testing.assert_close(offsets, torch.tensor([0.0] * 40 + [math.log(260 / 60)] * 60))
    assert torch.equal(first, small_part.sample(torch.Generator().manual_seed(0))[0])
    assert not torch.equal(first, small_part.sample(torch.Generator().manual_seed(1))[0])


def test_ties_of_frequency_fall_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "FREQUENT", 3)
    monkeypatch.setattr(losses, "SAMPLED", 2)
    assert Vocabulary.of(torch.tensor([0, 5, 0, 5, 1, 0])).frequent.tolist() == [1, 3, 4]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_sampled_estimate_is_close_to_the_exact_value(small_part: Vocabulary, softcap: float | None) -> None:
    tables = table(1), table(2)
    student, teacher = states(4), states(5)
    expected = float(exact(student, teacher, tables, softcap))
    estimates = []
    for seed in range(40):
        ids, offsets = small_part.sample(torch.Generator().manual_seed(seed))
        estimates.append(float(distillation_loss(student, teacher, tables[0][ids], tables[1][ids], offsets, softcap)))
    mean = sum(estimates) / len(estimates)
    assert mean == pytest.approx(expected, rel=0.1)
    assert max(abs(estimate - expected) for estimate in estimates) < 0.6 * expected
    # The frequent tokens alone would miss it by far more.
    alone = float(distillation_loss(student, teacher, tables[0][:40], tables[1][:40], torch.zeros(40), softcap))
    assert abs(alone - expected) > 2 * abs(mean - expected)


def test_partition_function_is_estimated_without_bias(small_part: Vocabulary) -> None:
    logits = states(4) @ table(1).T
    expected = torch.logsumexp(logits, dim=1).exp()
    totals = []
    for seed in range(400):
        ids, offsets = small_part.sample(torch.Generator().manual_seed(seed))
        totals.append(torch.logsumexp(logits[:, ids] + offsets, dim=1).exp())
    torch.testing.assert_close(torch.stack(totals).mean(dim=0), expected, rtol=0.1, atol=0.0)


def test_training_on_samples_reaches_the_teacher(small_part: Vocabulary) -> None:
    tables = table(1), table(2)
    teacher = states(5)
    student = torch.nn.Parameter(states(4))
    before = float(exact(student.detach(), teacher, tables))
    optimizer = torch.optim.Adam([student], lr=0.1)
    for step in range(150):
        ids, offsets = small_part.sample(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        distillation_loss(student, teacher, tables[0][ids], tables[1][ids], offsets).backward()
        optimizer.step()
    whole = torch.nn.Parameter(states(4))
    optimizer = torch.optim.Adam([whole], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        exact(whole, teacher, tables).backward()
        optimizer.step()
    best = float(exact(whole.detach(), teacher, tables))
    assert float(exact(student.detach(), teacher, tables)) < best + 0.05 * (before - best)


def test_loss_is_the_sum_over_the_divergences_of_torch() -> None:
    tables = table(1), table(2)
    student, teacher = states(4), states(5)
    q, p = (torch.log_softmax(hidden @ rows.T, dim=1) for hidden, rows in zip((student, teacher), tables, strict=True))
    expected = F.kl_div(q, p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(
        distillation_loss(student, teacher, *tables, torch.zeros(ENTRIES)), expected, rtol=1e-5, atol=1e-7
    )
