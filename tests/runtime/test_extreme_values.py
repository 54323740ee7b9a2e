"""Values at the ends of float32, in activations, scales and bias: every kernel of docs/ops.md, every instruction set."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
from isa import available_isas
from kernel_bounds import expected_outputs
from op_samples import op_model, random_weight, session_options

import fips_ort
from fips_ort.layout import PATTERNS, Layout, Pattern
from fips_ort.packed import PackedWeight

MODES = [(False, 0), (False, 4), (True, 0), (True, 4)]
ROW_COUNTS = (1, 2, 5, 16, 100, 128)


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FIPS_ORT_ISA", request.param)
    return str(request.param)


def layouts(pattern: str) -> list[Layout]:
    """Each bit-width alone and all together, with the block sizes that kernels of docs/ops.md differ by."""
    kind = Pattern.parse(pattern)
    found = [Layout(rows, 3 * 64, 64, tuple(rows * (width == alone) for width in range(4)), midrise=alone % 2 == 0,
                    pattern=kind) for alone in range(4) for rows in (37,)]
    found.append(Layout(70, 2 * 192, 192, (1, 30, 32, 7), pattern=kind))
    found.append(Layout(20, 4 * 128, 128, (0, 256, 128, 128), 1, True, kind))
    if kind.of != 8:
        found.append(Layout(20, 3 * 32, 32, (0, 0, 9, 11), pattern=kind))
    return found


@dataclass(frozen=True, slots=True)
class Node:
    """A session of one product."""

    weight: PackedWeight
    trans_b: bool
    accuracy_level: int
    bias: np.ndarray | None
    session: onnxruntime.InferenceSession

    @classmethod
    def of(cls, weight: PackedWeight, trans_b: bool, accuracy_level: int, bias: np.ndarray | None = None) -> "Node":
        options = session_options()
        fips_ort.register(options)
        model = op_model(weight, trans_b, accuracy_level, bias, functions=[])
        return cls(weight, trans_b, accuracy_level, bias,
                   onnxruntime.InferenceSession(model.SerializeToString(), options))

    @property
    def k(self) -> int:
        return self.weight.layout.columns if self.trans_b else self.weight.layout.rows

    def check(self, a: np.ndarray) -> np.ndarray:
        """The outputs, which are the specification's."""
        (y,) = self.session.run(None, {"A": a})
        expected = expected_outputs(a, self.weight, trans_b=self.trans_b, bias=self.bias,
                                    accuracy_level=self.accuracy_level)
        excess = expected.excess(y)
        place = np.unravel_index(excess.argmax(), excess.shape)
        assert excess.max() <= 1, (self.weight.layout, a.shape, place, y[place], expected.outputs[place])
        return y


