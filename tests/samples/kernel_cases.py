"""Cases of the kernels' driver (tests/runtime/native/driver.cpp), which says how they are written."""

from collections.abc import Iterator

import numpy as np
from kernel_bounds import expected_outputs
from op_samples import layouts, random_levels, random_mask, random_row_bits, random_weight

from fips_ort.layout import BIT_WIDTHS, PATTERNS, Layout, Pattern
from fips_ort.ops import node_attributes
from fips_ort.packed import PackedWeight, pack
from fips_ort.reference import q_gather

SOUND, MALFORMED, ANYTHING, LOOKUP = 0, 1, 2, 3


def header(weight: PackedWeight, attributes: dict[str, int], m: int, kind: int, bias_size: int = 0,
           row_bits_size: int = 0) -> bytes:
    names = (
        "K", "N", "transB", "block_size", "segment_axis", "size_8bit", "size_4bit", "size_3bit", "size_2bit",
        "midrise", "accuracy_level", "keep", "of",
    )
    pattern = {"keep": weight.layout.pattern.keep, "of": weight.layout.pattern.of} | attributes
    values = [pattern[name] for name in names]
    values += [m, weight.codes.size, weight.pattern.size, weight.scales.size, kind, bias_size, row_bits_size]
    return np.array(values, np.int64).tobytes()


def sound_case(weight: PackedWeight, trans_b: bool, accuracy_level: int, a: np.ndarray,
               bias: np.ndarray | None, row_bits: np.ndarray | None = None) -> bytes:
    attributes = node_attributes(weight.layout, trans_b, accuracy_level)
    expected = expected_outputs(a, weight, trans_b=trans_b, bias=bias, row_bits=row_bits, accuracy_level=accuracy_level)
    added = np.zeros(0, np.float32) if bias is None else bias
    order = np.zeros(0, np.uint8) if row_bits is None else row_bits
    arrays = [weight.codes, weight.pattern, order, weight.scales, a, added]
    arrays += [expected.outputs, expected.allowed, expected.flushed]
    start = header(weight, attributes, len(a), SOUND, added.size, order.size)
    return start + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def ordinary_case(weight: PackedWeight, trans_b: bool, accuracy_level: int, m: int, rng: np.random.Generator,
                  row_bits: np.ndarray | None = None) -> bytes:
    attributes = node_attributes(weight.layout, trans_b, accuracy_level)
    a = rng.standard_normal((m, attributes["K"])).astype(np.float32)
    bias = rng.standard_normal(attributes["N"]).astype(np.float32)
    return sound_case(weight, trans_b, accuracy_level, a, bias, row_bits)


def lookup_case(weight: PackedWeight, indices: np.ndarray, row_bits: np.ndarray | None) -> bytes:
    order = np.zeros(0, np.uint8) if row_bits is None else row_bits
    start = header(weight, node_attributes(weight.layout, True, 0), indices.size, LOOKUP, 0, order.size)
    arrays = [weight.codes, order, weight.scales, indices, q_gather(indices, weight, row_bits)]
    return start + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def malformed_case(weight: PackedWeight, stream: str = "", value: np.ndarray | None = None, **changes: int) -> bytes:
    """A weight with one stream or some attributes replaced, or with ``row_bits``."""
    streams = {"codes": weight.codes, "pattern": weight.pattern, "row_bits": np.zeros(0, np.uint8)}
    if stream:
        streams[stream] = value
    attributes = node_attributes(weight.layout, True, 0) | changes
    values = np.frombuffer(header(weight, attributes, 1, MALFORMED), np.int64).copy()
    values[[14, 15, 19]] = [array.size for array in streams.values()]
    return values.tobytes() + b"".join(array.tobytes() for array in streams.values())


def sound_cases(rng: np.random.Generator) -> Iterator[bytes]:
    for pattern in PATTERNS:
        for block_size in (64, 192):
            for index, layout in enumerate(layouts(pattern, block_size, rows_unit=6)):
                weight = random_weight(rng, layout)
                for trans_b, accuracy_level in ((False, 0), (False, 4), (True, 0), (True, 4)):
                    yield ordinary_case(weight, trans_b, accuracy_level, (1, 2, 17)[index % 3], rng)
    for pattern, block_size in (("dense", 8), ("dense", 24), ("bitmap", 40), ("1:4", 32), ("2:4", 16), ("2:8", 96)):
        weight = random_weight(rng, Layout.uniform(11, 3 * block_size, 3, block_size, pattern=Pattern.parse(pattern)))
        for trans_b, accuracy_level in ((False, 0), (True, 0), (True, 4)):
            yield ordinary_case(weight, trans_b, accuracy_level, 3, rng)
    yield from ordered_cases(rng)
    for pattern in ("dense", "bitmap", "1:4"):
        cut = random_weight(rng, Layout(577, 128, 64, (0, 77, 200, 300), pattern=Pattern.parse(pattern)))
        long = random_weight(rng, Layout(7, 8256, 64, (0, 1, 3, 3), pattern=Pattern.parse(pattern)))
        for accuracy_level in (0, 4):
            yield ordinary_case(cut, False, accuracy_level, 1, rng)
            yield ordinary_case(cut, False, accuracy_level, 2, rng)
            yield ordinary_case(long, True, accuracy_level, 1, rng)


