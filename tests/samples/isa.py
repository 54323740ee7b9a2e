"""Which instruction sets of the native kernels this machine can run."""

import ctypes
import platform
from pathlib import Path

X86_FLAGS = {
    "generic": set(),
    "avx2": {"avx2", "fma", "bmi2", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi", "avx512_vbmi2",
               "fma", "bmi2", "f16c"},
}
"""The flags in /proc/cpuinfo that each needs."""

AT_HWCAP = 16
HWCAP_ASIMDDP = 1 << 20
AARCH64_CAPABILITIES = {"generic": 0, "neon": 0, "neon_dotprod": HWCAP_ASIMDDP}
"""The bits of AT_HWCAP that each needs; NEON is part of every 64-bit Arm CPU that runs Linux."""


def available_isas() -> list[str]:
    """Names for FIPS_ORT_ISA, the most general first."""
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        flags = set(line.split(":", 1)[1].split())
        return [name for name, needs in X86_FLAGS.items() if needs <= flags]
    if platform.system() == "Linux" and platform.machine() == "aarch64":
        capabilities = hardware_capabilities()
        return [name for name, needs in AARCH64_CAPABILITIES.items() if needs & capabilities == needs]
    return ["generic"]


def hardware_capabilities() -> int:
    """AT_HWCAP: of the emulated CPU under qemu, where /proc/cpuinfo may be the host's."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    capabilities: int = getauxval(AT_HWCAP)
    return capabilities
