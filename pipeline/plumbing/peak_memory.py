"""The largest resident set of this process, stage by stage, and memory given back between stages. Linux."""

import contextlib
import ctypes
import gc
from pathlib import Path

from fips_ort.memory import process_memory


def peak_rss_bytes() -> int:
    """Largest resident set of this process since the last :func:`give_back_memory`, else since its start."""
    return process_memory("VmHWM")


def give_back_memory() -> None:
    """Hand memory that is free, but kept by the C library, back to the system, and measure the peak anew from here.

    glibc keeps what lies below the last block in use: a training that comes after another would start with all
    that the other needed, and need its own on top.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # some sandboxes forbid it; then peaks are those since the process started
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
