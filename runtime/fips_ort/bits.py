"""Streams of unsigned integers of 1 to 8 bits: the lowest layer of every packed format.

Integer number ``i`` of a stream with ``bits`` bits each occupies bit positions
``i * bits … (i + 1) * bits - 1``; bit position ``p`` is bit ``p % 8`` (least significant first) of byte
``p // 8``. The last byte is filled up with zero bits.
"""

import numpy as np
from numpy.typing import NDArray


def pack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack ``values`` (any shape, uint8, each below ``2**bits``) into a byte stream.

    Returns a uint8 vector of ``ceil(values.size * bits / 8)`` bytes. Raises ValueError if a value needs
    more than ``bits`` bits or ``bits`` is not in 1…8.
    """
    _check_bits(bits)
    flat = np.ascontiguousarray(values, dtype=np.uint8).reshape(-1)
    if flat.size and int(flat.max()) >> bits:
        raise ValueError(f"value {int(flat.max())} does not fit in {bits} bits")
    if bits == 8:
        return flat.copy()
    planes = (flat[:, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    return np.packbits(planes.reshape(-1), bitorder="little")


def unpack_bits(stream: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Inverse of :func:`pack_bits`: the first ``count`` integers of ``stream`` as a uint8 vector.

    Raises ValueError if the stream is shorter than ``ceil(count * bits / 8)`` bytes.
    """
    _check_bits(bits)
    needed = packed_size(count, bits)
    if stream.size < needed:
        raise ValueError(f"stream of {stream.size} bytes is too short for {count} values of {bits} bits")
    if bits == 8:
        return stream[:count].copy()
    planes = np.unpackbits(stream[:needed], count=count * bits, bitorder="little").reshape(count, bits)
    weights = np.uint8(1) << np.arange(bits, dtype=np.uint8)
    return (planes * weights).sum(axis=1, dtype=np.uint8)


def packed_size(count: int, bits: int) -> int:
    """Bytes taken by ``count`` integers of ``bits`` bits."""
    return (count * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1…8, got {bits}")
