"""The task of language models: what it keeps for later stages, and the samples it draws."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from run_samples import quantization_of_language
from task_samples import open_language_task
from torch import Tensor

from pipeline.evaluation.perplexity import HIDDEN_STATES
from pipeline.plumbing.errors import StageError
from pipeline.plumbing.progress import Progress
from pipeline.recipe.plan import make_plan
from pipeline.tasks.causal_lm import REST_TABLES


def test_only_measuring_the_dense_model_keeps_its_hidden_states(tmp_path: Path) -> None:
    task = open_language_task("llama", tmp_path)
    said = task.measure(task.model, tmp_path / "form", "form", Progress())
    assert not (tmp_path / "form" / HIDDEN_STATES).exists()
    assert task.measure_dense(tmp_path / "dense", Progress()) == said
    assert (tmp_path / "dense" / HIDDEN_STATES).exists()
    compared = task.measure(task.model, tmp_path / "compared", "form", Progress(), against_dense=tmp_path / "dense")
    assert compared == said


def test_a_perplexity_that_no_number_holds_ends_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On terminals, where it is shown as it grows, too."""
    task = open_language_task("llama", tmp_path)
    monkeypatch.setattr(task.model.lm_head.weight, "data", task.model.lm_head.weight.data * 1e4)
    with pytest.raises(StageError, match=r"form: \d+ nats a token are a perplexity that no number holds"):
        task.measure(task.model, tmp_path / "form", "form", Progress())


def test_calibration_and_the_rest_read_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = open_language_task("llama", tmp_path, calibration={"samples": 7, "batch_size": 3}, seed=5)
    read: list[int] = []
    batch = task.training_batch

    def record(indices: Sequence[int]) -> Tensor:
        read.extend(indices)
        return batch(indices)

    monkeypatch.setattr(task, "training_batch", record)
    task.calibrate(tmp_path / "calibrate", make_plan(task.recipe, task.sites), Progress())
    calibrated = read.copy()
    read.clear()
    task.store_rest(tmp_path, Progress())
    assert read == calibrated == task.calibration_samples()
    assert len(set(read)) == 7
    assert read == sorted(read) != list(range(7))
    assert 0 <= read[0] <= read[-1] < task.train_samples


def test_all_training_samples_calibrate_unless_fewer_are_wanted(tmp_path: Path) -> None:
    task = open_language_task("llama", tmp_path, calibration={})
    assert task.calibration_samples() == list(range(task.train_samples))


@pytest.mark.parametrize(
    ("start", "rest", "kept"),
    [
        ("gptq", {"linear_bits": 4, "block_size": 16}, True),
        ("gptq", {"embedding_bits": 4, "block_size": 16}, True),
        ("gptq", {}, False),
        ("nearest", {"linear_bits": 4, "block_size": 16}, False),
    ],
)
def test_codes_of_the_rest_are_kept_where_gptq_finds_some(
    tmp_path: Path, start: str, rest: dict[str, int], kept: bool
) -> None:
    task = open_language_task("llama", tmp_path, quantization=quantization_of_language(start=start, rest=rest))
    task.store_rest(tmp_path, Progress())
    assert (tmp_path / REST_TABLES).exists() == kept
    task.open_rest(tmp_path)


def test_lost_codes_of_the_rest_are_not_replaced_by_rounding(tmp_path: Path) -> None:
    task = open_language_task("llama", tmp_path)
    with pytest.raises(FileNotFoundError, match=REST_TABLES):
        task.open_rest(tmp_path)


def test_dense_model_is_there_once_open(tmp_path: Path) -> None:
    task = open_language_task("llama", tmp_path)
    assert (task.model, task.sites, task.source_hash) == (task.dense.model, task.dense.sites, task.dense.source_hash)
    assert len(task.sites) == 2
    fresh = type(task)(task.recipe)
    with pytest.raises(AssertionError, match="after open_dense"):
        _ = fresh.model
