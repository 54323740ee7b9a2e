"""The kernels under the address and undefined-behaviour sanitizers, without ONNX Runtime."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from isa import available_isas
from kernel_table import differences
from op_samples import layouts, random_weight

from fips_ort.layout import BIT_WIDTHS, PATTERNS, Layout, Pattern
from fips_ort.ops import node_attributes
from fips_ort.packed import PackedWeight
from fips_ort.reference import q_matmul

SOURCE = Path(__file__).with_name("native")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    assert cmake, "cmake is needed (pip install cmake)"
    build = tmp_path_factory.mktemp("driver")
    for command in ([cmake, "-S", SOURCE, "-B", build], [cmake, "--build", build, "--target", "driver", "-j", "2"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return build / "driver"


SOUND, MALFORMED, ANYTHING = 0, 1, 2


def header(weight: PackedWeight, attributes: dict[str, int], m: int, kind: int) -> bytes:
    names = (
        "K", "N", "transB", "block_size", "segment_axis", "size_8bit", "size_4bit", "size_3bit", "size_2bit",
        "midrise", "accuracy_level", "keep", "of",
    )
    pattern = {"keep": weight.layout.pattern.keep, "of": weight.layout.pattern.of} | attributes
    values = [pattern[name] for name in names]
    values += [m, weight.codes.size, weight.pattern.size, weight.scales.size, kind]
    return np.array(values, np.int64).tobytes()


def sound_case(weight: PackedWeight, trans_b: bool, accuracy_level: int, m: int, rng: np.random.Generator) -> bytes:
    attributes = node_attributes(weight.layout, trans_b, accuracy_level)
    a = rng.standard_normal((m, attributes["K"])).astype(np.float32)
    bias = rng.standard_normal(attributes["N"]).astype(np.float32)
    y = q_matmul(a, weight, trans_b=trans_b, bias=bias, accuracy_level=accuracy_level)
    arrays = [weight.codes, weight.pattern, weight.scales, a, bias, y]
    return header(weight, attributes, m, SOUND) + b"".join(array.tobytes() for array in arrays)


def malformed_case(weight: PackedWeight, stream: str = "", value: np.ndarray | None = None, **changes: int) -> bytes:
    """A weight with one stream or some attributes replaced."""
    streams = {"codes": weight.codes, "pattern": weight.pattern} | ({stream: value} if stream else {})
    attributes = node_attributes(weight.layout, True, 0) | changes
    values = np.frombuffer(header(weight, attributes, 1, MALFORMED), np.int64).copy()
    values[14:16] = streams["codes"].size, streams["pattern"].size
    return values.tobytes() + streams["codes"].tobytes() + streams["pattern"].tobytes()


def sound_cases(rng: np.random.Generator) -> Iterator[bytes]:
    for pattern in PATTERNS:
        for block_size in (64, 192):
            for index, layout in enumerate(layouts(pattern, block_size, rows_unit=6)):
                weight = random_weight(rng, layout)
                for trans_b, accuracy_level in ((False, 0), (False, 4), (True, 0), (True, 4)):
                    yield sound_case(weight, trans_b, accuracy_level, (1, 2, 17)[index % 3], rng)
    for pattern, block_size in (("dense", 8), ("dense", 24), ("bitmap", 40), ("1:4", 32), ("2:4", 16), ("2:8", 96)):
        weight = random_weight(rng, Layout.uniform(11, 3 * block_size, 3, block_size, pattern=Pattern.parse(pattern)))
        for trans_b, accuracy_level in ((False, 0), (True, 0), (True, 4)):
            yield sound_case(weight, trans_b, accuracy_level, 3, rng)
    for pattern in ("dense", "bitmap", "1:4"):
        cut = random_weight(rng, Layout(577, 128, 64, (0, 77, 200, 300), pattern=Pattern.parse(pattern)))
        long = random_weight(rng, Layout(7, 8256, 64, (0, 1, 3, 3), pattern=Pattern.parse(pattern)))
        for accuracy_level in (0, 4):
            yield sound_case(cut, False, accuracy_level, 1, rng)
            yield sound_case(cut, False, accuracy_level, 2, rng)
            yield sound_case(long, True, accuracy_level, 1, rng)


def malformed_cases(rng: np.random.Generator) -> Iterator[bytes]:
    for pattern in PATTERNS:
        weight = random_weight(rng, Layout(12, 128, 64, (3, 3, 3, 3), pattern=Pattern.parse(pattern)))
        yield malformed_case(weight, "codes", weight.codes[:-1])
        yield malformed_case(weight, "codes", weight.codes[:0])
        yield malformed_case(weight, "codes", np.append(weight.codes, np.uint8(0)))
        yield malformed_case(weight, "pattern", np.append(weight.pattern, np.uint8(0)))
        yield malformed_case(weight, size_8bit=4)
        yield malformed_case(weight, size_8bit=-3)
        yield malformed_case(weight, size_2bit=2**62)
        yield malformed_case(weight, segment_axis=1)
        yield malformed_case(weight, segment_axis=2)
        yield malformed_case(weight, midrise=2)
        yield malformed_case(weight, transB=-1)
        yield malformed_case(weight, accuracy_level=1)
        yield malformed_case(weight, keep=3, of=4)
        yield malformed_case(weight, block_size=63)
        yield malformed_case(weight, block_size=0)
        yield malformed_case(weight, K=127)
        yield malformed_case(weight, N=13)
        yield malformed_case(weight, N=2**40)
        if pattern != "dense":
            yield malformed_case(weight, "pattern", weight.pattern[:-1])
        if pattern == "bitmap":
            yield malformed_case(weight, "pattern", np.full_like(weight.pattern, 255))
        if pattern in ("2:4", "2:8"):
            yield malformed_case(weight, "pattern", np.zeros_like(weight.pattern))


def test_kernels_are_clean_and_correct_under_sanitizers(driver: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sound, malformed = list(sound_cases(rng)), list(malformed_cases(rng))
    (tmp_path / "cases").write_bytes(b"".join(sound + malformed))
    isas = available_isas()
    result = subprocess.run([driver, tmp_path / "cases", *isas], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:3] for line in lines] == [[isa, str(len(sound)), str(len(malformed))] for isa in isas]


def fuzzed_case(rng: np.random.Generator) -> bytes:
    """A weight with some attributes changed, its streams of other lengths or with other bytes; or none of it."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    layout = list(layouts(pattern, rows_unit=int(rng.integers(1, 20))))[rng.integers(24)]
    weight = random_weight(rng, layout)
    attributes = node_attributes(layout, bool(rng.integers(2)), int(rng.choice((0, 4))))
    attributes |= {"keep": layout.pattern.keep, "of": layout.pattern.of}
    names = list(attributes)
    for _ in range(rng.choice((0, 0, 1, 2))):
        name = names[rng.integers(len(names))]
        choices = (0, 1, 2, 4, 8, 64, attributes[name] + 1, attributes[name] - 1, -1, 2**31, 2**40, -(2**62))
        attributes[name] = choices[rng.integers(len(choices))]
    streams = [weight.codes.copy(), weight.pattern.copy()]
    for index, stream in enumerate(streams):
        if rng.random() < 0.2:
            streams[index] = np.resize(stream, rng.integers(0, 2 * stream.size + 9))
        elif stream.size and rng.random() < 0.3:
            stream[rng.integers(0, stream.size, 3)] = rng.integers(0, 256, 3)
    names = ["K", "N", "transB", "block_size", "segment_axis", *(f"size_{bits}bit" for bits in BIT_WIDTHS), "midrise",
             "accuracy_level", "keep", "of"]
    values = [attributes[name] for name in names]
    values += [int(rng.integers(1, 7)), *(stream.size for stream in streams), 0, ANYTHING]
    return np.array(values, np.int64).tobytes() + b"".join(stream.tobytes() for stream in streams)


def test_no_attributes_and_streams_do_harm(driver: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    count = 3000
    (tmp_path / "cases").write_bytes(b"".join(fuzzed_case(rng) for _ in range(count)))
    isas = available_isas()
    result = subprocess.run([driver, tmp_path / "cases", *isas], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for line in result.stdout.splitlines():
        _, computed, refused, _ = line.split()
        assert int(computed) + int(refused) == count
        assert min(int(computed), int(refused)) > count / 5, "cases of both kinds are wanted"


def test_docs_say_which_kernel_runs(driver: Path) -> None:
    isas = available_isas()
    result = subprocess.run([driver, "kernels", *isas], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert {line.split()[0] for line in lines} == set(isas)
    assert next(differences(lines), None) is None
