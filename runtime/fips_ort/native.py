"""Where the native library is, and how a session comes to use it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime


def library_path() -> Path:
    """The native library of the ``ai.fips`` ops.

    Raises FileNotFoundError if this installation has none, as when the package is used from a source tree.
    """
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    name = f"{prefix}fips_ort{suffix}"
    # In an editable installation the package has two folders: the sources', and the one with what was built.
    folders = sys.modules[__package__].__path__
    for folder in folders:
        if (path := Path(folder) / name).is_file():
            return path
    raise FileNotFoundError(
        f"{name} is not in {', '.join(folders)}: install the fips-ort distribution (pip install ./runtime)"
    )


def register(options: onnxruntime.SessionOptions) -> None:
    """Let sessions made with ``options`` run ``ai.fips`` ops with the native kernels. Options that do already are left
    as they are.

    Raises FileNotFoundError without the library, and onnxruntime's exception if it is older than 1.17.
    """
    options.register_custom_ops_library(str(library_path()))