def values(rng: np.random.Generator, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    ordinary = rng.standard_normal(shape)
    some = rng.random(shape) < 0.1
    positive = np.abs(ordinary)
    return {
        "the issue's": np.full(shape, 4e-33),
        "tiny": ordinary * 1e-36,
        "subnormal": ordinary * 1e-41,
        "the smallest": np.where(ordinary > 0, 1e-45, 0),
        "zero": np.zeros(shape),
        "large": ordinary * 1e25,
        "huge": np.clip(ordinary * 2e38, -3.4e38, 3.4e38),
        "huge, of one sign": np.minimum(positive * 2e38, 3.4e38),
        "tiny among ordinary": np.where(some, ordinary * 1e-37, ordinary),
        "zeros among ordinary": np.where(some, 0, ordinary),
        "huge among ordinary": np.where(some, ordinary * 1e37, ordinary),
        "runs of zeros and of tiny values": ordinary * np.repeat((0, 1, 1e-38, 1e-44), -(-shape[1] // 4))[: shape[1]],
        "every magnitude": ordinary * 10.0 ** rng.uniform(-45, 37, shape),
    }


@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_activations_of_every_magnitude(isa: str, pattern: str, trans_b: bool, accuracy_level: int) -> None:
    rng = np.random.default_rng(0)
    for layout in layouts(pattern):
        weight = random_weight(rng, layout)
        node = Node.of(weight, trans_b, accuracy_level)
        kinds = values(rng, (16, node.k))
        for a in kinds.values():
            node.check(a[:1].astype(np.float32))
        # All at once: no row changes another.
        a = np.concatenate(list(kinds.values())).astype(np.float32)
        rng.shuffle(a)
        for m in ROW_COUNTS[1:]:
            node.check(a[:m])


def test_the_smallest_activations_keep_their_bits(isa: str) -> None:
    """Powers of two change nothing but the exponent: outputs are those of ordinary activations, to the last bit."""
    rng = np.random.default_rng(0)
    for pattern in PATTERNS:
        weight = random_weight(rng, Layout(40, 192, 64, (0, 20, 10, 10), pattern=Pattern.parse(pattern)))
        for trans_b, accuracy_level in MODES:
            node = Node.of(weight, trans_b, accuracy_level)
            a = (rng.standard_normal((3, node.k)) * 2.0**-20).astype(np.float32)
            ordinary = node.check(a)
            for power in (-64, 64):
                (y,) = node.session.run(None, {"A": a * np.float32(2.0**power)})
                np.testing.assert_array_equal(y, ordinary * np.float32(2.0**power))


@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
def test_tiny_activations_with_tiny_scales(isa: str, trans_b: bool, accuracy_level: int) -> None:
    rng = np.random.default_rng(0)
    for pattern in PATTERNS:
        for scale in (0.01, 6e-8, 0.0, 65504.0):
            weight = random_weight(rng, Layout(70, 192, 64, (0, 30, 33, 7), pattern=Pattern.parse(pattern)))
            weight.scales[:] = scale
            node = Node.of(weight, trans_b, accuracy_level, rng.standard_normal(192 if not trans_b else 70).astype(np.float32))
            without = Node.of(weight, trans_b, accuracy_level)
            for size in (4e-33, 1e-40, 1.0, 1e38):
                for m in ROW_COUNTS:
                    a = (rng.standard_normal((m, node.k)) * size).clip(-3.4e38, 3.4e38).astype(np.float32)
                    node.check(a)
                    without.check(a)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_that_are_not_finite_stay_in_their_rows(isa: str, pattern: str, trans_b: bool, accuracy_level: int,
                                                       value: float) -> None:
    rng = np.random.default_rng(0)
    for layout in layouts(pattern):
        node = Node.of(random_weight(rng, layout), trans_b, accuracy_level)
        for m in ROW_COUNTS:
            a = rng.standard_normal((m, node.k)).astype(np.float32)
            a[m // 2, rng.integers(node.k)] = value
            y = node.check(a)
            assert not np.isfinite(y[m // 2]).any()
            assert np.isfinite(np.delete(y, m // 2, axis=0)).all()
            if np.isnan(value) or (accuracy_level == 4 and trans_b):
                assert np.isnan(y[m // 2]).all()


@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_scales_and_bias_that_are_not_finite_stay_in_their_outputs(isa: str, pattern: str, trans_b: bool,
                                                                   accuracy_level: int) -> None:
    rng = np.random.default_rng(0)
    for layout in layouts(pattern):
        for value in (np.nan, np.inf):
            weight = random_weight(rng, layout)
            weight.scales.reshape(-1)[rng.integers(weight.scales.size)] = value
            bias = rng.standard_normal(layout.rows if trans_b else layout.columns).astype(np.float32)
            bias[3] = -value
            node = Node.of(weight, trans_b, accuracy_level, bias)
            for m in ROW_COUNTS:
                y = node.check(rng.standard_normal((m, node.k)).astype(np.float32))
                assert not np.isfinite(y[:, 3]).any()


def test_rows_that_keep_nothing_are_off_by_the_rounding_of_their_terms(isa: str) -> None:
    """Issue 17, 40: all outputs near zero, where a share of the largest is no bound of rounding errors."""
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout(24, 384, 96, (0, 24, 0, 0), midrise=True, pattern=Pattern.parse("bitmap")))
    empty = PackedWeight(weight.layout, weight.codes[:0], np.zeros_like(weight.pattern), weight.scales)
    node = Node.of(empty, True, 4)
    for m in (1, 5):
        y = node.check(rng.standard_normal((m, node.k)).astype(np.float32))
        assert np.abs(y).max() < 1e-5


FLUSHED = """
import sys
sys.path[:0] = sys.argv[1:]
import numpy as np, onnxruntime, fips_ort
from kernel_bounds import expected_outputs
from op_samples import op_model, random_weight, session_options
from fips_ort.layout import PATTERNS, Layout, Pattern

rng = np.random.default_rng(0)
cases = []
for pattern in PATTERNS:
    weight = random_weight(rng, Layout(70, 192, 64, (0, 30, 33, 7), pattern=Pattern.parse(pattern)))
    weight.scales[:] = weight.scales * np.float16(2.0**-18)  # most of them subnormal halves
    for trans_b in (False, True):
        for accuracy_level in (0, 4):
            for size in (4e-33, 1e-40, 1.0, 1e38):
                a = (rng.standard_normal((16, 192 if trans_b else 70)) * size).clip(-3.4e38, 3.4e38).astype(np.float32)
                expected = expected_outputs(a, weight, trans_b=trans_b, accuracy_level=accuracy_level)
                cases.append((op_model(weight, trans_b, accuracy_level, functions=[]), a, expected, size))
for model, a, expected, size in cases:
    options = session_options()
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    fips_ort.register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    for m in (1, 2, 5, 16):
        (y,) = session.run(None, {"A": a[:m]})
        excess = np.concatenate([expected.excess(np.pad(y, ((0, 16 - m), (0, 0))), flushed=True)[:m]])
        assert excess.max() <= 1, (model.graph.node[0], size, m, excess.max())
print(len(cases))
"""


def test_subnormal_numbers_may_count_as_zero(isa: str) -> None:
    """The session option, in a process of its own: it holds for the whole thread."""
    result = subprocess.run([sys.executable, "-c", FLUSHED, *sys.path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(len(PATTERNS) * 4 * 4)]
