"""Text becomes windows of tokens; train and test have no document in common."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_samples import BOS, byte_level_tokenizer

import pipeline.data.text
from pipeline.data.text import (
    COVERED,
    TextSplit,
    TokenFacts,
    check_vocabulary,
    describe_tokens,
    load_text_data,
    tokens_beyond,
)
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import HubTextData, LocalTextData, PackagedTextData

CONTEXT = 16
FACTS = TokenFacts(torch.ones(1000, dtype=torch.int64), torch.zeros(1000, dtype=torch.bool))


def documents(count: int, start: int = 0) -> list[str]:
    """Different ones of different lengths, about 60 tokens."""
    return [f"Document {n}, the one about {n * n}." + " More of it." * (n % 7) for n in range(start, start + count)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)), "utf-8")
    return path


def local(train: Path, test: Path | None = None, **options: Any) -> LocalTextData:
    values = {"source": "text", "train": str(train), "test": None if test is None else str(test), "context": CONTEXT}
    return LocalTextData.model_validate({**values, **options})


def text_of(split: TextSplit, tokenizer: Any) -> str:
    return str(tokenizer.decode(split.tokens.tolist()))


# --- facts of a vocabulary -------------------------------------------------------------------------------------


def test_tokens_stand_for_bytes_of_the_text() -> None:
    tokenizer = byte_level_tokenizer()
    text = "the größte 世界 in the <eos> 🙂"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    facts = TokenFacts.of(tokenizer, torch.tensor(ids, dtype=torch.int32))
    assert int(facts.bytes[ids].sum()) == len(text.encode())
    assert facts.bytes[tokenizer.convert_tokens_to_ids(["the", "Ġthe", "Ġ", "<eos>"])].tolist() == [3, 4, 1, 5]


def test_the_tokens_that_make_up_most_of_the_training_text_are_frequent() -> None:
    tokenizer = byte_level_tokenizer()
    counts = {10: 60, 11: 25, 9: 10, 12: 4, 13: 1}
    text = torch.cat([torch.full((count,), token, dtype=torch.int32) for token, count in counts.items()])
    assert COVERED == 0.9
    assert TokenFacts.of(tokenizer, text).frequent.nonzero().flatten().tolist() == [9, 10, 11]  # 95 of 100


@pytest.mark.parametrize("bos", [2, None])
@pytest.mark.parametrize("stride", [None, 3])
def test_what_windows_predict_is_counted_in_tokens_and_bytes(bos: int | None, stride: int | None) -> None:
    facts = TokenFacts(torch.arange(40) + 1, torch.arange(40) % 3 == 0)
    whole = TextSplit(torch.arange(40, dtype=torch.int32), 9 if bos is None else 10, bos, 9, facts)
    split = whole.strided(stride)
    predicted = [
        token
        for window, count in enumerate(split.predicted().tolist())
        for token in split.batch([window])[0, split.context - count :].tolist()
    ]
    assert split.counted_bytes() == sum(token + 1 for token in predicted)
    assert split.counted_frequent() == sum(token % 3 == 0 for token in predicted)
    assert split.counted().tolist() == split.predicted().tolist()
    found = [split.targets(window) for window in range(len(split))]
    assert torch.cat([targets.frequent for targets in found]).tolist() == [token % 3 == 0 for token in predicted]
    assert [len(targets.full) for targets in found] == split.predicted().tolist()
    assert found[0].full.tolist() == list(range(len(found[0].full)))


# --- windows ---------------------------------------------------------------------------------------------------


def test_windows_side_by_side() -> None:
    split = TextSplit(torch.arange(100, 132, dtype=torch.int32), context=11, bos=2, step=10, facts=FACTS)
    assert (len(split), split.width) == (3, 10)
    batch = split.batch([2, 0])
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[2, *range(120, 130)], [2, *range(100, 110)]]
    assert split.predicted().tolist() == [10, 10, 10]
    without = TextSplit(split.tokens, context=10, bos=None, step=10, facts=FACTS)
    assert without.batch([1]).tolist() == [[*range(110, 120)]]
    assert without.predicted().tolist() == [9, 9, 9]  # nothing goes before the first token
    for index in (3, -1):
        with pytest.raises(IndexError):
            split.batch([0, index])
    assert split.batch([]).shape == (0, 11)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(2, 20), st.booleans(), st.data())
def test_strides_count_each_token_once(tokens: int, context: int, bos: bool, data: st.DataObject) -> None:
    width = context - bos
    stride = data.draw(st.integers(1, width))
    whole = TextSplit(torch.arange(tokens, dtype=torch.int32), context, 999 if bos else None, width, FACTS)
    split = whole.strided(stride)
    counted: list[int] = []
    for window, count in enumerate(split.predicted().tolist()):
        ids = split.batch([window])[0]
        assert len(ids) == context
        counted += ids[context - count :].tolist()
    if len(split) == 0:
        assert tokens < width
        return
    reached = width + (len(split) - 1) * stride
    assert tokens - stride < reached <= tokens
    # Without <bos> nothing predicts the first token of the text, nor of a window that overlaps no other.
    unpredicted = set() if bos else {0} if stride < width else set(range(0, reached, width))
    assert counted == [token for token in range(reached) if token not in unpredicted]


@pytest.mark.parametrize("stride", [0, 11])
def test_stride_that_leaves_out_text_is_refused(stride: int) -> None:
    split = TextSplit(torch.arange(40), context=11, bos=2, step=10, facts=FACTS)
    with pytest.raises(InputError, match=rf"evaluation\.stride: got {stride}.*context: 11 hold 10 tokens"):
        split.strided(stride)
    assert split.strided(3).strided(None) == split


# --- splitting -------------------------------------------------------------------------------------------------


def test_documents_are_split_shuffled_and_joined(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    texts = documents(30)
    section = local(write_jsonl(tmp_path / "all.jsonl", texts), test_fraction=0.2)
    data = load_text_data(section, tokenizer, seed=3)
    assert (data.train_documents, data.test_documents) == (24, 6)
    parts = {
        name: text_of(split, tokenizer).split("\n\n") for name, split in (("train", data.train), ("test", data.test))
    }
    assert [part in texts for part in parts["train"][:-1]] == [True] * (len(parts["train"]) - 1)  # the last is cut
    assert parts["train"][:-1] != sorted(parts["train"][:-1])
    assert not set(parts["train"]) & set(parts["test"])
    assert {len(text_of(split, tokenizer)) > 0 for split in (data.train, data.test)} == {True}
    for split in (data.train, data.test):
        batch = split.batch(range(len(split)))
        assert batch.shape == (len(split), CONTEXT)
        assert (batch[:, 0] == BOS).all()
        assert torch.equal(batch[:, 1:].reshape(-1), split.tokens.long())
        assert len(split.tokens) == len(split) * (CONTEXT - 1)


def test_tokens_are_those_of_the_joined_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.data.text, "_DOCUMENTS_AT_ONCE", 3)
    tokenizer = byte_level_tokenizer()
    texts = documents(20)
    section = local(
        write_jsonl(tmp_path / "train.jsonl", documents(5, 90)), write_jsonl(tmp_path / "test.jsonl", texts)
    )
    data = load_text_data(section, tokenizer, seed=0)
    whole = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    assert data.test.tokens.tolist() == whole[: len(data.test.tokens)]
    assert len(whole) - len(data.test.tokens) < data.test.width


def test_no_leading_token_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    data = load_text_data(local(write_jsonl(tmp_path / "a.jsonl", documents(30))), byte_level_tokenizer(bos=False), 0)
    assert data.train.bos is None
    assert data.train.width == CONTEXT
    assert torch.equal(data.train.batch([1])[0], data.train.tokens[CONTEXT : 2 * CONTEXT].long())


def test_duplicates_never_cross_the_split(tmp_path: Path) -> None:
    texts = documents(12)
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:6], f"  {texts[7]}\n", "", "   "])
    for seed in range(5):
        data = load_text_data(local(path, test_fraction=0.5), byte_level_tokenizer(), seed)
        assert data.train_documents + data.test_documents == 12


def test_train_leaves_out_what_a_given_test_file_has(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    texts = documents(12)
    test = write_jsonl(tmp_path / "test.jsonl", texts[:4])
    data = load_text_data(local(write_jsonl(tmp_path / "train.jsonl", texts), test), tokenizer, 0)
    assert (data.train_documents, data.test_documents) == (8, 4)
    train = text_of(data.train, tokenizer)
    assert not any(text in train for text in texts[:4])
    assert "Document 11, the one" in train


def test_same_seed_same_data_other_seed_other_data(tmp_path: Path) -> None:
    section = local(write_jsonl(tmp_path / "a.jsonl", documents(40)))
    tokenizer = byte_level_tokenizer()
    first, again, other = (load_text_data(section, tokenizer, seed) for seed in (0, 0, 1))
    assert first.hash == again.hash
    assert torch.equal(first.train.tokens, again.train.tokens)
    assert first.hash != other.hash


def test_hash_depends_on_all_that_matters(tmp_path: Path) -> None:
    section = local(write_jsonl(tmp_path / "a.jsonl", documents(40)))
    tokenizer = byte_level_tokenizer()
    renamed = byte_level_tokenizer()
    renamed.add_tokens(["zzz"])
    hashes = {
        load_text_data(section, tokenizer, 0).hash,
        load_text_data(section, byte_level_tokenizer(bos=False), 0).hash,
        load_text_data(section, renamed, 0).hash,
        load_text_data(section.model_copy(update={"context": 17}), tokenizer, 0).hash,
        load_text_data(section, tokenizer, 0, train_samples=3).hash,
        load_text_data(section, tokenizer, 0, test_samples=1).hash,
        load_text_data(section.model_copy(update={"test_fraction": 0.3}), tokenizer, 0).hash,
    }
    assert len(hashes) == 7


def test_only_as_many_documents_as_needed_are_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.data.text, "_DOCUMENTS_AT_ONCE", 4)
    section = local(write_jsonl(tmp_path / "a.jsonl", documents(200)))
    tokenizer = byte_level_tokenizer()
    whole = load_text_data(section, tokenizer, 0)
    some = load_text_data(section, tokenizer, 0, train_samples=5, test_samples=2)
    assert (len(some.train), len(some.test)) == (5, 2)
    assert some.train_documents <= 8
    assert torch.equal(some.train.tokens, whole.train.tokens[: 5 * whole.train.width])
    assert torch.equal(some.test.tokens, whole.test.tokens[: 2 * whole.test.width])
    more = load_text_data(section, tokenizer, 0, train_samples=10_000)
    assert torch.equal(more.train.tokens, whole.train.tokens)


# --- plain text ------------------------------------------------------------------------------------------------


def test_lines_of_a_plain_text_are_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(documents(40)), encoding="utf-8")
    data = load_text_data(local(tmp_path / "a.txt"), byte_level_tokenizer(), 0)
    assert (data.train_documents, data.test_documents) == (36, 4)


def test_plain_texts_for_train_and_test_are_one_document_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.data.text, "_PIECE", 100)  # the pieces are an affair of the tokenizer's memory
    tokenizer = byte_level_tokenizer()
    text = "\n".join(documents(60)) + "\n\n\n  indented\n\tand more\n" + "in the " * 50
    (tmp_path / "train.txt").write_text("\n".join(documents(20, 100)), encoding="utf-8")
    (tmp_path / "test.txt").write_text(text, encoding="utf-8")
    data = load_text_data(local(tmp_path / "train.txt", tmp_path / "test.txt"), tokenizer, 0)
    assert (data.train_documents, data.test_documents) == (1, 1)
    whole = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    assert data.test.tokens.tolist() == whole[: len(data.test.tokens)]


# --- packages --------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site" / "texts_of_a_test"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    assert folder.name not in sys.modules


def packaged(**options: Any) -> PackagedTextData:
    values = {"source": "packaged_text", "package": "texts_of_a_test", "file": "a.json", "field": "extract"}
    return PackagedTextData.model_validate({**values, "context": CONTEXT, **options})


@pytest.mark.parametrize("mapping", [True, False])
def test_packaged_records(mapping: bool, package: Path) -> None:
    records = [{"title": str(n), "extract": text} for n, text in enumerate(documents(30))]
    content = {record["title"]: record for record in records} if mapping else records
    (package / "a.json").write_text(json.dumps(content), encoding="utf-8")
    data = load_text_data(packaged(), byte_level_tokenizer(), 0)
    assert (data.train_documents, data.test_documents) == (27, 3)


def test_packaged_text_that_is_not_there(package: Path) -> None:
    tokenizer = byte_level_tokenizer()
    with pytest.raises(InputError, match=r"data\.package: no_such_texts is not installed.*pip install"):
        load_text_data(packaged(package="no_such_texts"), tokenizer, 0)
    with pytest.raises(InputError, match=r"data\.file: package texts_of_a_test has no file b\.json"):
        load_text_data(packaged(file="b.json"), tokenizer, 0)
    with pytest.raises(InputError, match=r"data\.file: \.\./\.\./outside\.json is not inside package texts_of_a_test"):
        load_text_data(packaged(file="../../outside.json"), tokenizer, 0)
    contents = {
        "{": r"a\.json: not valid JSON",
        '"text"': "expected a list or a mapping of records, found str",
        '{"x": {"title": "a", "extract": "b"}, "y": {"title": "c"}}': r"record 'y': no field 'extract'.*it has title",
        '[{"extract": 5}]': r"record 0: field 'extract' \(data.field\) holds int, not text",
        '["text"]': r"record 0: no field 'extract' \(data.field\); it has str",
    }
    for content, message in contents.items():
        (package / "a.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            load_text_data(packaged(), tokenizer, 0)


# --- kinds of files --------------------------------------------------------------------------------------------


def test_capitals_do_not_make_records_prose(tmp_path: Path) -> None:
    """The issue's: a model would learn ``{"text": "Document…``."""
    tokenizer = byte_level_tokenizer()
    lower, upper = (write_jsonl(tmp_path / name, documents(30)) for name in ("a.jsonl", "b.JSONL"))
    expected, found = (load_text_data(local(path), tokenizer, 0) for path in (lower, upper))
    assert torch.equal(found.train.tokens, expected.train.tokens)
    assert "{" not in text_of(found.train, tokenizer)


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    plain = write_jsonl(tmp_path / "a.jsonl", documents(30))
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert load_text_data(local(tmp_path / "marked.jsonl"), tokenizer, 0).hash == (
        load_text_data(local(plain), tokenizer, 0).hash
    )
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("\n".join(documents(60)) + name, encoding="utf-8-sig")
    data = load_text_data(local(tmp_path / "train.txt", tmp_path / "test.txt"), tokenizer, 0)
    assert text_of(data.test, tokenizer).startswith("Document 0")


