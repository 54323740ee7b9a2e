"""GGUF files that llama.cpp's gguf-split has cut into parts, ``name-00001-of-00004.gguf`` and so on, joined again.

Transformers reads single files. A joined copy is made once, in the cache folder; it takes as much disk as the parts.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fips_ort.manifest import sha256
from pipeline.models.gguf_tokenizer import reading_gguf
from pipeline.models.packaged_gguf import cache_folder
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import digest, write_beside_others

SPLIT_COUNT = "split.count"
"""Key of the metadata that says of how many parts a file is one; absent from whole files."""
_TENSORS_COUNT = "split.tensors.count"
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def part_names(file: str) -> list[str]:
    """The names of all parts of a model of which ``file`` is one, in order; of a whole file, its own."""
    match = _NAME.fullmatch(file)
    count = int(match[3]) if match is not None else 1
    if match is None or count < 2:
        return [file]
    return [f"{match[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def joined(file: str, locate: Callable[[str], Path]) -> Path:
    """One GGUF file with the tensors of all parts of ``file`` and the metadata of the first; a whole file as it is.

    ``locate``: finds a file by name, and raises InputError for one that is not there. Raises InputError naming a part
    that is missing or no part of the same model.
    """
    parts = [locate(name).resolve() for name in part_names(file)]
    if len(parts) == 1:
        return parts[0]
    contents = _digest(tuple((str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts))
    path = cache_folder() / "gguf" / contents[:16] / f"{parts[0].stem}-joined.gguf"
    if not path.is_file():
        _join(parts, path)
    return path


@functools.cache
def _digest(parts: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 of what is in ``parts``: (path, size, time of the last change)."""
    return digest([sha256(Path(name)) for name, _, _ in parts])


def _join(parts: Sequence[Path], path: Path) -> None:
    """Write a file with the tensors of all ``parts``, which stay mapped: no more than one is in memory at a time."""
    readers = [_open(part) for part in parts]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    counts = [_value(reader, SPLIT_COUNT) for reader in readers]
    promised = _value(readers[0], _TENSORS_COUNT)
    if counts != [len(parts)] * len(parts) or promised not in (None, len(tensors)):
        raise InputError(
            f"{parts[0]}: its {len(parts)} parts do not belong together: they have {len(tensors)} tensors, "
            f"{_TENSORS_COUNT} says {promised}; {SPLIT_COUNT} is {counts}; download them again"
        )
    write_beside_others(path, lambda temporary: _write(readers, tensors, temporary))


def _write(readers: Sequence[Any], tensors: Sequence[Any], path: Path) -> None:
    import gguf

    first = readers[0]
    architecture = _value(first, gguf.Keys.General.ARCHITECTURE)
    writer = gguf.GGUFWriter(path, architecture, endianess=first.endianess)
    writer.data_alignment = first.alignment
    for field in first.fields.values():
        # The writer makes what describes the file itself.
        if field.name.startswith(("GGUF.", "split.")) or field.name == gguf.Keys.General.ARCHITECTURE:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=first.endianess)
    writer.close()


def _open(part: Path) -> Any:
    import gguf

    with reading_gguf(part):
        return gguf.GGUFReader(part)


def _value(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()
