"""Measurements as plain text."""

from collections.abc import Mapping, Sequence

from benchmarks.measurement import Measurement
from benchmarks.variants import INT4_BLOCK_128


def format_table(measurements: Sequence[Measurement]) -> str:
    """Lay out the measurements of one comparison: a line for each variant, a column for each case. The column *layers*
    says how many layers the models had that were run with few rows of activations, and with many.

    A cell holds the median milliseconds of a layer and how many times faster that is than int4 with blocks of 128; at
    one row also GB/s of the weights that are read, and the fraction of what a plain read loop reaches.
    """
    first = measurements[0]
    cases = sorted({(item["threads"], item["rows"]) for item in measurements})
    names = list(dict.fromkeys(item["variant"] for item in measurements))
    cells = {(item["variant"], item["threads"], item["rows"]): _cell(item) for item in measurements}
    bits = {item["variant"]: f"{item['stored_bits']:.2f}" for item in measurements}
    layers = {
        name: "/".join(dict.fromkeys(str(item["layers"]) for item in measurements if item["variant"] == name))
        for name in names
    }
    lines = [["", "bits", "layers", *(f"{threads} thread{'s' * (threads > 1)}, M {rows}" for threads, rows in cases)]]
    lines += [[name, bits[name], layers[name], *(cells[name, *case] for case in cases)] for name in names]
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    case = f"{first['shape']} {first['comparison']}, {first['weights']} weights"
    title = f"{case}: ms of a layer, × speed of {INT4_BLOCK_128}"
    rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([title, *rows])


def _cell(item: Measurement) -> str:
    text = f"{item['median_ms']:.3f} ×{item['ratios'][INT4_BLOCK_128]:.2f}"
    if item["rows"] == 1:
        text += f" {item['bytes_per_second'] / 1e9:4.1f} GB/s {100 * item['bandwidth_fraction']:3.0f} %"
    return text


def format_memory(memory: Mapping[str, int | float | str]) -> str:
    """What :func:`benchmarks.memory.measure_shared_basis` found, as one line."""
    file, activations, growth = (
        f"{float(memory[key]) / 1e6:.1f} MB" for key in ("file_bytes", "activation_bytes", "rss_growth_bytes")
    )
    return (
        f"\nmemory, {memory['shape']}, {memory['basis_nodes']} nodes on one basis: files {file} and activations "
        f"{activations}; loading and running adds {growth} of resident memory, {memory['ratio']:.2f} of their sum"
    )
