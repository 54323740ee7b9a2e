"""The training loop: schedule of the learning rate, exact resuming, failure on a non-finite loss."""

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factored_samples import ALGORITHMS, n_of_m, planned, recipe, sparsifier, start_quantization, targets
from torch import Tensor, nn

from fips_ort.layout import Pattern
from pipeline.compression.fit import GroupModule, local_loss
from pipeline.compression.sparsify import MaskSchedule
from pipeline.plumbing import training_loop
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import learning_rate_factor, step_generator, train
from pipeline.recipe.schema import Recipe


class KilledError(Exception):
    """Stands for the end of the process."""


def test_learning_rate_schedule() -> None:
    assert [learning_rate_factor(step, 100) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert learning_rate_factor(5 + 95 // 2, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert learning_rate_factor(99, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 94 / 95)))
    assert 0 < learning_rate_factor(99, 100) < 3e-4
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert max(factors) == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[51:]))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_start_at_the_full_rate(steps: int) -> None:
    assert learning_rate_factor(0, steps) == 1.0
    assert all(0 < learning_rate_factor(step, steps) <= 1 for step in range(steps))


def quadratic(weight_decay: float = 0.0, steps: int = 4, learning_rate: float = 0.1) -> tuple[list[float], Tensor]:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 2.0)
    losses = train(
        module, lambda _: module.weight.square().sum(), steps=steps, learning_rate=learning_rate,
        weight_decay=weight_decay, progress=Progress(), label="quadratic",
    )
    return losses, module.weight.detach()


def test_losses_and_steps_are_those_of_adamw() -> None:
    weight = torch.tensor([[2.0]], requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3)
    expected = []
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 * learning_rate_factor(step, 4)
        optimizer.zero_grad()
        value = weight.square().sum()
        value.backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        expected.append(float(value.detach()))
    losses, result = quadratic(weight_decay=0.3)
    assert losses == expected
    assert torch.equal(result, weight.detach())
    assert losses[0] == 4.0
    assert losses == sorted(losses, reverse=True)


def test_frozen_parameters_stay() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    before = module.bias.clone()
    weight = module.weight.detach().clone()
    train(
        module, lambda _: module(torch.ones(1, 3)).square().sum(), steps=3, learning_rate=0.1, weight_decay=0.5,
        progress=Progress(), label="frozen",
    )
    assert torch.equal(module.bias, before)
    assert not torch.equal(module.weight, weight)


