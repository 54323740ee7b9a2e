"""Local text files as documents: plain text, JSON Lines, or JSON.

Which one a file is follows from its content and its name, whose case does not matter. Markup, tables, archives and
other structured files are refused: read as prose, a model would learn their syntax.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.plumbing.errors import InputError

_JSON_LINES = {".jsonl", ".ndjson", ".jsonlines", ".ldjson"}
_JSON = {".json", ".geojson", ".ipynb"}
_REFUSED = {
    "a table": ".csv .tsv .psv .tab .xls .xlsx .ods .parquet .arrow .feather .orc .avro .dbf .sqlite .sqlite3 .db",
    "markup": ".html .htm .xhtml .mhtml .xml .svg .rss .atom .yaml .yml .toml .plist .bib .srt .vtt .wiki .json5",
    "a formatted document": ".pdf .ps .rtf .doc .docx .odt .pages .epub .mobi .azw3 .djvu .ppt .pptx .odp",
    "an archive": ".gz .tgz .zip .bz2 .xz .lzma .zst .lz4 .br .tar .7z .rar .warc",
    "binary data": ".bin .dat .npy .npz .pt .pth .pkl .pickle .msgpack .h5 .hdf5 .tfrecord .safetensors .gguf .onnx",
}
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in _REFUSED.items() for suffix in suffixes.split()}
_KIND_OF_START = {
    b"\x1f\x8b": "an archive (gzip)",
    b"PK\x03\x04": "an archive (zip), or a document that is one",
    b"BZh": "an archive (bzip2)",
    b"\xfd7zXZ\x00": "an archive (xz)",
    b"\x28\xb5\x2f\xfd": "an archive (zstd)",
    b"7z\xbc\xaf": "an archive (7z)",
    b"PAR1": "a table (parquet)",
    b"ARROW1": "a table (arrow)",
    b"SQLite format 3": "a table (SQLite)",
    b"%PDF-": "a formatted document (PDF)",
    b"%!PS": "a formatted document (PostScript)",
    b"{\\rtf": "a formatted document (RTF)",
    b"\xd0\xcf\x11\xe0": "a formatted document (of an old Office)",
}
_BROKEN_JSON = re.compile(r'\s*(\{\s*"|\[\s*\{)')
"""How JSON begins, and hardly a text."""
_MARKUP_STARTS = ("<!doctype", "<html", "<?xml", "<mediawiki", "<rss", "<svg")
_OTHER_UNICODE = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@dataclass(frozen=True)
class TextFile:
    """The documents of a file; ``is_plain``: plain text, which is one document."""

    documents: list[str]
    is_plain: bool


def read_text_file(path: Path, field: str) -> TextFile:
    """Read a file of plain text, or of JSON records with text in ``field``.

    Raises InputError for a file that is not there, is not text in UTF-8 (a byte-order mark may stand before it), or is
    structured in another way; for records that have no text in ``field``.
    """
    text = _read(path)
    suffix = path.suffix.lower()
    if suffix in _JSON_LINES:
        return TextFile(_lines(text, field, path), is_plain=False)
    if suffix in _JSON or text.lstrip().startswith(("{", "[")):
        content, wrong = _parse(text)
        if wrong is None:
            return TextFile(records_in(content, field, path), is_plain=False)
        if isinstance(_parse(text.lstrip().partition("\n")[0])[0], dict):
            return TextFile(_lines(text, field, path), is_plain=False)
        if suffix in _JSON or _BROKEN_JSON.match(text):
            raise InputError(f"{path}: not valid JSON: {wrong}")
    if text.lstrip()[:20].lower().startswith(_MARKUP_STARTS):
        raise _refusal(path, "markup")
    return TextFile([text], is_plain=True)


def records_in(content: Any, field: str, path: Path) -> list[str]:
    """The text in ``field`` of every record of a JSON document: a list of records, a mapping of names to them, or a
    single one. ``path`` begins errors. Raises InputError for anything else."""
    if isinstance(content, dict) and isinstance(content.get(field), str):
        content = [content]
    if not isinstance(content, list | dict):
        raise InputError(f"{path}: expected a list or a mapping of records, found {type(content).__name__}")
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    return [text_in(record, field, f"{path}: record {name!r}") for name, record in entries]


def text_in(record: Any, field: str, where: str) -> str:
    """The text in ``field`` of a record; ``where`` begins errors. Raises InputError where there is none."""
    if not isinstance(record, dict) or field not in record:
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where}: no field {field!r} (data.field); it has {found}")
    if not isinstance(record[field], str):
        raise InputError(f"{where}: field {field!r} (data.field) holds {type(record[field]).__name__}, not text")
    text: str = record[field]
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say half of a pair of surrogates
        raise InputError(f"{where}: field {field!r} (data.field) holds characters that are not Unicode text") from None
    return text


def read_json_file(path: Path) -> Any:
    """The content of a JSON file in UTF-8. Raises InputError where it is none."""
    content, wrong = _parse(_read(path))
    if wrong is not None:
        raise InputError(f"{path}: not valid JSON: {wrong}")
    return content


def _read(path: Path) -> str:
    """The text of a file, lines ended by a newline each."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"data: {path}: cannot read the text: {error.strerror}") from None
    kind = next((kind for start, kind in _KIND_OF_START.items() if content.startswith(start)), None)
    kind = kind or _KIND_OF_SUFFIX.get(path.suffix.lower())
    if kind is not None:
        raise _refusal(path, kind)
    encoding = next((name for mark, name in _OTHER_UNICODE.items() if content.startswith(mark)), None)
    if encoding is not None:
        raise InputError(f"data: {path}: not text in UTF-8 but in {encoding}; convert it, as iconv does")
    if b"\0" in content:
        raise InputError(f"data: {path}: not text in UTF-8: it holds NUL bytes; if it is text in UTF-16, convert it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data: {path}: not text in UTF-8 (byte {error.start} cannot be); convert it, as iconv does"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refusal(path: Path, kind: str) -> InputError:
    remedy = "take its text out into plain text (.txt) or JSON Lines (.jsonl)"
    if kind.startswith("a table"):
        remedy = "write it as JSON Lines (.jsonl), or put it into a folder and read that with source: hub_text"
    return InputError(f"data: {path}: {kind}, which is not read as text; {remedy}")


def _lines(text: str, field: str, path: Path) -> list[str]:
    documents = []
    # Not splitlines, which also cuts at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record, wrong = _parse(line)
        if wrong is not None:
            raise InputError(f"{path}: line {number}: not valid JSON: {wrong}")
        documents.append(text_in(record, field, f"{path}: line {number}"))
    return documents


def _parse(text: str) -> tuple[Any, str | None]:
    """What ``text`` says in JSON, and what is wrong with it if it says nothing."""
    try:
        return json.loads(text), None
    except ValueError as error:
        return None, str(error)
    except RecursionError:
        return None, "it is nested too deeply"
