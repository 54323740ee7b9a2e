"""Label names of data and model are matched one to one, or refused with both lists."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.labels import check_distinct, match_labels, match_test_labels, normalised
from pipeline.plumbing.errors import InputError

PLACEHOLDERS = [f"LABEL_{index}" for index in range(11)]


@pytest.mark.parametrize(
    ("names", "model_labels", "expected"),
    [
        (["b", "a"], None, [0, 1]),
        (["a", "c"], ["c", "b", "a"], [2, 0]),
        # The issue's: alphabetical order is not the model's.
        (["golden_retriever", "tabby_cat"], ["tabby cat", "golden retriever"], [1, 0]),
        (["Golden-Retriever", "TABBY   cat"], ["tabby cat", "golden retriever"], [1, 0]),
        ([" tabby\u2013cat_"], ["dog", "tabby cat"], [1]),
        (["Cafe\u0301", "Straße"], ["STRASSE", "caf\u00e9"], [1, 0]),
        (["ﬁsh"], ["dog", "Fish"], [1]),
        # Equal names go first, then those that differ in case.
        (["A", "a"], ["a", "A"], [1, 0]),
        (["-", "_", "+"], ["+", "-", "_"], [1, 2, 0]),
        # Synonyms as ImageNet has them.
        (["tabby", "great white shark"], ["great white shark, white shark", "tabby, tabby cat"], [1, 0]),
        (["tabby_cat,_tabby"], ["x", "tabby, tabby cat"], [1]),
        # Class indices, or names that are numbers.
        (["0", "10", "2"], [f"x{index}" for index in range(11)], [0, 10, 2]),
        (["00", "02"], ["a", "b", "c"], [0, 2]),
        (["2", "1"], ["1", "2"], [1, 0]),
        (["01", "02"], ["2", "1"], [1, 0]),
        # By position, where one list says nothing else.
        (["n01440764", "n01443537"], ["tench", "goldfish"], [0, 1]),
        (["cat", "dog"], PLACEHOLDERS[:2], [0, 1]),
        (["class_1", "class_2", "class_10"], PLACEHOLDERS[:3], [0, 1, 2]),
        (["crane", "x", "crane"], ["crane", "x", "crane"], [0, 1, 2]),
        (["tench", "crane bird", "ox", "crane"], ["tench", "crane", "ox", "crane"], [0, 1, 2, 3]),
    ],
)
def test_labels_match(names: list[str], model_labels: list[str] | None, expected: list[int]) -> None:
    assert match_labels(names, model_labels, "data") == expected


@pytest.mark.parametrize(
    ("names", "model_labels", "message"),
    [
        (["0", "3"], ["a", "b", "c"], "label 3 is out of range: the model has 3 labels"),
        (["cat", "dog"], ["a", "b", "c"], "2 labels do not match the model's 3; unknown to the model: 'cat', 'dog'"),
        (["dog", "other"], ["cat", "dog"], "unknown to the model: 'other'"),
        (["cat", "dog", "hound"], ["cat", "dog", "horse"], "unknown to the model: 'hound'"),
        (["Apfel", "Birne"], ["pear", "apple"], "unknown to the model: 'Apfel', 'Birne'"),
        (["Cat", "cat"], ["CAT", "dog"], "one label for the model: 'Cat' and 'cat'"),
        (["tabby", "tabby cat"], ["tabby, tabby cat", "x"], "one label for the model: 'tabby' and 'tabby cat'"),
        (["crane"], ["crane", "dog", "crane"], "the same for several of its labels: 'crane'"),
        (["crane", "x", "crane"], ["crane", "y", "crane"], "unknown to the model: 'x'"),
        # A swap that lists alike in other words must not hide.
        (["dog house", "dog", "crane bird"], ["dog", "dog house", "crane"], "unknown to the model: 'crane bird'"),
        (["0", "1"], ["1", "2"], "unknown to the model: '0'"),
        (["1", "01"], ["a", "b"], "2 labels do not match"),
        (["cat", "dog"], ["0", "1"], "unknown to the model: 'cat', 'dog'"),
        # "class_10" is before "class_2" in the alphabet.
        (["class_1", "class_10", "class_2"], PLACEHOLDERS[:3], "unknown to the model"),
        # Labels in the alphabet's order are not in WordNet's.
        (["n01440764", "n02102040"], ["English springer", "tench"], "unknown to the model: 'n01440764'"),
        (["goldfish", "tench"], ["n01440764", "n01443537"], "unknown to the model: 'goldfish', 'tench'"),
        (["cat"], PLACEHOLDERS[:2], "1 labels do not match the model's 2"),
    ],
)
def test_labels_that_do_not_match(names: list[str], model_labels: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        match_labels(names, model_labels, "data: folder")
    said = str(refused.value)
    assert said.startswith("data: folder: ")
    assert all(repr(label) in said for label in model_labels)


def test_an_order_that_the_data_set_gives_is_that_of_placeholders() -> None:
    names = ["class_1", "class_10", "class_2"]
    assert match_labels(names, PLACEHOLDERS[:3], "data", has_own_order=True) == [0, 1, 2]
    assert match_labels(["tench", "goldfish"], ["n01440764", "n01443537"], "data", has_own_order=True) == [0, 1]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True, max_size=6), st.data())
def test_a_match_is_one_to_one_and_says_the_same(labels: list[str], data: st.DataObject) -> None:
    """Names are the labels in another order, written in another way: the same classes, or refused."""
    order = data.draw(st.permutations(range(len(labels))))
    write = data.draw(st.sampled_from([str.upper, str.title, lambda name: unicodedata.normalize("NFD", name)]))
    names = [write(labels[index]) for index in order]
    try:
        matched = match_labels(names, labels, "data")
    except InputError:
        return
    assert len(set(matched)) == len(names)
    for index, name in zip(matched, names, strict=True):
        assert normalised(labels[index]) == normalised(name) or set(normalised(name)) <= set("0123456789")


def test_test_labels_are_those_that_were_trained() -> None:
    assert match_test_labels(["Tabby cat"], ["dog", "tabby_cat"], "data") == [1]
    with pytest.raises(InputError, match=r"cannot be found in the train split one to one: 'emu'.*'cat', 'dog'"):
        match_test_labels(["dog", "emu"], ["cat", "dog"], "data")


def test_names_that_look_the_same() -> None:
    check_distinct(["a", "A", "caf\u00e9"], "data")
    with pytest.raises(InputError, match=r"two labels look the same.*cafe\\u0301"):
        check_distinct(["cafe\u0301", "caf\u00e9"], "data")