def ordered_cases(rng: np.random.Generator) -> Iterator[bytes]:
    """Rows of several widths in an order of their own, and looked up, with and without one."""
    for columns, block_size in ((128, 64), (256, 128), (72, 24), (1664, 64)):
        for index, segments in enumerate(((3, 5, 4, 9), (40, 0, 1100, 0), (0, 0, 65, 0), (0, 1, 0, 63))):
            layout = Layout(sum(segments), columns, block_size, segments, midrise=bool(index % 2))
            weight, row_bits = random_weight(rng, layout), random_row_bits(rng, layout)
            yield lookup_case(weight, rng.integers(0, layout.rows, 300), row_bits)
            yield lookup_case(weight, rng.integers(0, layout.rows, 3), None)
            for m, accuracy_level in ((1, 4), (5, 4), (9, 0)):
                yield ordinary_case(weight, True, accuracy_level, m, rng, row_bits)


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
        row_bits = np.repeat(np.array(BIT_WIDTHS, np.uint8), 3)
        if pattern != "dense":
            yield malformed_case(weight, "pattern", weight.pattern[:-1])
            yield malformed_case(weight, "row_bits", row_bits)
        else:
            yield malformed_case(weight, "row_bits", row_bits, transB=0, K=12, N=128)
            yield malformed_case(weight, "row_bits", row_bits[:-1])
            yield malformed_case(weight, "row_bits", np.append(row_bits, row_bits[:1]))
            yield malformed_case(weight, "row_bits", np.where(row_bits == 8, 4, row_bits).astype(np.uint8))
            for bits in (0, 1, 5, 16, 255):
                yield malformed_case(weight, "row_bits", np.where(row_bits == 8, bits, row_bits).astype(np.uint8))
        if pattern == "bitmap":
            yield malformed_case(weight, "pattern", np.full_like(weight.pattern, 255))
        if pattern in ("2:4", "2:8"):
            yield malformed_case(weight, "pattern", np.zeros_like(weight.pattern))


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
    row_bits = np.zeros(0, np.uint8)
    if pattern == "dense" and rng.random() < 0.5:
        row_bits = np.repeat(np.array(BIT_WIDTHS, np.uint8), layout.segments if not layout.segment_axis else 1)
        rng.shuffle(row_bits)
        if rng.random() < 0.3:
            row_bits[rng.integers(row_bits.size)] = rng.integers(0, 10)
    values += [int(rng.integers(1, 7)), *(stream.size for stream in streams), 0, ANYTHING, 0, row_bits.size]
    streams.append(row_bits)
    return np.array(values, np.int64).tobytes() + b"".join(stream.tobytes() for stream in streams)


_ROW_SHARES = (0.02, 0.02, 0.03, 0.03, 0.05, 0.1, 0.15, 0.25, 0.25, 0.06, 0.02, 0.02)
_ROWS = (1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 200)
_RUN_FACTORS = (0.0, 1e-44, 1e-36, 1e-20, 1e20, 1e37)
BLOCK_UNITS = (1, 2, 3, 4, 5, 6, 8, 8, 8, 12, 16, 16, 20, 24, 32, 40)
"""Block sizes in units of the smallest one of a pattern."""


def random_case(seed: int) -> bytes:
    """Case number ``seed`` of a campaign: any layout, any values, sound."""
    rng = np.random.default_rng(seed)
    weight, trans_b, accuracy_level = random_node(rng)
    k, n = (weight.layout.columns, weight.layout.rows) if trans_b else (weight.layout.rows, weight.layout.columns)
    m = int(rng.choice((1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 100, 130), p=_ROW_SHARES))
    bias = None
    if rng.random() < 0.7:
        bias = random_bias(rng, n)
    return sound_case(weight, trans_b, accuracy_level, random_activations(rng, m, k, weight.layout.block_size), bias)


