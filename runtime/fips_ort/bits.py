"""How unsigned integers of 1 to 8 bits lie in bytes: the lowest layer of every packed format.

*Chunks* hold 64 integers (the last one of a row perhaps fewer, a multiple of 8), in the order that vector instructions
take apart with one shift and one mask. A chunk is cut into *planes* of 8, 4, 2 or 1 bits: 8, 4 and 2 bits are one plane
each, 3 bits are a plane of the lower two and one of the highest. A plane of ``p`` bits of ``w`` integers takes
``w p / 8`` bytes and has integer ``n`` in byte ``n mod (w p / 8)``, at bit ``p · ⌊n / (w p / 8)⌋``.

*Streams* hold any number of integers: number ``i`` of ``b`` bits each occupies bit positions ``i · b … (i+1) · b - 1``;
bit position ``p`` is bit ``p % 8`` (least significant first) of byte ``p // 8``. The last byte is filled up with zeros.
"""

import numpy as np
from numpy.typing import NDArray

CHUNK = 64
"""Integers of a whole chunk."""
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
"""Bits of an integer → bits of its planes, the lowest first."""


def pack_chunks(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack ``values`` (uint8 [..., w], each below ``2**bits``) into chunks: uint8 [..., w · bits / 8].

    Raises ValueError if a value needs more than ``bits`` bits, if w is no multiple of 8 up to 64, or if ``bits`` is not
    8, 4, 3, 2 or 1.
    """
    _check_range(values, bits)
    width = values.shape[-1]
    if bits not in PLANES or width % 8 or width > CHUNK:
        given = f"{width} of {bits} bits"
        raise ValueError(f"chunks hold up to {CHUNK} integers, in eights, of {sorted(PLANES)} bits; got {given}")
    parts, low = [], 0
    for plane in PLANES[bits]:
        fields = (values >> low) & np.uint8((1 << plane) - 1)
        shifts = np.arange(0, 8, plane, dtype=np.uint8)[:, None]
        shifted = fields.reshape(*values.shape[:-1], 8 // plane, width * plane // 8) << shifts
        parts.append(np.bitwise_or.reduce(shifted, axis=-2))
        low += plane
    return np.concatenate(parts, axis=-1)


def unpack_chunks(chunks: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Inverse of :func:`pack_chunks`: uint8 [..., w · bits / 8] → uint8 [..., w]."""
    width = chunks.shape[-1] * 8 // bits
    values = np.zeros((*chunks.shape[:-1], width), np.uint8)
    first = low = 0
    for plane in PLANES[bits]:
        size = width * plane // 8
        stored = chunks[..., None, first : first + size]
        fields = (stored >> np.arange(0, 8, plane, dtype=np.uint8)[:, None]) & np.uint8((1 << plane) - 1)
        values |= fields.reshape(values.shape) << np.uint8(low)
        first += size
        low += plane
    return values


def pack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack ``values`` (any shape, uint8, each below ``2**bits``) into a stream.

    Returns a uint8 vector of ``ceil(values.size * bits / 8)`` bytes. Raises ValueError if a value needs
    more than ``bits`` bits or ``bits`` is not in 1…8.
    """
    _check_bits(bits)
    flat = np.ascontiguousarray(values, dtype=np.uint8).reshape(-1)
    _check_range(flat, bits)
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
    """Bytes taken by a stream of ``count`` integers of ``bits`` bits."""
    return (count * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1…8, got {bits}")


def _check_range(values: NDArray[np.uint8], bits: int) -> None:
    if values.size and int(values.max()) >> bits:
        raise ValueError(f"value {int(values.max())} does not fit in {bits} bits")