def test_hooks_run_around_the_backward_pass() -> None:
    module = nn.Linear(1, 1)
    calls: list[str] = []

    def loss(step: int) -> Tensor:
        calls.append(f"loss {step}")
        return module(torch.ones(1, 1)).square().sum()

    def after(step: int) -> None:
        assert module.weight.grad is not None
        calls.append(f"after {step}")

    train(
        module, loss, steps=2, learning_rate=0.1, weight_decay=0.0, progress=Progress(), label="hooks",
        before_step=lambda step: calls.append(f"before {step}"), after_backward=after,
    )
    assert calls == ["before 0", "loss 0", "after 0", "before 1", "loss 1", "after 1"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", -1.0)
    module = nn.Linear(1, 1)
    checkpoint = tmp_path / "checkpoint.pt"

    def loss(step: int) -> Tensor:
        return module(torch.ones(1, 1)).square().sum() * (bad if step == 2 else 1.0)

    with pytest.raises(FloatingPointError, match=rf"fit group_0: the loss is {bad} at step 3"):
        train(
            module, loss, steps=5, learning_rate=0.1, weight_decay=0.0, progress=Progress(), label="fit group_0",
            checkpoint=checkpoint,
        )
    # The checkpoint is from before the damage.
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["step"] == 2
    assert all(torch.isfinite(value).all() for value in saved["module"].values())


def test_random_numbers_of_a_step_depend_on_seed_and_step_alone() -> None:
    def drawn(seed: int, step: int) -> tuple[int, ...]:
        return tuple(torch.randint(1 << 30, (4,), generator=step_generator(seed, step)).tolist())

    assert len({drawn(seed, step) for seed in range(5) for step in range(20)}) == 100
    torch.rand(7)
    assert drawn(3, 2) == drawn(3, 2)


# --- resuming --------------------------------------------------------------------------------------------------


def run(
    wanted: Recipe, *, quantized: bool, checkpoint: Path | None, killed_at: int | None = None, steps: int = 14
) -> tuple[list[float], dict[str, Tensor]]:
    """A fit, or block-wise QAT, from the same start; ``killed_at``: the step whose loss is never computed."""
    model, group, mlps = planned(wanted)
    goals = targets(model, mlps)
    if quantized:
        projections = [projection for mlp in mlps for projection in mlp.projections.values()]
        start = wanted.compression.sparsifier.model_copy(update={"algorithm": "static"})
        pattern = Pattern.parse(wanted.compression.pattern)
        if pattern.keep:
            MaskSchedule(projections, start, pattern, wanted.compression.target_sparsity, 1).before_step(0)
        start_quantization(wanted, group, mlps)
        schedule = None
    else:
        compression = wanted.compression
        projections = [projection for mlp in mlps for projection in mlp.projections.values()]
        pattern = Pattern.parse(compression.pattern)
        schedule = MaskSchedule(projections, compression.sparsifier, pattern, compression.target_sparsity, steps)
    module = GroupModule(mlps)
    loss: Callable[[int], Tensor] = local_loss(goals, 32, 5)

    def interrupted(step: int) -> Tensor:
        if step == killed_at:
            raise KilledError
        return loss(step)

    losses = train(
        module, interrupted, steps=steps, learning_rate=0.01, weight_decay=0.05, progress=Progress(), label="fit",
        checkpoint=checkpoint, before_step=schedule.before_step if schedule else None,
        after_backward=schedule.after_backward if schedule else None,
    )
    return losses, module.state_dict()


SPARSIFIERS = [sparsifier(name, update_every=3, drop_fraction=0.3) for name in ALGORITHMS]
CASES = [
    *((recipe(compression__sparsifier=sparsifier), False) for sparsifier in SPARSIFIERS),
    *((n_of_m("1:4", compression__sparsifier=sparsifier), False) for sparsifier in SPARSIFIERS),
    (recipe(), True),
    (n_of_m("2:4", quantization__projections__bits=2), True),
    (n_of_m("dense", quantization__basis__bits=3), True),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("killed_at", [1, 6, 12])
def test_a_killed_run_resumes_bit_by_bit(
    case: int, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, quantized = CASES[case]
    expected = run(wanted, quantized=quantized, checkpoint=None)
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", -1.0)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(KilledError):
        run(wanted, quantized=quantized, checkpoint=checkpoint, killed_at=killed_at)
    assert torch.load(checkpoint, weights_only=True)["step"] == killed_at
    losses, state = run(wanted, quantized=quantized, checkpoint=checkpoint)
    assert losses == expected[0]
    assert len(losses) == 14
    assert state.keys() == expected[1].keys()
    for name, value in state.items():
        assert torch.equal(value, expected[1][name]), name


def test_a_finished_checkpoint_trains_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", -1.0)
    checkpoint = tmp_path / "checkpoint.pt"
    first = run(recipe(), quantized=False, checkpoint=checkpoint)
    again = run(recipe(), quantized=False, checkpoint=checkpoint, killed_at=13)
    assert again[0] == first[0]
    assert all(torch.equal(value, first[1][name]) for name, value in again[1].items())


@pytest.mark.parametrize(
    ("step_seconds", "save_seconds", "expected"),
    [
        (0.05, 0.0, []),  # 14 steps are over before the first is due
        (0.4, 0.0, [3, 6, 9, 12]),  # one a second where it costs nothing
        (0.4, 0.05, [3, 10]),  # 50 times what it takes
        (3.0, 9.0, [1, 8]),  # every 20 seconds, whatever it takes
        (30.0, 9.0, [*range(1, 15)]),
    ],
)
def test_checkpoints_wait_for_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_seconds: float, save_seconds: float, expected: list[int]
) -> None:
    now, saved = 0.0, []

    def save(*arguments: Any) -> None:
        nonlocal now
        now += save_seconds
        saved.append(arguments[3])

    def after(_: int) -> None:
        nonlocal now
        now += step_seconds

    monkeypatch.setattr(training_loop, "_save", save)
    monkeypatch.setattr(training_loop.time, "monotonic", lambda: now)
    module = nn.Linear(1, 1)
    train(
        module, lambda _: module(torch.ones(1, 1)).square().sum(), steps=14, learning_rate=0.1, weight_decay=0.0,
        progress=Progress(), label="slow", checkpoint=tmp_path / "checkpoint.pt", after_backward=after,
    )
    assert saved == expected


# --- damaged checkpoints ---------------------------------------------------------------------------------------


def truncated(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])


def emptied(checkpoint: Path) -> None:
    checkpoint.write_bytes(b"")


def flipped(checkpoint: Path) -> None:
    """A bit of a tensor, which torch.load does not notice."""
    content = bytearray(checkpoint.read_bytes())
    saved = torch.load(checkpoint, weights_only=True)
    weight = next(value for value in saved["module"].values() if value.dtype == torch.float32)
    content[bytes(content).index(weight.numpy().tobytes()) + 1] ^= 1
    checkpoint.write_bytes(content)
    assert torch.load(checkpoint, weights_only=True)["step"] == saved["step"]


def replaced(checkpoint: Path) -> None:
    torch.save({"another": 1}, checkpoint)


def without_its_note(checkpoint: Path) -> None:
    checkpoint.with_name("checkpoint.pt.sha256").unlink()


def with_a_damaged_note(checkpoint: Path) -> None:
    checkpoint.with_name("checkpoint.pt.sha256").write_bytes(b"\xff[")


@pytest.mark.parametrize(
    "damage", [truncated, emptied, flipped, replaced, without_its_note, with_a_damaged_note]
)
def test_a_damaged_checkpoint_is_said_and_training_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    expected = run(recipe(), quantized=False, checkpoint=None)
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", -1.0)
    checkpoint = tmp_path / "checkpoint.pt"
    for _ in range(2):  # at each resume
        with pytest.raises(KilledError):
            run(recipe(), quantized=False, checkpoint=checkpoint, killed_at=5)
        damage(checkpoint)
    losses, state = run(recipe(), quantized=False, checkpoint=checkpoint)
    assert losses == expected[0]
    assert all(torch.equal(value, expected[1][name]) for name, value in state.items())
    assert capsys.readouterr().err.count(f"  fit: {checkpoint} is damaged; training starts anew\n") == 2


def test_a_kill_before_a_checkpoint_is_moved_into_place_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice in a row, so that the note of the hash is two steps ahead of the file."""
    expected = run(recipe(), quantized=False, checkpoint=None)
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", -1.0)
    checkpoint, move = tmp_path / "checkpoint.pt", os.replace

    def killed(source: Path, target: Path) -> None:
        if target == checkpoint and torch.load(source, weights_only=True)["step"] == stop:
            raise KilledError
        move(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for stop in (6, 6, 9):
        with pytest.raises(KilledError):
            run(recipe(), quantized=False, checkpoint=checkpoint)
        assert torch.load(checkpoint, weights_only=True)["step"] == stop - 1
    stop = 99
    losses, _ = run(recipe(), quantized=False, checkpoint=checkpoint)
    assert losses == expected[0]
    assert "damaged" not in capsys.readouterr().err


def test_weights_decay_and_vectors_do_not() -> None:
    module = nn.Linear(2, 1)
    nn.init.ones_(module.weight)
    nn.init.ones_(module.bias)
    # No gradient: only the decay moves anything.
    train(
        module, lambda _: 0.0 * (module.weight.sum() + module.bias.sum()), steps=1, learning_rate=0.1,
        weight_decay=0.5, progress=Progress(), label="decay",
    )
    assert torch.equal(module.weight.detach(), torch.full((1, 2), 0.95))
    assert torch.equal(module.bias.detach(), torch.ones(1))
