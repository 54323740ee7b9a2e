"""What a text file is follows from its content and its name; what is structured is parsed or refused, never prose."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.text_files import read_text_file
from pipeline.plumbing.errors import InputError

TEXTS = ["Keep it.", "Ünïcode\u2028and {braces}", "two\nlines"]
LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS))
RECORDS = [{"text": text} for text in TEXTS]


def documents(path: Path, content: str | bytes, field: str = "text") -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    file = read_text_file(path, field)
    assert not file.is_plain
    return file.documents


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.Jsonl", "a.ndjson", "a.json", "a.JSON", "a.txt", "a", "a.jsonl.bak"]
)
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        "\ufeff" + LINES,
        LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\r"),
        "\n\n" + LINES.replace("\n", "\n \n"),
        LINES.rstrip(),
    ],
    ids=["plain", "byte-order mark", "CR LF", "CR", "blank lines", "no last newline"],
)
def test_json_lines_under_any_name(name: str, content: str, tmp_path: Path) -> None:
    assert documents(tmp_path / name, content) == TEXTS


@pytest.mark.parametrize("name", ["a.json", "a.Json", "a.txt"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        "\ufeff" + json.dumps(RECORDS, indent=1),
        json.dumps(dict(enumerate(RECORDS))),
        "  \n" + json.dumps(RECORDS),
    ],
)
def test_json_under_any_name(name: str, content: str, tmp_path: Path) -> None:
    assert documents(tmp_path / name, content) == TEXTS


def test_a_single_record(tmp_path: Path) -> None:
    assert documents(tmp_path / "a.json", '{"text": "one", "meta": {"x": 1}}') == ["one"]
    assert documents(tmp_path / "a.jsonl", '{"body": "one"}', "body") == ["one"]


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a", "wiki.train.raw", "a.py"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Prose.\nMore.\n", "Prose.\nMore.\n"),
        ("\ufeffProse.\r\nMore.\rEnd", "Prose.\nMore.\nEnd"),
        ("[1] A footnote\n{not json}\n", "[1] A footnote\n{not json}\n"),
        ("{curly} braces", "{curly} braces"),
        ("a,b\n1,2\n", "a,b\n1,2\n"),
        ("", ""),
    ],
)
def test_plain_text(name: str, content: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    file = read_text_file(tmp_path / name, "text")
    assert file.is_plain
    assert file.documents == [text]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # By their names, whose case does not matter.
        ("a.csv", b"text\nhello\n", "a table, which is not read as text; write it as JSON Lines"),
        ("a.TSV", b"text\thello\n", "a table, .*source: hub_text"),
        ("a.parquet", b"PAR1", r"a table \(parquet\)"),
        ("a.HTML", b"<p>hello", "markup"),
        ("a.xml", b"<a/>", "markup"),
        ("a.yaml", b"text: hello\n", "markup"),
        ("a.docx", zipped(), "an archive"),
        ("a.pdf", b"%PDF-1.7", "a formatted document"),
        ("a.rtf", b"{\\rtf1 hello}", "a formatted document"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), "an archive"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd", "an archive"),
        ("a.npy", b"\x93NUMPY", "binary data"),
        # By their content, under another name.
        ("a.txt", gzip.compress(b"hello", mtime=0), r"an archive \(gzip\)"),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), r"an archive \(gzip\)"),
        ("a.txt", zipped(), r"an archive \(zip\)"),
        ("a.txt", b"%PDF-1.7\nhello", r"a formatted document \(PDF\)"),
        ("a.txt", b"\n <!DOCTYPE html><p>hello", "markup"),
        ("a.txt", b"\xef\xbb\xbf<?xml version='1.0'?>", "markup"),
        ("a.txt", b"{\\rtf1 hello}", r"a formatted document \(RTF\)"),
        # Not in UTF-8.
        ("a.txt", "hello".encode("utf-16"), "not text in UTF-8 but in UTF-16; convert it"),
        ("a.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be"), "in UTF-16"),
        ("a.txt", "hello".encode("utf-32"), "in UTF-32"),
        ("a.txt", "hello".encode("utf-16-le"), "it holds NUL bytes"),
        ("a.txt", b"hello\0there", "it holds NUL bytes"),
        ("a.txt", "größer".encode("latin-1"), r"not text in UTF-8 \(byte 2 cannot be\)"),
        # JSON that is none.
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl: line 3: not valid JSON"),
        ("a.txt", b'{"text": "a"}\nprose\n', r"a\.txt: line 2: not valid JSON"),
        ("a.json", b'[{"text": "a"},', r"a\.json: not valid JSON"),
        ("a.txt", b'[{"text": "a"},', r"a\.txt: not valid JSON"),
        ("a.txt", b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', r"a\.txt: not valid JSON: Extra data"),
        ("a.json", b"", r"a\.json: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON: it is nested too deeply"),
        ("a.json", b'{"text": ' + b"9" * 5000 + b"}", "not valid JSON: .*integer"),
        # Records without text.
        ("a.jsonl", b'["a"]\n', r"line 1: no field 'text' \(data\.field\); it has list"),
        ("a.jsonl", b'"a"\n', r"line 1: no field 'text' .*it has str"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1: no field 'text'.*it has body"),
        ("a.JSONL", b'{"text": ["a"]}\n', "line 1: field 'text' .* holds list, not text"),
        ("a.json", b'[{"text": "a"}, {"text": null}]', "record 1: field 'text' .* holds NoneType, not text"),
        ("a.txt", b'{"messages": [{"content": "a"}]}\n', "record 'messages': no field 'text'"),
        ("a.json", b"5", "expected a list or a mapping of records, found int"),
    ],
)
def test_what_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        read_text_file(tmp_path / name, "text")
    assert str(tmp_path / name) in str(refused.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)),
    st.sampled_from(["a.txt", "a.jsonl", "a.JSON", "a"]),
)
def test_any_bytes_are_text_or_refused(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        file = read_text_file(tmp_path / name, "text")
    except InputError:
        return
    if file.is_plain:
        assert file.documents[0] == content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the text: Is a directory"):
        read_text_file(tmp_path, "text")
