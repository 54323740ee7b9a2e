"""The plain read loop: it reads all bytes, on all threads."""

import numpy as np
import pytest

from pipeline.evaluation import read_speed


@pytest.mark.parametrize(("threads", "size"), [(1, 1), (2, 3), (2, 8_000_016), (3, 10_000_000)])
def test_reads_all_bytes_in_parts(threads: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    def seconds(parts: list[np.ndarray]) -> float:
        turns.append([part.nbytes for part in parts])
        return 2.0 / len(turns)

    monkeypatch.setattr(read_speed, "_read_seconds", seconds)
    speed = read_speed.read_bandwidth(threads, size)
    assert len(turns) == 5
    assert all(len(parts) == threads and min(parts) > 0 for parts in turns)
    assert all(abs(sum(parts) - size) < 8 * threads for parts in turns)
    assert speed == pytest.approx(sum(turns[0]) / (2.0 / 5))  # the best of them


def test_a_read_takes_time() -> None:
    """Between a byte a microsecond and a terabyte a second."""
    assert 1e6 < read_speed.read_bandwidth(2, 1 << 22) < 1e12
