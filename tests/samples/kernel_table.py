"""The table "Which kernel runs" of docs/ops.md, to compare with what the driver of tests/runtime/native says."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from places import ROOT

from fips_ort.layout import BIT_WIDTHS

DOCS = ROOT / "docs/ops.md"
SHORT_ROW = 1536
FIELDS = 13  # of a line, before the kernels
LARGEST_BLOCK = 65536


@dataclass(frozen=True, slots=True)
class Product:
    """What the choice of a kernel depends on."""

    isa: str
    accuracy_level: str
    trans_b: str
    pattern: str
    midrise: bool
    block_size: int
    columns: int
    bits: tuple[int, ...]
    m: int


def parse_product(fields: list[str]) -> Product:
    """A line of `driver kernels`, without the kernels."""
    isa, level, trans_b, keep, of, midrise, block_size, columns, *sizes, m = fields
    pattern = {"0:0": "dense", "1:1": "bitmap"}.get(f"{keep}:{of}", f"{keep}:{of}")
    bits = tuple(width for width, size in zip(BIT_WIDTHS, sizes, strict=True) if size != "0")
    return Product(isa, level, trans_b, pattern, midrise == "1", int(block_size), int(columns), bits, int(m))


def value_on(cell: str, isa: str) -> str:
    """The part of "16; 32 on avx2; 64 on avx512" that holds on an instruction set."""
    default, *exceptions = cell.split("; ")
    for exception in exceptions:
        value, isas = exception.split(" on ")
        if isa in isas.split(", "):
            return value
    return default


def row_counts(cell: str) -> range:
    """Numbers of rows that "any", "1", "1 … 4" or "5 …" stands for."""
    if cell == "any":
        return range(1, sys.maxsize)
    first, to, last = cell.partition(" …")
    return range(int(first), int(last) + 1 if last else sys.maxsize if to else int(first) + 1)


def documented_row(cells: list[str]) -> tuple[Callable[[Product], bool], str]:
    """Whether a row of the table fits a product, and its kernel."""
    level, trans_b, pattern, bits, rows, multiple, isas, kernel = cells
    short = pattern.endswith(", short rows")
    patterns = set(pattern.removesuffix(", short rows").split(", "))
    widths = set(BIT_WIDTHS) if bits == "any" else {int(width) for width in bits.split(", ")}
    counts, unit = row_counts(rows), 1 if multiple == "any" else int(multiple)
    integer = kernel.startswith("integer/")

    def fits(product: Product) -> bool:
        if product.bits[0] == 8 and product.midrise and product.pattern != "dense":
            return kernel == "float/decoded_floats"
        return (
            level in ("any", product.accuracy_level)
            and trans_b in ("any", product.trans_b)
            and (patterns == {"any"} or product.pattern in patterns)
            and not (short and product.columns // 8 * max(product.bits) > SHORT_ROW)
            and widths.issuperset(product.bits)
            and product.m in counts
            and product.block_size % unit == 0
            and not (integer and product.block_size > LARGEST_BLOCK)
            and (isas == "all" or product.isa in isas.split(", "))
        )

    return fits, kernel


@cache
def documented_rows(isa: str) -> list[tuple[Callable[[Product], bool], str]]:
    section = DOCS.read_text().split("## Which kernel runs")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return [documented_row([value_on(cell, isa) for cell in row]) for row in rows[2:]]


def differences(lines: Iterable[str]) -> Iterator[str]:
    """What `driver kernels` prints, where docs/ops.md says something else."""
    for line in lines:
        fields = line.split()
        whole, kernels = parse_product(fields[:FIELDS]), fields[FIELDS:]
        products = [whole]
        if whole.trans_b == "1":  # cut along the rows: each segment for itself
            products = [replace(whole, bits=(width,)) for width in whole.bits]
        for product, kernel in zip(products, kernels, strict=True):
            documented = next(name for fits, name in documented_rows(product.isa) if fits(product))
            if documented != kernel:
                yield f"{product}: {kernel}, documented as {documented}"
