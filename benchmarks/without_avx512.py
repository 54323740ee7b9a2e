"""A process that takes its CPU for one without AVX-512.

ONNX Runtime chooses kernels by what CPUID tells and knows no setting. A preloaded library (``hide_avx512.c``) makes
that instruction fault, and answers in its place.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.plumbing.errors import InputError

HIDDEN_FLAGS = ("avx512", "avx_vnni", "avx_ifma", "avx_ne", "amx")
"""Beginnings of the names in /proc/cpuinfo of the instruction sets that are hidden."""
_SOURCE = Path(__file__).with_name("hide_avx512.c")
_PRELOAD = "LD_PRELOAD"


def is_hidden() -> bool:
    """Whether this process is one of :func:`run_without_avx512`."""
    return "FIPS_AVX512_HIDDEN" in os.environ


def run_without_avx512(module: str, arguments: Sequence[str]) -> int:
    """Run ``python -m module`` on a CPU that seems to have no AVX-512; returns its exit status.

    Raises InputError if the library cannot be built, or, in the new process, if the CPU still shows AVX-512.
    """
    if _SOURCE.stem in os.environ.get(_PRELOAD, ""):
        raise InputError("--without-avx512: this machine cannot hide features of its CPU (arch_prctl, ARCH_SET_CPUID)")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{_SOURCE.stem}.so"
        compiler = os.environ.get("CC", "cc")
        try:
            subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(f"--without-avx512: {_SOURCE.name} cannot be built: {error}") from error
        environment = {**os.environ, _PRELOAD: str(library)}
        return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode
