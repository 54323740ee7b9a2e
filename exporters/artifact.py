"""The artefact: a folder with graph, weights, manifest and all an edge device needs beside onnxruntime.

It is written into a sibling folder and moved into place when complete, so that an artefact that was there
before survives a full disk or a crash. Nothing in it depends on time or place: two runs write the same bytes.

Only artefacts are replaced and deleted: folders with a manifest, and with no file beside those that it lists.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.passes import group_by_bytes, tensor_of
from fips_ort.errors import ArtifactError
from fips_ort.manifest import (
    MANIFEST,
    FileEntry,
    GoldenEntry,
    Manifest,
    TensorEntry,
    WeightEntry,
    read_manifest,
    sha256,
)
from fips_ort.native import library_path
from fips_ort.packed import PackedWeight

MODEL = "model.onnx"
INLINE_BYTES = 256
"""Initializers below this size stay in the graph: shapes and scalars, which graph optimizers read."""
_PAGE, _LINE = 4096, 64
_WRITING = ".being-written"
"""File in an artefact that is not complete yet; without it, a folder there is somebody else's."""


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """Inputs and the outputs the model must give for them, by name; float32 or int64 arrays.

    ``tolerance``: allowed difference relative to the largest magnitude of an output. At accuracy_level 0 all
    backends compute in float32 and differ only in the order of summation (about 1e-6); 1e-3 is the bound at
    which parity is a failure. With int8 activations (level 4) the native kernels also round activations.
    """

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    tolerance: float = 1e-3


@dataclass(frozen=True, slots=True)
class Provenance:
    """What an artefact says about itself: ``title`` and ``notes`` (Markdown: model, licence terms) go into its
    README, ``recipe`` and library ``versions`` into the manifest."""

    title: str
    notes: str
    recipe: dict[str, Any]
    versions: dict[str, str]