def test_packaged_records_after_a_byte_order_mark(package: Path) -> None:
    content = json.dumps([{"extract": text} for text in documents(30)])
    (package / "a.json").write_text(content, encoding="utf-8-sig")
    assert load_text_data(packaged(), byte_level_tokenizer(), 0).train_documents == 27


def test_plain_text_has_no_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(documents(40)), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n".join(documents(40, 90)), encoding="utf-8")
    for test in (None, tmp_path / "b.txt"):
        with pytest.raises(InputError, match=r"data\.field: body: .*a\.txt is plain text, which has no fields"):
            load_text_data(local(tmp_path / "a.txt", test, field="body"), byte_level_tokenizer(), 0)
    records = write_jsonl(tmp_path / "c.jsonl", documents(40, 50), "body")
    data = load_text_data(local(tmp_path / "a.txt", records, field="body"), byte_level_tokenizer(), 0)
    assert (data.train_documents, data.test_documents) == (1, 40)


# --- vocabulary ------------------------------------------------------------------------------------------------


def test_tokens_beyond_the_table_are_named(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    rows = len(tokenizer)
    assert tokens_beyond(tokenizer, rows) == {}
    tokenizer.add_tokens(["<extra>", "<other>"])
    assert tokens_beyond(tokenizer, rows) == {"<extra>": rows, "<other>": rows + 1}
    (tmp_path / "test.txt").write_text("\n".join(documents(40)), encoding="utf-8")
    (tmp_path / "train.txt").write_text("\n".join(documents(40, 90)), encoding="utf-8")
    section = local(tmp_path / "train.txt", tmp_path / "test.txt")
    check_vocabulary(load_text_data(section, tokenizer, 0), tokenizer, rows)
    for name in ("train", "test"):
        path = tmp_path / f"{name}.txt"
        text = path.read_text(encoding="utf-8")
        path.write_text("<other> and " + text, encoding="utf-8")
        data = load_text_data(section, tokenizer, 0)
        with pytest.raises(InputError, match=rf"the {name} text holds '<other>' \(id 266\), and .* 265 rows"):
            check_vocabulary(data, tokenizer, rows)
        check_vocabulary(data, tokenizer, rows + 2)  # also rows that only pad the table
        path.write_text(text, encoding="utf-8")


def test_a_leading_token_beyond_the_table(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    data = load_text_data(local(write_jsonl(tmp_path / "a.jsonl", documents(40))), tokenizer, 0)
    with pytest.raises(InputError, match=r"the train text holds '<bos>' \(id 2\)"):
        check_vocabulary(replace(data, train=replace(data.train, tokens=data.train.tokens * 0)), tokenizer, 2)


def test_many_tokens_are_counted() -> None:
    tokens = {f"<{index}>": 265 + index for index in range(7)}
    assert describe_tokens(tokens).endswith("'<4>' (id 269), … (7 tokens)")


# --- errors ----------------------------------------------------------------------------------------------------


def test_jsonl_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = {
        '{"text": "a"}\n\n{"text": "b"\n': r"a\.jsonl: line 3: not valid JSON",
        '{"text": "a\u2028b"}\n{"body": "b"}\n': r"a\.jsonl: line 2: no field 'text' \(data\.field\); it has body",
        '{"text": "a"}\n{"text": null}\n': r"a\.jsonl: line 2: field 'text' .* holds NoneType, not text",
        '{"text": "a\\ud800"}\n': r"a\.jsonl: line 1: field 'text' .* not Unicode",
        '{"text": "a"}\n[1]\n': r"a\.jsonl: line 2: no field 'text'.*it has list",
    }
    for content, message in lines.items():
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            load_text_data(local(path), byte_level_tokenizer(), 0)


def test_unreadable_files(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    with pytest.raises(InputError, match=r"absent\.txt: cannot read the text: No such file"):
        load_text_data(local(tmp_path / "absent.txt"), tokenizer, 0)
    (tmp_path / "latin.txt").write_bytes("größer\nklein".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt: not text in UTF-8"):
        load_text_data(local(tmp_path / "latin.txt"), tokenizer, 0)
    (tmp_path / "one.txt").write_text("only one line", encoding="utf-8")
    with pytest.raises(InputError, match="1 documents cannot be split into train and test"):
        load_text_data(local(tmp_path / "one.txt"), tokenizer, 0)
    with pytest.raises(InputError, match="train and test are the same file"):
        load_text_data(local(tmp_path / "one.txt", tmp_path / "one.txt"), tokenizer, 0)


def test_too_little_text_for_a_window(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(10))
    with pytest.raises(InputError, match=r"the test text has \d+ tokens, less than one window of data\.context: 400"):
        load_text_data(local(path, context=400), byte_level_tokenizer(), 0)
    same = write_jsonl(tmp_path / "b.jsonl", documents(10))
    with pytest.raises(InputError, match="the train text has 0 tokens"):  # all of it is in the test text
        load_text_data(local(path, same), byte_level_tokenizer(), 0)


# --- hub -------------------------------------------------------------------------------------------------------


def hub(path: Path, **options: Any) -> HubTextData:
    return HubTextData.model_validate({"source": "hub_text", "path": str(path), "context": CONTEXT, **options})


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", documents(50))
    write_jsonl(folder / "test.jsonl", [*documents(3), *documents(10, 100), ""])
    return folder


def test_hub_text_is_streamed_in_its_own_order(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    load = datasets.load_dataset

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append(options["streaming"])
        return load(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", spy)
    tokenizer = byte_level_tokenizer()
    data = load_text_data(hub(hub_folder), tokenizer, seed=5)
    assert asked == [True, True]
    assert text_of(data.test, tokenizer).split("\n\n")[:-1] == [*documents(3), *documents(10, 100)][:-1]
    assert data.test_documents == 13
    assert data.train_documents == 47  # less what the test text has
    assert text_of(data.train, tokenizer).split("\n\n")[0] == documents(1, 3)[0]


def test_hub_documents_are_limited(hub_folder: Path) -> None:
    data = load_text_data(hub(hub_folder, documents=8), byte_level_tokenizer(), 0)
    assert (data.train_documents, data.test_documents) == (5, 8)


def test_hub_dataset_saved_to_disk(tmp_path: Path) -> None:
    rows = {"train": documents(20), "validation": documents(20, 50)}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"body": texts}) for name, texts in rows.items()}
    ).save_to_disk(tmp_path / "saved")
    data = load_text_data(hub(tmp_path / "saved", test="validation", field="body"), byte_level_tokenizer(), 0)
    assert (data.train_documents, data.test_documents) == (20, 20)


def test_hub_errors(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level_tokenizer()
    with pytest.raises(InputError, match=r"split test: row 0: no field 'body' \(data\.field\); it has id, text"):
        load_text_data(hub(hub_folder, field="body"), tokenizer, 0)
    with pytest.raises(InputError, match="train and test are the same split, 'train'"):
        load_text_data(hub(hub_folder, test="train"), tokenizer, 0)
    with pytest.raises(InputError, match=r"split validation: cannot load it"):
        load_text_data(hub(hub_folder, test="validation"), tokenizer, 0)
    with pytest.raises(InputError, match=r"data: /nowhere/at/all, split test: cannot load it"):
        load_text_data(hub(Path("/nowhere/at/all")), tokenizer, 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the datasets library: pip install 'fips-onnx\[hub\]'"):
        load_text_data(hub(hub_folder), tokenizer, 0)
