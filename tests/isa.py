"""Which instruction sets of the native kernels this machine can run."""

import platform
from pathlib import Path

NEEDS = {
    "generic": set(),
    "avx2": {"avx2", "fma", "bmi2", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi", "avx512_vbmi2",
               "fma", "bmi2", "f16c"},
}


def available_isas() -> list[str]:
    """Names for FIPS_ORT_ISA, the most general first."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return ["generic"]
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":", 1)[1].split())
    return [name for name, needs in NEEDS.items() if needs <= flags]
