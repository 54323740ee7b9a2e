"""The manifest of an artefact, ``fips.json``: which files and tensors it holds, and what it must compute.

Reading a manifest trusts nothing in it: every path must stay inside the artefact's folder, every file must have
the size and SHA-256 that are written down.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from fips_ort.errors import ArtifactError

MANIFEST = "fips.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the artefact: ``path`` relative to its folder (with slashes), size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """An initializer of the graph: ONNX type name, stored bytes, and the file that holds them."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """A packed matrix [rows, columns]. ``segments``: entries along ``segment_axis`` stored with 8, 4, 3 and 2 bits.

    ``bytes`` counts codes, pattern and scales.
    """

    name: str
    rows: int
    columns: int
    block_size: int
    segments: list[int]
    segment_axis: int
    midrise: bool
    pattern: str
    bytes: int


@dataclass(frozen=True, slots=True)
class GoldenEntry:
    """What the model must compute: ``inputs`` and ``outputs`` by their names in the graph, each in an ``.npy`` file.

    An output reproduces a golden one if no element differs by more than ``tolerance`` times the largest
    magnitude in the golden output. A golden output may hold the last entries along an axis only (the logits after
    the last token of a text). Inputs of a language model are its tokens; mask and empty cache follow from the graph.
    """

    inputs: dict[str, str]
    outputs: dict[str, str]
    tolerance: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that ``fips.json`` says. ``model`` and ``library`` are paths of the graph and of the native kernels in the
    folder; ``recipe`` and ``versions`` (library → version) say what the artefact was made from and with."""

    model: str
    library: str
    files: list[FileEntry]
    tensors: list[TensorEntry]
    weights: list[WeightEntry]
    golden: GoldenEntry
    recipe: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> str:
        """The text of ``fips.json``. Inverse: :func:`parse_manifest`."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    def check_paths(self, folder: Path) -> None:
        """Raise ArtifactError unless every path of the manifest leads to a place inside ``folder``."""
        for path in [entry.path for entry in self.files] + self._references():
            inside(folder, path)

    def check_files(self, folder: Path, *, hashes: bool = True) -> None:
        """Raise ArtifactError, naming the file, if one is missing, has another size or (``hashes``) other bytes."""
        self.check_paths(folder)
        unlisted = sorted(set(self._references()) - {entry.path for entry in self.files})
        if unlisted:
            raise ArtifactError(f"{folder / MANIFEST}: refers to files it does not list: {', '.join(unlisted)}")
        for entry in self.files:
            path = folder / entry.path
            if not path.is_file():
                raise ArtifactError(f"{path}: file is missing")
            size = path.stat().st_size
            if size != entry.bytes:
                raise ArtifactError(f"{path}: file has {size} bytes, the manifest says {entry.bytes}")
            if hashes and sha256(path) != entry.sha256:
                raise ArtifactError(f"{path}: SHA-256 differs from the manifest's; the file is damaged or was changed")

    def _references(self) -> list[str]:
        golden = [*self.golden.inputs.values(), *self.golden.outputs.values()]
        return [self.model, self.library, *golden, *dict.fromkeys(tensor.file for tensor in self.tensors)]


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder/fips.json``. Raises ArtifactError if it is missing, malformed, of another schema version, or
    names a path outside the folder. The files themselves are checked by :meth:`Manifest.check_files`."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: file is missing; is this the folder of an artefact?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from None
    manifest = parse_manifest(text, str(path))
    manifest.check_paths(folder)
    return manifest


def parse_manifest(text: str, where: str) -> Manifest:
    """Build a manifest from the ``text`` of a ``fips.json``. Inverse of :meth:`Manifest.to_json`.

    ``where`` names the manifest in errors. Raises ArtifactError for what is malformed or of another schema version.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{where}: a manifest is a JSON object, got {type(content).__name__}")
    version = content.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{where}: schema_version is {version!r}, this version of fips_ort reads {SCHEMA_VERSION}")
    lists = {"files": FileEntry, "tensors": TensorEntry, "weights": WeightEntry}
    for key, kind in lists.items():
        entries = content.get(key)
        if not isinstance(entries, list):
            raise ArtifactError(f"{where}: {key}: expected a list, got {type(entries).__name__}")
        content[key] = [_build(kind, entry, f"{where}: {key}[{index}]") for index, entry in enumerate(entries)]
    content["golden"] = _build(GoldenEntry, content.get("golden"), f"{where}: golden")
    manifest: Manifest = _build(Manifest, content, where)
    return manifest


def inside(folder: Path, relative: str) -> Path:
    """The path of ``relative`` in ``folder``. Raises ArtifactError if it is absolute, or leads outside by ``..`` or
    a symbolic link."""
    pure = PurePosixPath(relative)
    unsafe = pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in relative or ":" in relative
    path = folder / relative
    if unsafe or not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder / MANIFEST}: path {relative!r} leads outside the artefact's folder")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(kind: Any, entry: Any, where: str) -> Any:
    """An instance of the dataclass ``kind`` from a JSON object with exactly its fields."""
    if not isinstance(entry, dict):
        raise ArtifactError(f"{where}: expected an object, got {type(entry).__name__}")
    expected = {field.name: field.type for field in fields(kind)}
    if entry.keys() != expected.keys():
        differing = sorted(entry.keys() ^ expected.keys())
        raise ArtifactError(f"{where}: missing or unknown keys: {', '.join(differing)}")
    for name, annotation in expected.items():
        if not _matches(entry[name], annotation):
            raise ArtifactError(f"{where}: {name}: expected {_name(annotation)}, got {entry[name]!r:.80}")
    return kind(**entry)


def _matches(value: Any, annotation: Any) -> bool:
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return isinstance(value, annotation)
    arguments = annotation.__args__
    if annotation.__origin__ is list:
        return isinstance(value, list) and all(_matches(item, arguments[0]) for item in value)
    if arguments[1] is Any:
        return isinstance(value, dict)
    return isinstance(value, dict) and all(_matches(item, arguments[1]) for item in value.values())


def _name(annotation: Any) -> str:
    return annotation.__name__ if annotation in (str, int, bool, float) else str(annotation)
