"""The task of language models: what it keeps for later stages, and the samples it draws."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from run_samples import quantization_of_language
from task_samples import open_language_task
from torch import Tensor

from exporters.packed_rest import load_packed_rest
from exporters.rest import packed_rest
from pipeline.data.token_bytes import content_of
from pipeline.evaluation.perplexity import HIDDEN_STATES
from pipeline.plumbing.errors import StageError
from pipeline.plumbing.progress import Progress
from pipeline.quantization.rest_layers import rest_bits
from pipeline.recipe.plan import make_plan
from pipeline.tasks.base import PACKED_REST
from pipeline.vocabulary.kept import hardly_counted


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
    task.store_rest(tmp_path, rest_bits(task.recipe, task.model, task.sites), Progress())
    assert read == calibrated == task.calibration_samples()
    assert len(set(read)) == 7
    assert read == sorted(read) != list(range(7))
    assert 0 <= read[0] <= read[-1] < task.train_samples


def test_all_training_samples_calibrate_unless_fewer_are_wanted(tmp_path: Path) -> None:
    task = open_language_task("llama", tmp_path, calibration={})
    assert task.calibration_samples() == list(range(task.train_samples))


@pytest.mark.parametrize("start", ["gptq", "nearest"])
@pytest.mark.parametrize("tied", ["gemma3", "llama"])
def test_codes_of_the_rest_are_kept(tmp_path: Path, start: str, tied: str) -> None:
    tiers = [{"bits": 8, "tokens": 40}, {"bits": 4, "tokens": 30}, {"bits": 2}]
    rest = {"linear_bits": 3, "embedding_bits": tiers, "block_size": 16}
    task = open_language_task(tied, tmp_path, quantization=quantization_of_language(start=start, rest=rest))
    task.store_rest(tmp_path, rest_bits(task.recipe, task.model, task.sites), Progress())
    stored = load_packed_rest(tmp_path / PACKED_REST)
    assert packed_rest(task.open_rest(tmp_path)).weights().keys() == stored.weights().keys()
    assert set(stored.tables) == {"model.embed_tokens"} | ({"lm_head"} if tied == "llama" else set())
    # The most frequent tokens of the training text have most bits.
    row_bits = stored.tables["model.embed_tokens"].row_bits
    assert row_bits is not None
    counts = torch.bincount(task.data.train.tokens, minlength=len(row_bits))
    special = hardly_counted(content_of(task.tokenizer), len(counts), ())
    assert special == set(task.tokenizer.all_special_ids)  # no byte: here they are tokens like others
    counts[sorted(special)] = counts.max()
    by_tier = [counts[torch.from_numpy(row_bits == bits)] for bits in (8, 4, 2)]
    assert [len(tier) for tier in by_tier] == [40, 30, len(counts) - 70]
    assert int(by_tier[0].min()) >= int(by_tier[1].max()) >= int(by_tier[1].min()) >= int(by_tier[2].max())


def test_lost_codes_of_the_rest_are_not_replaced_by_rounding(tmp_path: Path) -> None:
    task = open_language_task("llama", tmp_path)
    with pytest.raises(FileNotFoundError, match=PACKED_REST):
        task.open_rest(tmp_path)


def test_dense_model_is_there_once_open(tmp_path: Path) -> None:
    task = open_language_task("llama", tmp_path)
    assert (task.model, task.sites, task.source_hash) == (task.dense.model, task.dense.sites, task.dense.source_hash)
    assert len(task.sites) == 2
    fresh = type(task)(task.recipe)
    with pytest.raises(AssertionError, match="after open_dense"):
        _ = fresh.model
