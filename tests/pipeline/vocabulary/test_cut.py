"""A cut vocabulary: which tokens stay, and a tokenizer that loses nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_samples import SPECIAL
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from vocabulary_samples import PLACEHOLDERS, TOKENIZERS, WORDS, byte_fallback_scripts, byte_level_scripts, content

from pipeline.data.token_bytes import BYTE_CHARACTERS, BYTE_PIECES, token_bytes
from pipeline.models.gguf_tokenizer import TOKENIZER_SAMPLES
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import VocabularySection
from pipeline.vocabulary.cut import cut_vocabulary
from pipeline.vocabulary.cut_tokenizer import check_can_be_cut, cut_tokenizer
from pipeline.vocabulary.frequency import frequency_order
from pipeline.vocabulary.kept import always_kept, most_frequent, written_in

ROWS = 10_000
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TEXTS = st.one_of(UNICODE, st.lists(st.sampled_from((*WORDS, " ", "\n", "x", "Ж")), max_size=8).map("".join))


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def tokens_of(kept: set[int], read: dict[str, Any]) -> set[str]:
    return {token for token, index in read["model"]["vocab"].items() if index in kept}


# --- which tokens stay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_and_special_tokens_stay_and_placeholders_go(kind: str) -> None:
    read = content(TOKENIZERS[kind]())
    expected = {*SPECIAL, *(BYTE_CHARACTERS if kind == "byte_level" else BYTE_PIECES)}
    assert tokens_of(always_kept(read, ROWS, ()), read) == expected
    named = read["model"]["vocab"][PLACEHOLDERS[1]]
    assert tokens_of(always_kept(read, ROWS, {named}), read) == expected | {PLACEHOLDERS[1]}
    # Tokens for which the model has no row go, whatever they are.
    assert always_kept(read, 3, ()) == {0, 1, 2}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_by_script(kind: str) -> None:
    read = content(TOKENIZERS[kind]())
    texts = token_bytes(read)
    latin = {texts[index].decode() for index in written_in(read, ["Latin"]) if texts[index].isascii()}
    assert {"the", " the", " there", "12"} <= latin
    words = {word for word in WORDS if word.encode() in {texts[index] for index in written_in(read, ["Latin"])}}
    assert words == {"the", "there", "other", "für", "Straße", "12", "—", "é", "ẽ", "🙂"}
    russian = {texts[index] for index in written_in(read, ["Cyrillic"])}
    assert "мира".encode() in russian
    assert b"the" not in russian
    both = {texts[index] for index in written_in(read, ["Latin", "Cyrillic"])}
    assert {"мира".encode(), b"the"} <= both
    assert "世界".encode() not in both


def test_parts_of_characters_are_of_the_scripts_that_they_can_become() -> None:
    texts = token_bytes(content(byte_level_scripts()))
    latin = {texts[index] for index in written_in(content(byte_level_scripts()), ["Latin"])}
    # The first two bytes of ẽ begin other Latin letters too; those of 世 and 日 begin no Latin letter, nor any sign.
    assert "ẽ".encode()[:2] in latin
    assert "🙂".encode()[:3] in latin
    assert "世".encode()[:2] not in latin
    assert "日".encode()[:2] not in latin
    assert "世".encode()[:2] in {texts[index] for index in written_in(content(byte_level_scripts()), ["Han"])}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_most_frequent_tokens_come_with_their_ancestors(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    read = content(tokenizer)
    always = always_kept(read, ROWS, ())
    candidates = set(read["model"]["vocab"].values())
    size = len(read["model"]["vocab"])
    counts = torch.bincount(torch.tensor(ids(tokenizer, "мира мира other")), minlength=size)
    order = frequency_order(counts, torch.zeros(size)).tolist()
    for keep in range(len(always), len(always) + 12):
        kept = most_frequent(read, order, always, candidates, keep)
        assert len(kept) == keep
        assert always <= kept
    kept = most_frequent(read, order, always, candidates, len(always) + 40)
    small = Tokenizer.from_str(json.dumps(cut_tokenizer(read, kept)))
    assert small.encode("мира мира other", add_special_tokens=False).tokens == tokenizer.tokenize("мира мира other")


def test_tokens_stay_in_their_order_with_what_they_need() -> None:
    read = {
        "model": {
            "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "ac": 4, "abc": 5},
            "merges": ["a b", "a c", "ab c"],
        }
    }
    order = [5, 3, 4, 0, 1, 2]
    # "abc" comes first, and needs four more; where these do not fit, "ab" is next.
    assert most_frequent(read, order, {0}, range(6), 5) == {0, 1, 2, 3, 5}
    assert most_frequent(read, order, {0}, range(6), 4) == {0, 1, 3, 2}
    assert most_frequent(read, order, {0}, range(6), 2) == {0, 1}
    with pytest.raises(InputError, match=r"vocabulary\.keep: 2: 3 tokens stay in any case: .*give at least 3"):
        most_frequent(read, order, {0, 1, 2}, range(6), 2)


# --- the tokenizer ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(kind, cut) for kind in TOKENIZERS for cut in ("Latin", "few")])
def cut_pair(request: pytest.FixtureRequest) -> tuple[Any, Any, list[int]]:
    """(full tokenizer, cut one, ids that are left)."""
    kind, cut = request.param
    tokenizer = TOKENIZERS[kind]()
    size = len(content(tokenizer)["model"]["vocab"])
    section = VocabularySection(scripts=["Latin"]) if cut == "Latin" else VocabularySection(keep=290)
    counts = torch.bincount(torch.tensor(ids(tokenizer, "there мира there für")), minlength=size)
    found = cut_vocabulary(section, tokenizer, size, (), frequency_order(counts, torch.zeros(size)).tolist())
    return tokenizer, found.tokenizer, found.kept.tolist()


@settings(deadline=None)
@given(text=TEXTS)
def test_no_text_is_lost(cut_pair: tuple[Any, Any, list[int]], text: str) -> None:
    _, small, _ = cut_pair
    assert small.decode(ids(small, text)) == text


@settings(deadline=None)
@given(text=TEXTS)
def test_text_is_cut_as_before_where_all_its_tokens_stay(cut_pair: tuple[Any, Any, list[int]], text: str) -> None:
    full, small, kept = cut_pair
    expected = ids(full, text)
    if set(expected) <= set(kept):
        assert [kept[index] for index in ids(small, text)] == expected


def test_special_tokens_keep_their_places(cut_pair: tuple[Any, Any, list[int]]) -> None:
    full, small, kept = cut_pair
    assert len(small) == len(kept)
    assert [kept[index] for index in small("the")["input_ids"]] == full("the")["input_ids"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert kept[getattr(small, name)] == getattr(full, name)
    assert [kept[index] for index in ids(small, "the<eos>")] == ids(full, "the<eos>")
    assert small.decode(ids(small, "<unused0>")) == "<unused0>"
    assert len(ids(small, "<unused0>")) > 1


def test_a_cut_tokenizer_is_saved_and_loaded(cut_pair: tuple[Any, Any, list[int]], tmp_path: Path) -> None:
    _, small, _ = cut_pair
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TOKENIZER_SAMPLES, " ".join(WORDS)):
        assert loaded(text)["input_ids"] == small(text)["input_ids"]


def test_padding_and_what_goes_around_a_text_are_renumbered() -> None:
    tokenizer = copy.deepcopy(byte_fallback_scripts().backend_tokenizer)
    tokenizer.enable_padding(pad_id=1, pad_token="<eos>")
    read = json.loads(tokenizer.to_str())
    cut = cut_tokenizer(read, [index for index in range(len(read["model"]["vocab"])) if index])
    assert cut["padding"]["pad_id"] == 0
    assert cut["post_processor"]["special_tokens"]["<bos>"]["ids"] == [SPECIAL.index("<bos>") - 1]
    assert [token["id"] for token in cut["added_tokens"]] == [0, 1, 2, 3, 4, 5]
    assert read["post_processor"]["special_tokens"]["<bos>"]["ids"] == [SPECIAL.index("<bos>")]  # untouched


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "Unigram"}, "it is of type Unigram, not BPE"),
        ({"dropout": 0.1}, "joins tokens at random"),
        ({"end_of_word_suffix": "</w>"}, "marks where words go on or end"),
        ({"byte_fallback": False}, "no fallback to single bytes"),
        ({"vocab": {"<0x00>": 0}}, "no token for some single bytes ('<0x01>' for one)"),
    ],
)
def test_tokenizers_that_cannot_be_cut(change: dict[str, Any], said: str) -> None:
    read = content(byte_fallback_scripts())
    check_can_be_cut(read)
    with pytest.raises(InputError) as raised:
        check_can_be_cut({**read, "model": {**read["model"], **change}})
    assert said in str(raised.value)
    assert "leave vocabulary out, or take a model" in str(raised.value)


def test_what_goes_around_a_text_must_be_known() -> None:
    read = content(byte_fallback_scripts())
    read["post_processor"] = {"type": "Sequence", "processors": [{"type": "BertProcessing"}]}
    with pytest.raises(InputError, match=r"post_processor.* is of type BertProcessing"):
        check_can_be_cut(read)
