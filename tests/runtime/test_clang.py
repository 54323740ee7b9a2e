"""What Clang says about the native library; `.ci/clang` installs it, builds with it and runs the tests on that."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from places import ROOT

SOURCES = ROOT / "runtime/src"
X86 = {
    "generic": "-DFIPS_PLAIN",
    "avx2": "-mavx2 -mfma -mf16c -mbmi2 -mpopcnt",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512vbmi -mavx512vbmi2 -mfma -mf16c -mbmi2 "
              "-mpopcnt",
}
ARM = {"neon": "", "neon_dotprod": "-march=armv8.2-a+dotprod"}


def check(clang: str, source: str, flags: list[str]) -> None:
    command = [clang, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", *flags,
               SOURCES / source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def clang() -> str:
    named = os.environ.get("CXX", "")
    found = shutil.which(named if "clang" in named else "clang++")
    return found or pytest.skip("no clang++ here: .ci/clang installs it")


@pytest.mark.parametrize("source", sorted(path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.cpp")
                                          if path.name != "kernels.cpp"))
def test_clang_has_no_complaint_about_what_is_compiled_once(clang: str, source: str) -> None:
    check(clang, source, ["-DFIPS_X86", "--target=x86_64-linux-gnu"])


@pytest.mark.parametrize("isa", X86)
def test_clang_has_no_complaint_about_the_kernels(clang: str, isa: str) -> None:
    check(clang, "kernels.cpp", [f"-DFIPS_ISA={isa}", "--target=x86_64-linux-gnu", *X86[isa].split()])


@pytest.mark.parametrize("isa", ARM)
def test_clang_has_no_complaint_about_the_kernels_for_arm(clang: str, isa: str) -> None:
    if not Path("/usr/aarch64-linux-gnu/include").is_dir():
        pytest.skip("no headers for 64-bit Arm (Debian: g++-aarch64-linux-gnu)")
    check(clang, "kernels.cpp", [f"-DFIPS_ISA={isa}", "--target=aarch64-linux-gnu", *ARM[isa].split()])