def random_node(rng: np.random.Generator) -> tuple[PackedWeight, bool, int]:
    """A weight of any layout, transB and accuracy_level."""
    pattern = Pattern.parse(PATTERNS[rng.integers(len(PATTERNS))])
    trans_b, accuracy_level = bool(rng.integers(2)), int(rng.choice((0, 4, 4)))
    unit = 8 * pattern.of // pattern.keep if pattern.is_n_of_m else 8
    block_size = unit * int(rng.choice(BLOCK_UNITS))
    shape = rng.random()
    if shape < 0.05:  # rows so long that kernels take them one by one
        rows, blocks = int(rng.integers(1, 6)), -(-8320 // block_size)
    elif shape < 0.12 and not trans_b:  # sums that are cut into parts
        rows, blocks = int(rng.integers(512, 900)), max(1, 128 // block_size)
    else:
        rows, blocks = int(rng.choice(_ROWS)), int(rng.integers(1, 9))
        entries = int(rng.choice((3_000, 6_000, 30_000), p=(0.5, 0.4, 0.1)))
        rows = min(rows, max(1, entries // (blocks * block_size)))
    axis = int(rng.integers(2))
    length = blocks if axis else rows
    if rng.random() < 0.5:
        widths = rng.random(4) < (0.3, 0.6, 0.5, 0.5)
    else:
        widths = np.arange(4) == rng.choice(4, p=(0.1, 0.4, 0.25, 0.25))
    if not widths.any():
        widths[1] = True
    cuts = rng.multinomial(length, widths / widths.sum())
    sizes = tuple(int(size) * (block_size if axis else 1) for size in cuts)
    layout = Layout(rows, blocks * block_size, block_size, sizes, axis, bool(rng.integers(2)), pattern)
    mask = random_mask(rng, layout)
    if mask is not None and not pattern.is_n_of_m:
        mask = rng.random(mask.shape) < rng.choice((0.0, 0.02, 0.25, 0.6, 1.0))
    return pack(random_levels(rng, layout), random_scales(rng, layout), mask, layout), trans_b, accuracy_level


def random_scales(rng: np.random.Generator, layout: Layout) -> np.ndarray:
    """float16 [rows, blocks]: ordinary ones most often, else very small, very large, zero or not finite among them."""
    scales = rng.uniform(0.01, 1.0, layout.scales_shape) * rng.choice((-1.0, 1.0, 1.0), layout.scales_shape)
    kind = rng.random()
    if kind < 0.1:
        scales *= 2.0**-20
    elif kind < 0.2:
        scales *= 65504
    elif kind < 0.3:
        scales *= 2.0 ** rng.integers(-24, 16, layout.scales_shape)
    scales = scales.astype(np.float16)
    if rng.random() < 0.2:
        scales[rng.random(scales.shape) < 0.2] = 0
    if rng.random() < 0.04:
        scales[rng.random(scales.shape) < 0.05] = rng.choice((np.nan, np.inf, -np.inf))
    return scales


def random_activations(rng: np.random.Generator, m: int, k: int, block_size: int) -> np.ndarray:
    """float32 [m, k], every row of a kind of its own."""
    a = rng.standard_normal((m, k))
    if rng.random() < 0.3:
        return a.astype(np.float32)
    with np.errstate(over="ignore"):
        for row in a:
            kind = rng.integers(14)
            if kind == 0:
                row[:] = 0.0
            elif kind == 1:
                row *= 10.0 ** rng.uniform(-45, 38)
            elif kind == 2:
                row[:] = 10.0 ** rng.uniform(-45, 38)
            elif kind == 3:  # a spike
                row[rng.integers(k)] *= 10.0 ** rng.uniform(-45, 38)
            elif kind == 4:  # runs of another magnitude, or of zeros
                first = rng.integers(k)
                row[first : first + rng.integers(1, 3 * block_size)] *= rng.choice(_RUN_FACTORS)
            elif kind == 5:  # every magnitude
                row *= 10.0 ** rng.uniform(-45, 37, k)
            elif kind == 6:
                row *= 1e-41
            elif kind == 7:
                row[:] = np.clip(row, -1, 1) * 3.4e38
            elif kind == 8:
                row[rng.random(k) < 0.1] = rng.choice((np.nan, np.inf, -np.inf))
            elif kind == 9:
                row[rng.integers(k)] = rng.choice((np.nan, np.inf, -np.inf))
            elif kind == 10:  # halves between integers, which round to even
                row[:] = np.rint(row * 40) + 0.5
                row[rng.integers(k)] = 127
        return a.astype(np.float32)


def random_bias(rng: np.random.Generator, n: int) -> np.ndarray:
    bias = rng.standard_normal(n) * rng.choice((0.0, 1.0, 1.0, 1e-40, 1e30))
    if rng.random() < 0.1:
        bias[rng.integers(n)] = rng.choice((np.nan, np.inf, -np.inf))
    return bias.astype(np.float32)
