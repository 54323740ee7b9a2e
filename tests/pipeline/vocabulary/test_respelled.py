"""The same text in two vocabularies: windows that predict the same part of it, and what a teacher can say of them."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabulary_samples import TOKENIZERS, WORDS, content

from pipeline.data.text import TextData, TextSplit, TokenFacts, leading_token, tokenize
from pipeline.data.token_bytes import content_of, token_bytes
from pipeline.recipe.schema import VocabularySection
from pipeline.vocabulary.cut import CutVocabulary, cut_vocabulary
from pipeline.vocabulary.frequency import frequency_order
from pipeline.vocabulary.respelled import respell

CONTEXT = 12


@functools.cache
def cut_of(kind: str, keep: int | None = None) -> CutVocabulary:
    tokenizer = TOKENIZERS[kind]()
    size = len(content(tokenizer)["model"]["vocab"])
    section = VocabularySection(scripts=["Latin"]) if keep is None else VocabularySection(keep=keep)
    counts = torch.bincount(torch.tensor(tokenizer("there the мир für")["input_ids"]), minlength=size)
    return cut_vocabulary(section, tokenizer, size, (), frequency_order(counts, torch.zeros(size)).tolist())


def data_of(kind: str, text: str, *, bos: bool = True) -> TextData:
    """Text to train and to test with, the same for both."""
    tokenizer = TOKENIZERS[kind]()
    tokens = tokenize([text], tokenizer)
    lead = leading_token(tokenizer) if bos else None
    width = CONTEXT - (lead is not None)
    split = TextSplit(tokens[: len(tokens) // width * width], CONTEXT, lead, width, TokenFacts.of(tokenizer, tokens))
    return TextData(split, split, "0", [text], [text], 1, 1)


TEXTS = st.lists(st.sampled_from((*WORDS, " ", " ", "\n", "x", "Ж", "т", "國", "<unused0>")), min_size=90, max_size=140)
KINDS = [(kind, keep) for kind in TOKENIZERS for keep in (None, 275)]


def text_of(tokenizer: Any, ids: list[int]) -> bytes:
    texts = token_bytes(content_of(tokenizer))
    return b"".join(texts[index] for index in ids)


@settings(deadline=None, max_examples=25)
@given(TEXTS.map("".join), st.sampled_from(KINDS), st.integers(1, CONTEXT - 1), st.booleans())
def test_windows_hold_and_predict_the_same_text(
    text: str, kind: tuple[str, int | None], stride: int, bos: bool
) -> None:
    data, cut = data_of(kind[0], text, bos=bos), cut_of(*kind)
    full_tokenizer = TOKENIZERS[kind[0]]()
    full, cut_windows = data.test.strided(stride), respell(data, cut, practise=False).test.strided(stride)
    assert len(cut_windows) == len(full)
    assert cut_windows.counted().tolist() == full.predicted().tolist()
    assert (cut_windows.counted_bytes(), cut_windows.text) == (full.counted_bytes(), full.text)
    lead = int(bos)
    for window in range(len(full)):
        ids, size = cut_windows.batch([window])[0].tolist(), int(cut_windows.sizes()[window])
        expected = full.batch([window])[0].tolist()
        assert len(ids) == size
        assert cut.kept[ids[:lead]].tolist() == expected[:lead]
        assert text_of(cut.tokenizer, ids[lead:]) == text_of(full_tokenizer, expected[lead:])
        count, full_count = int(cut_windows.predicted()[window]), int(full.predicted()[window])
        predicted, full_predicted = ids[size - count :], expected[CONTEXT - full_count :]
        assert text_of(cut.tokenizer, predicted) == text_of(full_tokenizer, full_predicted)
        targets = cut_windows.targets(window)
        assert len(targets.full) == len(targets.frequent) == count
        for place, target in enumerate(targets.full.tolist()):
            if target >= 0:
                assert int(cut.kept[predicted[place]]) == full_predicted[target]
                before = text_of(cut.tokenizer, predicted[:place])
                assert before == text_of(full_tokenizer, full_predicted[:target])
                assert bool(targets.frequent[place]) == bool(full.facts.frequent[full_predicted[target]])


@settings(deadline=None, max_examples=25)
@given(TEXTS.map("".join), st.sampled_from(KINDS), st.booleans(), st.integers(0, 3), st.booleans())
def test_lessons_pair_the_same_tokens(
    text: str, kind: tuple[str, int | None], bos: bool, first: int, practise: bool
) -> None:
    data, cut = data_of(kind[0], text, bos=bos), cut_of(*kind)
    respelled = respell(data, cut, practise=practise)
    chosen = [window for window in (first, first + 1) if window < len(respelled.train)]
    if not chosen:
        return
    lesson, student = respelled.lesson(chosen), respelled.train.batch(chosen)
    flat, teacher = student.flatten().tolist(), lesson.input_ids.flatten().tolist()
    for own, other in zip(lesson.student_at.tolist(), lesson.teacher_at.tolist(), strict=True):
        assert int(cut.kept[flat[own + 1]]) == teacher[other + 1]
        assert own // CONTEXT == other // lesson.input_ids.shape[1]  # the same window
    assert [flat[at + 1] for at in lesson.alone_at.tolist()] == lesson.alone_targets.tolist()
    # Every position is taught once, but for the last of each window, which has nothing to predict.
    both = sorted([*lesson.student_at.tolist(), *lesson.alone_at.tolist()])
    assert both == [at for at in range(len(flat)) if (at + 1) % CONTEXT]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_in_kept_scripts_is_not_respelled(kind: str) -> None:
    text = "there the für Straße other — 12 🙂 é " * 20
    respelled = respell(data_of(kind, text), cut_of(kind), practise=False)
    assert respelled.respelled == respelled.respelled_in_test == 0.0
    assert respelled.test.predicted().tolist() == respelled.test.counted().tolist()
    lesson = respelled.lesson([0, 1])
    assert torch.equal(cut_of(kind).kept[respelled.train.batch([0, 1])], lesson.input_ids)
    assert torch.equal(lesson.student_at, lesson.teacher_at)
    assert not len(lesson.alone_at)


def test_the_respelled_part_is_counted_in_tokens_of_the_full_vocabulary() -> None:
    data = data_of("byte_fallback", "the мир " * 40)  # two of four tokens: a space ends a word and begins another
    respelled = respell(data, cut_of("byte_fallback"), practise=False)
    full = TOKENIZERS["byte_fallback"]().tokenize("the мир the мир the мир")
    share = sum("мир" in token for token in full) / len(full)
    assert respelled.respelled == pytest.approx(share, abs=0.03)
    assert respelled.respelled_in_test == pytest.approx(share, abs=0.03)
    assert f"{100 * respelled.respelled:.2f} % of the training text's tokens and" in respelled.note


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_window_may_end_inside_a_character(kind: str) -> None:
    """Tokens that are parts of characters, where windows of 11 tokens end anywhere."""
    text = "國學ж" * 60
    respelled = respell(data_of(kind, text), cut_of(kind), practise=False)
    assert respelled.test.counted_bytes() == respelled.test.full.counted_bytes()
    assert int(respelled.test.predicted().sum()) >= int(respelled.test.counted().sum())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_that_occur_once_are_spelled_to_practise(kind: str) -> None:
    cut = cut_of(kind)
    data = data_of(kind, "the für " * 40 + "12 " + "the für " * 40)
    plain, practised = (respell(data, cut, practise=practise) for practise in (False, True))
    assert practised.respelled == plain.respelled == 0.0  # what is told is what happens to a text
    assert torch.equal(practised.test.batch([0]), plain.test.batch([0]))
    lessons = [text.lesson(range(len(text.train))) for text in (plain, practised)]
    assert not len(lessons[0].alone_at)
    assert cut.tokenizer.decode(lessons[1].alone_targets.tolist()).strip() == "12"
    assert len(lessons[1].alone_targets) >= 2
