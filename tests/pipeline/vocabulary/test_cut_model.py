"""A model with a part of its vocabulary, and what is measured and taught of it beside the whole one."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from causal_lm_samples import tiny_language_model
from language_samples import SPECIAL
from run_samples import language_recipe
from task_samples import open_multilingual_task, write_multilingual
from torch import Tensor
from vocabulary_samples import byte_fallback_scripts, byte_level_scripts

from pipeline.evaluation.perplexity import load_perplexity, paired_difference
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.progress import Progress
from pipeline.recipe.schema import EndToEnd
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMTask
from pipeline.vocabulary.cut import CutVocabulary
from pipeline.vocabulary.cut_model import cut_model, named_ids
from pipeline.vocabulary.respelled import RespelledText

KEPT = torch.tensor([0, 1, 2, 3, 4, *range(9, 260, 3)])


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "llama", "qwen2"])
def test_logits_are_those_of_the_kept_tokens(kind: str) -> None:
    model = tiny_language_model(kind)
    if model.config.tie_word_embeddings is False:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    state = copy.deepcopy(model.state_dict())
    cut = cut_model(model, CutVocabulary(KEPT, 265, 265, None))
    ids = torch.randint(len(KEPT), (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(cut(input_ids=ids).logits, model(input_ids=KEPT[ids]).logits[..., KEPT])
    assert (cut.config.vocab_size, model.config.vocab_size) == (len(KEPT), 265)
    tied = model.config.tie_word_embeddings
    assert (cut.get_output_embeddings().weight is cut.get_input_embeddings().weight) == tied
    assert cut.get_input_embeddings().num_embeddings == cut.get_output_embeddings().out_features == len(KEPT)
    layers = model.model.layers[0].mlp.up_proj.weight
    assert cut.model.layers[0].mlp.up_proj.weight.data_ptr() == layers.data_ptr()  # shared
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_configurations_have_the_new_ids() -> None:
    model = tiny_language_model("gemma3", eos_token_id=[1, 12, 10])
    model.generation_config.eos_token_id = [12, 1]
    model.generation_config.pad_token_id = 10  # of a token that goes
    model.generation_config.suppress_tokens = [9, 13]
    assert named_ids(model.config, model.generation_config, None) == {0, 1, 2, 9, 10, 12, 13}
    cut = cut_model(model, CutVocabulary(KEPT, 265, 265, None))
    assert (cut.config.bos_token_id, cut.config.eos_token_id, cut.config.pad_token_id) == (2, [1, 6], 0)
    assert (cut.generation_config.eos_token_id, cut.generation_config.pad_token_id) == ([6, 1], None)
    assert cut.generation_config.suppress_tokens == [5]
    assert model.config.eos_token_id == [1, 12, 10]
    model.generation_config.bad_words_ids = [[5]]
    with pytest.raises(InputError, match=r"generation_config\.json: bad_words_ids: names tokens by their ids"):
        named_ids(model.generation_config)


# --- the task --------------------------------------------------------------------------------------------------

TOKENIZERS = {"gemma3": byte_fallback_scripts, "llama": byte_level_scripts}
VOCABULARIES: dict[str, dict[str, Any]] = {
    "Latin": {"scripts": ["Latin"]},
    "all": {"scripts": ["Latin", "Cyrillic", "Han"]},
    "few": {"keep": 275},
}


@pytest.fixture(scope="module")
def task_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], CausalLMTask]:
    """The open task of a tiny model of a kind, with a vocabulary of :data:`VOCABULARIES`. Not to be changed."""
    opened: dict[tuple[str, str], CausalLMTask] = {}

    def task(kind: str, vocabulary: str) -> CausalLMTask:
        if (kind, vocabulary) not in opened:
            folder = tmp_path_factory.mktemp(kind)
            changes = {"vocabulary": VOCABULARIES[vocabulary], "evaluation": {"batch_size": 3}}
            opened[kind, vocabulary] = open_multilingual_task(kind, folder, TOKENIZERS[kind](), **changes)
        return opened[kind, vocabulary]

    return task


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_quality_is_per_token_of_the_full_vocabulary(
    task_of: Callable[[str, str], CausalLMTask], tmp_path: Path, kind: str, vocabulary: str
) -> None:
    task = task_of(kind, vocabulary)
    task.measure_dense(tmp_path / "dense", Progress())
    said = task.measure(task.model, tmp_path / "cut", "cut", Progress(), against_dense=tmp_path / "dense")
    dense, cut = load_perplexity(tmp_path / "dense"), load_perplexity(tmp_path / "cut")
    assert isinstance(task.data, RespelledText)
    windows = task.data.test
    expected, tokens = [], 0
    for window in range(len(windows)):
        ids = windows.batch([window])
        with torch.no_grad():
            losses = F.cross_entropy(task.model(input_ids=ids).logits[0, :-1].double(), ids[0, 1:], reduction="none")
        expected.append(float(losses[-int(windows.predicted()[window]) :].sum()))
        tokens += int(windows.counted()[window])
    assert cut.window_nll.tolist() == pytest.approx(expected, rel=1e-5)
    assert cut.tokens == dense.tokens == tokens
    assert cut.bytes == dense.bytes
    assert cut.nll == pytest.approx(sum(expected) / tokens)
    assert cut.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / cut.bytes)
    assert f"{cut.bits_per_byte:.4f} bits per byte" in said
    difference = paired_difference(cut, dense)
    assert difference.nll == pytest.approx(cut.nll - dense.nll)
    # Both are compared where they predict the same token: the same states, and the same distribution over what is left.
    assert cut.divergence is not None
    if vocabulary == "few":
        assert cut.divergence.tokens < dense.tokens
    if vocabulary == "all":
        assert cut.divergence.tokens == dense.tokens
        assert cut.divergence.kl_max < 1e-6
        assert cut.divergence.same_top1 == 1.0
        assert difference.nll < 0  # nothing is lost to tokens that never come


def test_the_dense_model_keeps_its_whole_vocabulary(task_of: Callable[[str, str], CausalLMTask]) -> None:
    task = task_of("gemma3", "Latin")
    whole: Any = task.dense.whole
    assert whole.config.vocab_size == len(TOKENIZERS["gemma3"]()) > task.model.config.vocab_size == len(task.tokenizer)
    assert "% of the training text's tokens are spelled in others" in task.dense.notes[-1]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_nothing_is_left_to_learn_where_nothing_is_respelled(
    task_of: Callable[[str, str], CausalLMTask], kind: str
) -> None:
    task = task_of(kind, "all")
    config = EndToEnd(objective="distill", steps=1, batch_size=4)
    with torch.no_grad():
        assert abs(float(task.end_to_end_loss(task.model, config, 0)(0))) < 1e-6


@pytest.mark.parametrize("vocabulary", ["Latin", "few"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_distillation_across_vocabularies(
    task_of: Callable[[str, str], CausalLMTask], kind: str, vocabulary: str
) -> None:
    """KL from the whole model's distribution over the kept tokens where it predicts the same token, cross-entropy of
    the next token elsewhere."""
    task = task_of(kind, vocabulary)
    size = task.train_samples
    student = copy.deepcopy(task.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.model.layers.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        config = EndToEnd(objective="distill", steps=1, batch_size=size)
        found = task.end_to_end_loss(student, config, 0)(0)
        expected = by_hand(task, student, range(size))
    torch.testing.assert_close(float(found), expected, rtol=1e-4, atol=1e-6)


def by_hand(task: CausalLMTask, student: Any, windows: range) -> float:
    text = task.data
    assert isinstance(text, RespelledText)
    assert task._vocabulary is not None
    kept = task._vocabulary.kept
    losses: list[Tensor] = []
    for window in windows:
        lesson, ids = text.lesson([window]), text.train.batch([window])
        q = student(input_ids=ids).logits[0].log_softmax(-1)
        whole: Any = task.dense.whole
        p = whole(input_ids=lesson.input_ids).logits[0][:, kept].log_softmax(-1)
        taught, teaching = lesson.student_at, lesson.teacher_at
        losses.append((p[teaching].exp() * (p[teaching] - q[taught])).sum(-1))
        losses.append(-q[lesson.alone_at].gather(1, lesson.alone_targets[:, None])[:, 0])
    return float(torch.cat(losses).mean())


def test_special_tokens_have_the_ids_of_the_cut_tokenizer(task_of: Callable[[str, str], CausalLMTask]) -> None:
    task = task_of("gemma3", "few")
    config: Any = task.model.config
    assert [config.pad_token_id, config.eos_token_id, config.bos_token_id] == [
        task.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[:3]
    ]


def test_windows_that_become_too_long_are_refused(tmp_path: Path) -> None:
    """Words of which nothing is left but bytes; models of 40 tokens at most."""
    write_multilingual("llama", tmp_path, byte_level_scripts(), ("世界", "мира", "the"), max_position_embeddings=40)
    with pytest.raises(InputError, match=r"data\.context: 32: .* takes up to \d+ tokens .* model takes 40; lower"):
        make_task(language_recipe(tmp_path / "model", tmp_path, vocabulary={"scripts": ["Latin"]}))


def test_a_vocabulary_without_the_text_is_refused(tmp_path: Path) -> None:
    write_multilingual("llama", tmp_path, byte_level_scripts())
    (tmp_path / "train.txt").write_text("日本世界" * 60, encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "世界日本" * 60}), encoding="utf-8")
    with pytest.raises(InputError, match="vocabulary: no token of the test text is left; give the scripts"):
        make_task(language_recipe(tmp_path / "model", tmp_path, vocabulary={"scripts": ["Greek"]}))
