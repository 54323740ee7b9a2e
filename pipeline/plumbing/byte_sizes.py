"""Sizes in bytes as text: what ``150MB`` stands for."""

import re

BYTE_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1))
"""Decimal units with their bytes, largest first."""
_BINARY_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def parse_bytes(text: str) -> int:
    """Bytes that ``150MB`` (10⁶), ``1.5GiB`` (2³⁰) or ``800000`` stands for. Raises ValueError for what is no size."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    units = {name.lower(): power for name, power in (*BYTE_UNITS, *_BINARY_UNITS)} | {"": 1}
    if match is None or match[2].lower() not in units:
        raise ValueError("write a number with B, kB, MB, GB, KiB, MiB or GiB, as in 150MB")
    return int(float(match[1]) * units[match[2].lower()])
