"""Golden inputs and outputs: what an artefact must compute, in ``.npy`` files of plain numbers."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fips_ort.errors import ArtifactError
from fips_ort.files import inside, read_file

TOLERANCES = {0: 1e-3, 4: 0.2}
"""Allowed difference of golden outputs, relative to their largest magnitude, by the artefact's accuracy_level: 0 is
float32 summed in another order, 4 permits int8 activations. A manifest may ask for less, never for more."""
_MOST_BYTES = 1 << 28
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_array(folder: Path, path: str) -> NDArray[Any]:
    """Read the array in the file ``path`` of an artefact: integers or floating-point numbers, all finite, at least one.

    Raises ArtifactError for anything else, before memory is taken for what a file only claims to hold.
    """
    where = inside(folder, path)
    content = read_file(where, _MOST_BYTES)
    file = io.BytesIO(content)
    try:
        shape, fortran_order, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:  # of many kinds: the header is a Python literal
        raise ArtifactError(f"{where}: not a .npy file: {error}") from None
    if dtype.kind not in "iuf":
        raise ArtifactError(f"{where}: holds {dtype}, expected integers or floating-point numbers")
    if any(size < 1 for size in shape):
        raise ArtifactError(f"{where}: an array of shape {shape} holds no numbers")
    held = len(content) - file.tell()
    if math.prod(shape) * dtype.itemsize != held:
        raise ArtifactError(f"{where}: an array {dtype} of shape {shape} does not take the {held:,} bytes in the file")
    array = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C")
    if not np.isfinite(array).all():
        raise ArtifactError(f"{where}: holds numbers that are not finite")
    return array


def read_outputs(folder: Path, paths: dict[str, str]) -> dict[str, NDArray[Any]]:
    """Read golden outputs by their names (:func:`read_array`). Raises ArtifactError too for one that is all zeros,
    which every difference is infinitely large beside."""
    outputs = {name: read_array(folder, path) for name, path in paths.items()}
    for name, array in outputs.items():
        if float(np.abs(array).max()) < float(np.finfo(np.float32).tiny):
            raise ArtifactError(f"{folder / paths[name]}: all numbers are zero; they prove nothing about {name!r}")
    return outputs
