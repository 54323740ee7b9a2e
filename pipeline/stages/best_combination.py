"""One choice of each part, so that all together take no more bytes than allowed and cost the least."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

MOST_COMBINATIONS = 50_000
"""Partial combinations that are kept at most: beyond, those of about equal size are one."""


def best_combination(parts: Mapping[str, Sequence[tuple[int, float]]], budget: float) -> dict[str, int] | None:
    """The index of one of the (bytes, cost) choices of each part, of least cost in all, that together take at most
    ``budget`` bytes; None if none do.

    Partial combinations are kept unless another is at once no larger and no worse: the result is exact. Only where more
    than :data:`MOST_COMBINATIONS` would be left, of those that differ by less than that fraction of the range of sizes
    the smallest is kept. Time and memory grow with parts times choices times that number at most.
    """
    least_left = sum(min(size for size, _ in choices) for choices in parts.values())
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for choices in parts.values():
        own_sizes = np.array([size for size, _ in choices], np.int64)
        own_costs = np.array([cost for _, cost in choices])
        least_left -= int(own_sizes.min())
        grown_sizes = (sizes[:, None] + own_sizes).ravel()
        grown_costs = (costs[:, None] + own_costs).ravel()
        order = np.lexsort((grown_costs, grown_sizes))
        order = order[grown_sizes[order] + least_left <= budget]
        if not len(order):
            return None
        below = np.minimum.accumulate(grown_costs[order])
        kept = order[np.concatenate([[True], grown_costs[order][1:] < below[:-1]])]
        if len(kept) > MOST_COMBINATIONS:
            kept = _thinned(kept, grown_sizes[kept])
        steps.append((kept // len(choices), kept % len(choices)))
        sizes, costs = grown_sizes[kept], grown_costs[kept]
    found: dict[str, int] = {}
    position = len(sizes) - 1  # sizes rise and costs fall
    for name, (before, choice) in zip(reversed(list(parts)), reversed(steps), strict=True):
        found[name] = int(choice[position])
        position = int(before[position])
    return found


def _thinned(kept: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first of ``kept``, whose rising ``sizes`` these are, in each of :data:`MOST_COMBINATIONS` equal ranges."""
    step = (int(sizes[-1]) - int(sizes[0])) // MOST_COMBINATIONS + 1
    ranges = (sizes - sizes[0]) // step
    return kept[np.concatenate([[True], ranges[1:] != ranges[:-1]])]
