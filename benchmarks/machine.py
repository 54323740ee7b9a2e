"""The machine and the software that figures hold for."""

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.without_avx512 import HIDDEN_FLAGS, is_hidden
from pipeline.plumbing.hardware import describe_hardware

_RELEVANT_FLAGS = ("avx", "amx", "fma", "f16c", "bmi2", "asimd", "sve", "i8mm", "bf16")
"""Beginnings of the names of instruction sets for vectors and matrices."""


def describe_machine() -> dict[str, Any]:
    """Processor, instruction sets, cores, memory, versions, and the kernels asked for with FIPS_ORT_ISA."""
    return {
        **describe_hardware().model_dump(),
        "instruction_sets": _instruction_sets(),
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "FIPS_ORT_ISA": os.environ.get("FIPS_ORT_ISA", "best of this processor"),
    }


def last_level_cache_bytes() -> int | None:
    """Size of the first core's largest cache; None where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip().removesuffix("K")) * 1024 for file in sizes), default=None)


def _instruction_sets() -> list[str]:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return []
    for line in information.read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):
            flags = [flag for flag in line.partition(":")[2].split() if flag.startswith(_RELEVANT_FLAGS)]
            return sorted(flag for flag in flags if not (is_hidden() and flag.startswith(HIDDEN_FLAGS)))
    return []
