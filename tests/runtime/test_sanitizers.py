"""The kernels under the address and undefined-behaviour sanitizers, without ONNX Runtime."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from isa import available_isas
from kernel_cases import fuzzed_case, malformed_cases, sound_cases
from kernel_table import differences

SOURCE = Path(__file__).with_name("native")


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    assert cmake, "cmake is needed (pip install cmake)"
    build = tmp_path_factory.mktemp("driver")
    for command in ([cmake, "-S", SOURCE, "-B", build], [cmake, "--build", build, "-j", "2"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return build


@pytest.fixture(scope="module")
def driver(drivers: Path) -> Path:
    return drivers / "driver"


def test_kernels_are_clean_and_correct_under_sanitizers(driver: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sound, malformed = list(sound_cases(rng)), list(malformed_cases(rng))
    (tmp_path / "cases").write_bytes(b"".join(sound + malformed))
    isas = available_isas()
    result = subprocess.run([driver, tmp_path / "cases", *isas], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    counts = [(isa, str(len(sound)), str(len(malformed))) for isa in isas]
    assert [(line[0], line[1], line[3]) for line in lines] == counts


def test_no_attributes_and_streams_do_harm(driver: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    count = 3000
    (tmp_path / "cases").write_bytes(b"".join(fuzzed_case(rng) for _ in range(count)))
    isas = available_isas()
    result = subprocess.run([driver, tmp_path / "cases", *isas], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for line in result.stdout.splitlines():
        _, computed, _, refused, _ = line.split()
        assert int(computed) + int(refused) == count
        assert min(int(computed), int(refused)) > count / 5, "cases of both kinds are wanted"


def test_docs_say_which_kernel_runs(driver: Path) -> None:
    isas = available_isas()
    result = subprocess.run([driver, "kernels", *isas], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert {line.split()[0] for line in lines} == set(isas)
    assert next(differences(lines), None) is None


def test_attention_is_clean_and_correct_under_sanitizers(drivers: Path) -> None:
    isas = available_isas()
    result = subprocess.run([drivers / "attention_driver", "100", *isas], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [[isa, "100"] for isa in isas]
