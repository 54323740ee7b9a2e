"""Bits along the rank axis: reverse water-filling to a target of stored bits.

Classical transform coding (Cover & Thomas, Elements of Information Theory, 10.3.3): components of unequal
energy share a bit budget best if each gets bits until the distortion of all is level. With the few
bit-widths that a format has, the same is reached greedily: buy, again and again, the step of bits with the
largest fall of distortion per bit.
"""

import heapq

import numpy as np
from numpy.typing import NDArray

from fips_ort.layout import BIT_WIDTHS, Segments, segments_with

# Mean squared error of the best uniform quantizer of a unit Gaussian with 2**bits levels (Max 1960, table II).
_DISTORTION = {2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 0.0001}


def allocate_bits(energy: NDArray[np.float64], budget: float) -> NDArray[np.int64]:
    """Bits for each of n equally large chunks of the rank axis.

    ``energy``: float64 [n], mean squared contribution of a chunk to the output. ``budget``: mean bits per value
    over all chunks. Returns int64 [n], each one of ``BIT_WIDTHS``, falling along the order of falling energy, with a
    mean of at most ``budget``. Raises ValueError if the budget is below the smallest bit-width.
    """
    widths = sorted(BIT_WIDTHS)
    if budget < widths[0]:
        raise ValueError(f"{budget:.3g} bits per value are below the smallest bit-width, {widths[0]}")
    bits = np.full(energy.size, widths[0], dtype=np.int64)
    left = budget * energy.size - bits.sum()
    offers: list[tuple[float, int, int]] = []

    def offer(chunk: int) -> None:
        higher = [width for width in widths if width > bits[chunk]]
        if higher:
            step = higher[0] - bits[chunk]
            gain = energy[chunk] * (_DISTORTION[int(bits[chunk])] - _DISTORTION[higher[0]])
            heapq.heappush(offers, (-float(gain) / float(step), chunk, higher[0]))

    for chunk in range(energy.size):
        offer(chunk)
    while offers:
        _, chunk, width = heapq.heappop(offers)
        step = width - bits[chunk]
        if step <= left + 1e-9:
            left -= step
            bits[chunk] = width
            offer(chunk)
    order = np.argsort(-energy, kind="stable")
    falling = np.empty_like(bits)
    falling[order] = np.sort(bits)[::-1]
    return falling


def segments_of(bits: NDArray[np.int64], chunk: int) -> Segments:
    """Segments of the rank axis for chunks of ``chunk`` rank entries with the given bits, int64 [chunks]."""
    return segments_with({width: int((bits == width).sum()) * chunk for width in BIT_WIDTHS})
