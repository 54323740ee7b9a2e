"""Values at the ends of float32, in activations, scales and bias: every kernel of docs/ops.md."""

import subprocess
import sys
from collections.abc import Iterator, Sequence

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


def layouts(pattern: str) -> list[Layout]:
    """The bit-widths and block sizes that kernels of docs/ops.md differ by."""
    kind = Pattern.parse(pattern)
    return [
        Layout(37, 192, 64, (0, 37, 0, 0), pattern=kind),
        Layout(9, 192, 64, (9, 0, 0, 0), midrise=True, pattern=kind),
        Layout(70, 256, 128, (0, 30, 33, 7), pattern=kind),
        Layout(20, 4 * 64, 64, (64, 64, 64, 64), 1, True, kind),
        *([Layout(20, 3 * 96, 96, (0, 0, 9, 11), pattern=kind)] if pattern != "1:8" else []),
    ]


class Node:
    """One product, in a session for each instruction set."""

    def __init__(
        self, weight: PackedWeight, trans_b: bool, accuracy_level: int, bias: np.ndarray | None = None
    ) -> None:
        self.weight, self.trans_b, self.accuracy_level, self.bias = weight, trans_b, accuracy_level, bias
        self.k = weight.layout.columns if trans_b else weight.layout.rows
        model = op_model(weight, trans_b, accuracy_level, bias, functions=[]).SerializeToString()
        self.sessions = {}
        for isa in available_isas():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("FIPS_ORT_ISA", isa)
                options = session_options()
                fips_ort.register(options)
                self.sessions[isa] = onnxruntime.InferenceSession(model, options)

    def check(self, a: np.ndarray, windows: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
        """The outputs for rows (first, how many) of ``a``, which are the specification's."""
        expected = expected_outputs(a, self.weight, trans_b=self.trans_b, bias=self.bias,
                                    accuracy_level=self.accuracy_level)
        for isa, session in self.sessions.items():
            for first, m in windows:
                rows = slice(first, first + m)
                (y,) = session.run(None, {"A": a[rows]})
                excess = expected[rows].excess(y)
                place = np.unravel_index(excess.argmax(), excess.shape)
                wanted = expected.outputs[rows][place]
                assert excess.max() <= 1, (isa, self.weight.layout, first, m, place, y[place], wanted)
                yield y

    def check_counts(self, a: np.ndarray) -> Iterator[np.ndarray]:
        return self.check(a, [(0, m) for m in ROW_COUNTS])


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
def test_activations_of_every_magnitude(pattern: str, trans_b: bool, accuracy_level: int) -> None:
    """Rows of each kind alone, and with the others: no row changes another."""
    rng = np.random.default_rng(0)
    for layout in layouts(pattern):
        node = Node(random_weight(rng, layout), trans_b, accuracy_level)
        kinds = values(rng, (10, node.k))
        a = np.concatenate(list(kinds.values())).astype(np.float32)
        alone = [(10 * kind, m) for kind in range(len(kinds)) for m in (1, 2, 5)]
        for _ in node.check(a, alone):
            pass
        rng.shuffle(a)
        for _ in node.check_counts(a[:128]):
            pass


@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
def test_tiny_activations_with_scales_of_every_size(trans_b: bool, accuracy_level: int) -> None:
    """Issue 17, 33: every activation 4e-33, scale 0.01, and its kind."""
    rng = np.random.default_rng(0)
    for pattern in PATTERNS:
        for scale in (0.01, 6e-8, 0.0, 65504.0):
            weight = random_weight(rng, Layout(70, 192, 64, (0, 30, 33, 7), pattern=Pattern.parse(pattern)))
            weight.scales[:] = scale
            bias = rng.standard_normal(70 if trans_b else 192).astype(np.float32) if scale == 0.01 else None
            node = Node(weight, trans_b, accuracy_level, bias)
            a = np.concatenate([np.full((1, node.k), 4e-33), rng.standard_normal((127, node.k)) * 4e-33])
            for y in node.check_counts(a.astype(np.float32)):
                assert np.isfinite(y).all()


def test_outputs_scale_with_activations() -> None:
    """Powers of two change nothing but exponents: to the last bit, from subnormal activations to the largest."""
    rng = np.random.default_rng(0)
    for pattern in PATTERNS:
        weight = random_weight(rng, Layout(40, 192, 64, (0, 20, 10, 10), pattern=Pattern.parse(pattern)))
        for trans_b, accuracy_level in MODES:
            node = Node(weight, trans_b, accuracy_level)
            a = rng.integers(-100, 100, (5, node.k)).astype(np.float32)
            for session in node.sessions.values():
                for m in (1, 5):
                    (ordinary,) = session.run(None, {"A": a[:m]})
                    for power in (-80, 64, 100):
                        (y,) = session.run(None, {"A": a[:m] * np.float32(2.0**power)})
                        np.testing.assert_array_equal(y, ordinary * np.float32(2.0**power))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
def test_values_that_are_not_finite_stay_in_their_rows(trans_b: bool, accuracy_level: int, value: float) -> None:
    rng = np.random.default_rng(0)
    for pattern in PATTERNS:
        for layout in layouts(pattern):
            node = Node(random_weight(rng, layout), trans_b, accuracy_level)
            a = rng.standard_normal((128, node.k)).astype(np.float32)
            a[[0, 3, 99], rng.integers(node.k, size=3)] = value
            for y in node.check_counts(a):
                bad = np.isin(np.arange(len(y)), (0, 3, 99))
                assert np.isfinite(y[~bad]).all()
                assert not np.isfinite(y[bad]).any()
                if np.isnan(value) or (accuracy_level == 4 and trans_b):
                    assert np.isnan(y[bad]).all()


@pytest.mark.parametrize(("trans_b", "accuracy_level"), MODES)
def test_scales_and_bias_that_are_not_finite_stay_in_their_outputs(trans_b: bool, accuracy_level: int) -> None:
    rng = np.random.default_rng(0)
    for pattern in PATTERNS:
        for layout in layouts(pattern):
            weight = random_weight(rng, layout)
            weight.scales.reshape(-1)[rng.integers(weight.scales.size)] = rng.choice((np.nan, np.inf))
            bias = rng.standard_normal(layout.rows if trans_b else layout.columns).astype(np.float32)
            bias[3] = rng.choice((np.nan, np.inf))
            node = Node(weight, trans_b, accuracy_level, bias)
            for y in node.check_counts(rng.standard_normal((128, node.k)).astype(np.float32)):
                assert not np.isfinite(y[:, 3]).any()


def test_rows_that_keep_nothing_are_off_by_the_rounding_of_their_terms() -> None:
    """Issue 17, 40: all outputs near zero, where a share of the largest is no bound of rounding errors."""
    rng = np.random.default_rng(0)
    weight = random_weight(rng, Layout(24, 384, 96, (0, 24, 0, 0), midrise=True, pattern=Pattern.parse("bitmap")))
    empty = PackedWeight(weight.layout, weight.codes[:0], np.zeros_like(weight.pattern), weight.scales)
    node = Node(empty, True, 4)
    for y in node.check(rng.standard_normal((16, node.k)).astype(np.float32), [(0, 1), (1, 2), (0, 16)]):
        assert np.abs(y).max() < 1e-4


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
        excess = expected[:m].excess(y, flushed=True)
        assert excess.max() <= 1, (model.graph.node[0], size, m, excess.max())
print(len(cases))
"""


@pytest.mark.parametrize("isa", available_isas())
def test_subnormal_numbers_may_count_as_zero(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session option, in a process of its own: it holds for the whole thread."""
    monkeypatch.setenv("FIPS_ORT_ISA", isa)
    result = subprocess.run([sys.executable, "-c", FLUSHED, *sys.path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(len(PATTERNS) * 4 * 4)]
