"""The manifest of an artefact, ``fips.json``: which files and tensors it holds, and what it must compute.

Reading a manifest trusts nothing in it: every path must stay inside the artefact's folder, every file must have
the size and SHA-256 that are written down, and the graph must store the tensors that are listed, in files that are.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fips_ort.errors import ArtifactError
from fips_ort.files import MANIFEST, file_size, inside, quoted, read_file, some_of
from fips_ort.golden import TOLERANCES
from fips_ort.layout import Layout, Pattern
from fips_ort.onnx_tensors import InvalidModelError, ModelTensors, external_files, read_tensors
from fips_ort.strict_json import parse_json

SCHEMA_VERSION = 1
_MOST_BYTES = 1 << 24
_MOST_ENTRIES = 100_000
_MOST_MODEL_BYTES = 1 << 28
"""The graph's own bytes: all tensors but the smallest are in files of their own."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


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

    def check(self, where: str) -> None:
        """Raise ArtifactError, which ``where`` begins, unless a matrix can be packed so."""
        try:
            pattern = Pattern.parse(self.pattern)
            layout = Layout(
                self.rows, self.columns, self.block_size, tuple(self.segments), self.segment_axis, self.midrise, pattern
            )
        except ValueError as error:
            raise ArtifactError(f"{where}: {error}") from None
        codes = 0 if pattern.keep and not pattern.is_n_of_m else layout.code_bytes()  # of a bitmap as many as there are
        least = codes + layout.pattern_bytes + 2 * math.prod(layout.stored_scales_shape)
        if self.bytes < least:
            raise ArtifactError(f"{where}: {self.bytes} bytes are fewer than the {least} that it takes")


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
        """The text of ``fips.json``. Inverse: :func:`parse_manifest`. Raises ValueError for numbers that are not
        finite, which JSON lacks."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def check_paths(self, folder: Path) -> None:
        """Raise ArtifactError unless every path of the manifest leads to a place inside ``folder``."""
        for path in dict.fromkeys([entry.path for entry in self.files] + self._references()):
            inside(folder, path)

    def check_files(self, folder: Path, *, hashes: bool = True) -> None:
        """Raise ArtifactError, naming the file, if one is missing, has another size or (``hashes``) other bytes, or if
        the graph stores other tensors than the manifest lists, or elsewhere."""
        self.check_paths(folder)
        sizes = {entry.path: entry.bytes for entry in self.files}
        self._require_listed(folder / MANIFEST, self._references())
        for entry in self.files:
            path = folder / entry.path
            size = file_size(path)
            if size != entry.bytes:
                raise ArtifactError(f"{path}: file has {size} bytes, the manifest says {entry.bytes}")
            if hashes and sha256(path) != entry.sha256:
                raise ArtifactError(f"{path}: SHA-256 differs from the manifest's; the file is damaged or was changed")
        path = folder / self.model
        try:
            stored = read_tensors(read_file(path, _MOST_MODEL_BYTES))
        except InvalidModelError as error:
            raise ArtifactError(f"{path}: not an ONNX model that fips_ort reads: {error}") from None
        external = external_files(stored)
        self._require_listed(path, external)
        for name, end in external.items():
            if end > sizes[name]:
                raise ArtifactError(f"{path}: its tensors take {end:,} bytes of {name}, which has {sizes[name]:,}")
        self._check_tensors(folder, stored)
        bound = TOLERANCES[4 if 4 in stored.accuracy_levels else 0]
        if self.golden.tolerance > bound:
            raise ArtifactError(
                f"{folder / MANIFEST}: golden: tolerance is {self.golden.tolerance:g}, at most {bound:g} is allowed"
            )

    def _check_tensors(self, folder: Path, stored: ModelTensors) -> None:
        """Compare the initializers of the graph with those that the manifest lists."""
        found = {
            tensor.name: TensorEntry(
                tensor.name, tensor.dtype, tensor.shape, tensor.bytes, tensor.location or self.model
            )
            for tensor in stored.initializers
        }
        listed = {entry.name: entry for entry in self.tensors}
        if len(found) != len(stored.initializers):
            raise ArtifactError(f"{folder / self.model}: two initializers have one name")
        differing = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
        if differing:
            raise ArtifactError(
                f"{folder / self.model}: stores other tensors than {MANIFEST} lists, or elsewhere: {some_of(differing)}"
            )

    def _require_listed(self, where: Path, paths: Iterable[str]) -> None:
        unlisted = sorted(set(paths) - {entry.path for entry in self.files})
        if unlisted:
            does_not = "it does not list" if where.name == MANIFEST else f"{MANIFEST} does not list"
            raise ArtifactError(f"{where}: refers to files {does_not}: {some_of(unlisted)}")

    def _check_values(self, where: str) -> None:
        """Raise ArtifactError for entries of the right types that cannot be true."""
        for key, names in (
            ("files", [entry.path for entry in self.files]),
            ("tensors", [entry.name for entry in self.tensors]),
            ("weights", [entry.name for entry in self.weights]),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ArtifactError(f"{where}: {key}: listed twice: {some_of(twice)}")
        stored = [tensor.name for tensor in self.tensors] + [weight.name for weight in self.weights]
        others = [*self.golden.inputs, *self.golden.outputs, *self.versions, *self.versions.values()]
        odd = [name for name in [*stored, *others] if not name.isprintable()]
        if odd:
            raise ArtifactError(f"{where}: names with characters that cannot be printed: {some_of(odd)}")
        for index, file in enumerate(self.files):
            if file.bytes < 0 or not _SHA256.fullmatch(file.sha256):
                raise ArtifactError(f"{where}: files[{index}]: {quoted(file.path)} has no valid size and SHA-256")
        for index, tensor in enumerate(self.tensors):
            if tensor.bytes < 0 or any(size < 0 for size in tensor.shape):
                raise ArtifactError(f"{where}: tensors[{index}]: {quoted(tensor.name)} has a negative size")
        for index, weight in enumerate(self.weights):
            weight.check(f"{where}: weights[{index}]: {quoted(weight.name)}")
        if not self.model.endswith(".onnx"):
            raise ArtifactError(f"{where}: model: {quoted(self.model)} is no .onnx file")
        golden = self.golden
        if not golden.inputs or not golden.outputs:
            raise ArtifactError(f"{where}: golden: it needs inputs and outputs")
        if not 0 <= golden.tolerance <= max(TOLERANCES.values()):
            raise ArtifactError(
                f"{where}: golden: tolerance is {golden.tolerance:g}, at most {max(TOLERANCES.values()):g} is allowed"
            )

    def _references(self) -> list[str]:
        golden = [*self.golden.inputs.values(), *self.golden.outputs.values()]
        return [self.model, self.library, *golden, *dict.fromkeys(tensor.file for tensor in self.tensors)]


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder/fips.json``. Raises ArtifactError if it is missing, malformed, of another schema version, names a
    path outside the folder, or says what cannot be true. The files themselves are checked by
    :meth:`Manifest.check_files`."""
    path = inside(folder, MANIFEST)
    if not _exists(path):
        raise ArtifactError(f"{path}: file is missing; is this the folder of an artefact?")
    try:
        text = read_file(path, _MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from None
    manifest = parse_manifest(text, str(path))
    manifest.check_paths(folder)
    manifest._check_values(str(path))
    return manifest


def parse_manifest(text: str, where: str) -> Manifest:
    """Build a manifest from the ``text`` of a ``fips.json``. Inverse of :meth:`Manifest.to_json`.

    ``where`` names the manifest in errors. Raises ArtifactError for what is malformed or of another schema version.
    """
    content = parse_json(text, where)
    if not isinstance(content, dict):
        raise ArtifactError(f"{where}: a manifest is a JSON object, got {type(content).__name__}")
    version = content.pop("schema_version", None)
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{where}: schema_version is {quoted(version)}, this version of fips_ort reads {SCHEMA_VERSION}"
        )
    lists = {"files": FileEntry, "tensors": TensorEntry, "weights": WeightEntry}
    for key, kind in lists.items():
        entries = content.get(key)
        if not isinstance(entries, list):
            raise ArtifactError(f"{where}: {key}: expected a list, got {type(entries).__name__}")
        if len(entries) > _MOST_ENTRIES:
            raise ArtifactError(f"{where}: {key}: {len(entries):,} entries, at most {_MOST_ENTRIES:,} are read")
        content[key] = [_build(kind, entry, f"{where}: {key}[{index}]") for index, entry in enumerate(entries)]
    content["golden"] = _build(GoldenEntry, content.get("golden"), f"{where}: golden")
    manifest: Manifest = _build(Manifest, content, where)
    return manifest


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        pass  # reading it says why not
    return True


def _build(kind: Any, entry: Any, where: str) -> Any:
    """An instance of the dataclass ``kind`` from a JSON object with exactly its fields."""
    if not isinstance(entry, dict):
        raise ArtifactError(f"{where}: expected an object, got {type(entry).__name__}")
    expected = {field.name: field.type for field in fields(kind)}
    if entry.keys() != expected.keys():
        raise ArtifactError(f"{where}: missing or unknown keys: {some_of(sorted(entry.keys() ^ expected.keys()))}")
    for name, annotation in expected.items():
        if not _matches(entry[name], annotation):
            raise ArtifactError(f"{where}: {name}: expected {_name(annotation)}, got {quoted(entry[name])}")
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
