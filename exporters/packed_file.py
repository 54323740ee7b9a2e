"""Files of packed weights: safetensors, with their structure as JSON in the header."""

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from fips_ort.layout import Layout, Pattern
from fips_ort.packed import PackedWeight

_PARTS = ("codes", "pattern", "scales")


class PackedWriter:
    """Gathers arrays, and describes them for the structure that :class:`PackedReader` reads them by."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def weight(self, name: str, weight: PackedWeight) -> dict[str, Any]:
        """Add a weight; returns its layout as JSON can hold it."""
        self._arrays.update({f"{name}.{part}": getattr(weight, part) for part in _PARTS})
        return asdict(weight.layout)

    def optional(self, name: str, part: str, array: NDArray[Any] | None) -> bool:
        """Add an array that belongs to the weight ``name``, or none; returns whether there is one."""
        if array is not None:
            self._arrays[f"{name}.{part}"] = array
        return array is not None

    def save(self, path: Path, kind: str, structure: dict[str, Any]) -> None:
        """Write all arrays and ``structure``, which has the key ``version``."""
        contiguous = {name: np.ascontiguousarray(array) for name, array in self._arrays.items()}
        save_file(contiguous, path, metadata={kind: json.dumps(structure)})


class PackedReader:
    """Reads what :class:`PackedWriter` saved as a file of ``kind``. Raises ValueError if ``path`` is of another kind or
    version."""

    structure: dict[str, Any]

    def __init__(self, path: Path, kind: str, version: int) -> None:
        self._file = safe_open(path, framework="numpy")
        text = (self._file.metadata() or {}).get(kind)
        if text is None:
            raise ValueError(f"{path}: not a file of {kind}")
        self.structure = json.loads(text)
        if self.structure["version"] != version:
            raise ValueError(f"{path}: {kind} of version {self.structure['version']}, expected {version}")

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def weight(self, name: str, layout: dict[str, Any]) -> PackedWeight:
        """The weight called ``name``."""
        fields = {**layout, "segments": tuple(layout["segments"]), "pattern": Pattern(**layout["pattern"])}
        return PackedWeight(Layout(**fields), *(self._file.get_tensor(f"{name}.{part}") for part in _PARTS))

    def optional(self, name: str, part: str, present: bool) -> NDArray[Any] | None:
        """The array ``part`` of the weight ``name``, if it is ``present``."""
        array: NDArray[Any] | None = self._file.get_tensor(f"{name}.{part}") if present else None
        return array