def write_artifact(
    folder: Path,
    model: ir.Model,
    weights: Mapping[str, PackedWeight],
    golden: Golden,
    provenance: Provenance,
    save_config: Callable[[Path], object],
    max_shard_size: int,
    known: Collection[str] = (),
) -> Manifest:
    """Write the artefact into ``folder``, replacing one that is there.

    ``weights``: every packed matrix by name, for the manifest. ``save_config`` is called with the folder being written
    and saves config.json, preprocessor_config.json and whatever else belongs to the model. ``known``: files of the old
    artefact, should its manifest be damaged. Raises ArtifactError if ``folder`` holds something else than an artefact,
    or more (:func:`check_replaceable`), the disk is too small or a write fails; then ``folder`` is as it was before.
    """
    check_replaceable(folder, known)
    recover(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    library = library_path()
    # The initializers of the copy come to refer to files; those of ``model`` keep their data.
    model = model.clone()
    initializers = group_by_bytes(model.graph.initializers.values())
    _check_space(folder.parent, initializers, golden, library)
    partial = _sibling(folder, "partial")
    try:
        _delete(partial)
        partial.mkdir()
        (partial / _WRITING).touch()
        save_config(partial)
        tensors = _write_model(partial, model, initializers, max_shard_size)
        shutil.copyfile(library, partial / library.name)
        (partial / "README.md").write_text(_readme(provenance, golden), encoding="utf-8")
        golden_files = _write_golden(partial, golden)
        manifest = Manifest(
            model=MODEL,
            library=library.name,
            golden=golden_files,
            tensors=tensors,
            weights=[_weight_entry(name, weight) for name, weight in weights.items()],
            files=_list_files(partial),
            recipe=provenance.recipe,
            versions=provenance.versions,
        )
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        _synchronize(partial / MANIFEST)
        (partial / _WRITING).unlink()
        check_replaceable(folder, known)
        _move_into_place(partial, folder)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what went wrong first is what the user has to know
            _delete(partial)
        if isinstance(error, OSError):
            raise ArtifactError(f"{folder}: cannot write the artefact: {error.strerror or error}") from error
        raise
    return manifest


def check_replaceable(folder: Path, known: Collection[str] = ()) -> None:
    """Raise ArtifactError unless ``folder``, and the siblings in which an artefact is written and kept, are not there
    or hold an artefact and nothing else.

    ``known``: files of the artefact in ``folder``, should its manifest be damaged; paths with slashes.
    """
    _check_own(folder, known)
    _check_own(_sibling(folder, "old"), known)
    partial = _sibling(folder, "partial")
    if partial.is_symlink() or not (partial / _WRITING).is_file():
        _check_own(partial)


def delete_artifact(folder: Path) -> None:
    """Delete the artefact in ``folder``, if there is one. Raises ArtifactError if it holds something else."""
    _check_own(folder)
    _delete(folder)


def recover(folder: Path) -> None:
    """Put back the old artefact if a crash hit between moving it away and moving the new one in."""
    old = _sibling(folder, "old")
    if not old.exists():
        return
    if folder.exists():
        _delete(old)
    else:
        os.replace(old, folder)


def _check_own(folder: Path, known: Collection[str] = ()) -> None:
    """Raise ArtifactError if there is anything in ``folder`` that is no part of an artefact."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ArtifactError(f"{folder}: exists and is no artefact, but a file or link; it is left untouched: move it")
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
    if not found:
        return
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(
            f"{folder}: exists and is no artefact (it has no {MANIFEST}); it is left untouched: move it away"
        )
    own = {MANIFEST, *known}
    try:
        own |= {entry.path for entry in read_manifest(folder).files}
    except ArtifactError as error:
        if not known:
            raise ArtifactError(
                f"{folder}: exists, and which files are the artefact's cannot be told ({error}); it is left untouched: "
                "move it away"
            ) from None
    foreign = [path for path in found if path not in own]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ArtifactError(
            f"{folder / foreign[0]}{more}: is no part of the artefact there ({MANIFEST} does not list it) and would be "
            "lost with it; move it away"
        )


def _delete(folder: Path) -> None:
    """Delete a folder of ours, what marks it as such last: a killed deletion leaves nothing that looks foreign."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name in (_WRITING, MANIFEST)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.rmdir()


def plan_shards(sizes: list[int], max_shard_size: int) -> list[list[tuple[int, int]]]:
    """Distribute tensors, in order, over files: per file a list of (index of the tensor, offset).

    Offsets are multiples of 64 (a cache line), and of 4096 (a page) for tensors of 1 MiB or more. A tensor larger
    than ``max_shard_size`` gets a file of its own. ``sizes`` and ``max_shard_size`` in bytes.

    :func:`onnx_ir.save` fills shards in the same way, but knows pages only: it would pad every tensor to 4096 bytes,
    or leave float16 scales behind a bitmap of odd length at an odd address.
    """
    shards: list[list[tuple[int, int]]] = []
    end = 0
    for index, size in enumerate(sizes):
        alignment = _PAGE if size >= 1 << 20 else _LINE
        offset = -(-end // alignment) * alignment
        if not shards or offset + size > max_shard_size:
            shards.append([])
            offset = 0
        shards[-1].append((index, offset))
        end = offset + size
    return shards


def shard_names(count: int) -> list[str]:
    """``model.onnx.data``, or ``model-00001-of-0000N.onnx.data`` and so on, as :func:`onnx_ir.save` names them."""
    if count == 1:
        return [f"{MODEL}.data"]
    return [f"model-{number:05d}-of-{count:05d}.onnx.data" for number in range(1, count + 1)]


def _write_model(
    folder: Path, model: ir.Model, initializers: list[list[ir.Value]], max_shard_size: int
) -> list[TensorEntry]:
    """Write the graph, and initializers of :data:`INLINE_BYTES` or more into shards, to which ``model`` then refers.

    Each of the groups ``initializers`` has equal bytes, which are stored in one place; :func:`onnx_ir.save` would store
    them once for each.
    """
    stored = [same for same in initializers if tensor_of(same[0]).nbytes >= INLINE_BYTES]
    shards = plan_shards([tensor_of(same[0]).nbytes for same in stored], max_shard_size)
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        with (folder / name).open("wb") as file:
            for index, offset in shard:
                file.write(bytes(offset - file.tell()))
                file.write(tensor_of(stored[index][0]).tobytes())
                for value in stored[index]:
                    value.const_value = _external(value, folder, name, offset)
    ir.save(model, folder / MODEL)
    return [_tensor_entry(value) for value in model.graph.initializers.values()]


def _external(value: ir.Value, folder: Path, name: str, offset: int) -> ir.ExternalTensor:
    tensor = tensor_of(value)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(
        name, offset, tensor.nbytes, tensor.dtype, shape=shape, name=value.name or "", base_dir=folder
    )


def _tensor_entry(value: ir.Value) -> TensorEntry:
    tensor = tensor_of(value)
    return TensorEntry(
        name=value.name or "",
        dtype=tensor.dtype.name,
        shape=list(tensor.shape.numpy()),
        bytes=tensor.nbytes,
        file=str(tensor.location) if isinstance(tensor, ir.ExternalTensor) else MODEL,
    )


def _write_golden(folder: Path, golden: Golden) -> GoldenEntry:
    (folder / "golden").mkdir()

    def write(arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        for name, array in arrays.items():
            np.save(folder / "golden" / f"{name}.npy", array, allow_pickle=False)
        return {name: f"golden/{name}.npy" for name in arrays}

    return GoldenEntry(write(golden.inputs), write(golden.outputs), golden.tolerance)


def _weight_entry(name: str, weight: PackedWeight) -> WeightEntry:
    layout = weight.layout
    return WeightEntry(
        name=name,
        rows=layout.rows,
        columns=layout.columns,
        block_size=layout.block_size,
        segments=list(layout.segments),
        segment_axis=layout.segment_axis,
        midrise=layout.midrise,
        pattern=str(layout.pattern),
        bytes=weight.nbytes,
    )


def _list_files(folder: Path) -> list[FileEntry]:
    entries = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _WRITING):
        _synchronize(path)
        entries.append(FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, sha256(path)))
    return entries


def _synchronize(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check_space(parent: Path, initializers: list[list[ir.Value]], golden: Golden, library: Path) -> None:
    arrays = [*golden.inputs.values(), *golden.outputs.values()]
    tensors = [tensor_of(same[0]).nbytes + _LINE for same in initializers]
    # The last term is for graph, manifest, configuration and the padding of large tensors.
    needed = sum(tensors) + sum(array.nbytes for array in arrays) + library.stat().st_size + (4 << 20)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ArtifactError(f"{parent}: the artefact needs about {needed:,} bytes of disk, {free:,} are free")


def _move_into_place(partial: Path, folder: Path) -> None:
    old = _sibling(folder, "old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(partial, folder)
    except OSError:
        recover(folder)
        raise
    with contextlib.suppress(OSError):  # the next one to write deletes it
        _delete(old)


def _sibling(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}")


def _readme(provenance: Provenance, golden: Golden) -> str:
    usage = _LANGUAGE_MODEL if "input_ids" in golden.inputs else _classifier_usage(golden)
    return f"""# {provenance.title}

{usage}

The Python packages `fips-ort`, `onnxruntime` (1.17 or newer) and `numpy` are needed. Without `fips-ort`, any ONNX
Runtime opens `{MODEL}` by its path and computes the same from the functions in the model, more slowly. Programs in
other languages register the native library in this folder with their session options (`RegisterCustomOps`).

`python -m fips_ort.validate FOLDER` proves that the folder is complete, unchanged and computes what it should.

## Notes

{provenance.notes}
"""


def _classifier_usage(golden: Golden) -> str:
    shapes = {name: ("batch", *array.shape[1:]) for name, array in golden.inputs.items()}
    inputs = ", ".join(f"`{name}` ({' × '.join(map(str, shape))})" for name, shape in shapes.items())
    feeds = ", ".join(f'"{name}": {name}' for name in shapes)
    return f"""An image classifier with MLPs in packed low-bit weights (FiPS). Inputs: {inputs};
outputs: {', '.join(f'`{name}`' for name in golden.outputs)}.

## Load it

```python
from fips_ort.load import load

session = load("path/to/this/folder")
({', '.join(golden.outputs)},) = session.run(None, {{{feeds}}})
```"""


_LANGUAGE_MODEL = """A causal language model with MLPs in packed low-bit weights (FiPS). `genai_config.json` makes this
folder a model of onnxruntime-genai, native kernels included.

## Load it

With onnxruntime-genai:

```python
import onnxruntime_genai

model = onnxruntime_genai.Model("path/to/this/folder")
tokenizer = onnxruntime_genai.Tokenizer(model)
```

With plain onnxruntime:

```python
from fips_ort.causal_lm import greedy_tokens, prefill_inputs
from fips_ort.load import load

session = load("path/to/this/folder")
(logits,) = session.run(["logits"], prefill_inputs(session, input_ids))  # input_ids: int64 [batch, tokens]
tokens = greedy_tokens(session, [2, 651, 3413], count=20)
```

Padding of a batch, zeros in `attention_mask`, may stand on either side."""
