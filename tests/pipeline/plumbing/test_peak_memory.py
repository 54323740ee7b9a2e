"""Resident memory by stage: each stage's own peak, and what one leaves behind is not counted in the next."""

from pathlib import Path

import pytest

from fips_ort.memory import process_memory
from pipeline.plumbing.peak_memory import give_back_memory, peak_rss_bytes
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.run_folder import RunFolder

BLOCK = 16 * 1024
"""Bytes: more than Python's own pools serve, less than what the C library maps apart and hands back at once."""
COUNT = 20_000
SIZE = BLOCK * COUNT


def allocate(_: Path | None = None) -> bytes:
    """Fill blocks of memory and free all but the last, so that the C library cannot shrink the heap by itself."""
    return [bytes([index % 255 + 1]) * BLOCK for index in range(COUNT)][-1]


def test_what_is_free_goes_back_to_the_system() -> None:
    give_back_memory()
    before = process_memory("VmRSS")
    last = allocate()
    assert process_memory("VmRSS") - before > 0.9 * SIZE
    give_back_memory()
    assert process_memory("VmRSS") - before < 0.1 * SIZE
    assert last.count(last[0]) == BLOCK


@pytest.fixture
def peaks_can_be_reset() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        pytest.skip(f"this system does not let the peak be measured anew: {error}")


@pytest.mark.usefixtures("peaks_can_be_reset")
def test_peak_since_memory_was_given_back() -> None:
    give_back_memory()
    before = peak_rss_bytes()
    allocate()
    assert peak_rss_bytes() - before > 0.9 * SIZE
    give_back_memory()
    assert peak_rss_bytes() - before < 0.1 * SIZE


@pytest.mark.usefixtures("peaks_can_be_reset")
def test_peak_of_each_stage(tmp_path: Path) -> None:
    kept = []
    stages = {"model": lambda _: None, "fit/large": lambda _: kept.append(allocate()), "pack": lambda _: None}
    peaks = []
    for _ in range(2):  # the second run takes all from the first, with what they needed
        folder = RunFolder(tmp_path, Progress())
        for name, compute in stages.items():
            folder.stage(name, {}, [], compute)
        peaks.append(folder.peak_rss_bytes)
    assert peaks[0] == peaks[1]
    assert len(kept) == 1
    assert peaks[0]["fit/large"] - peaks[0]["model"] > 0.9 * SIZE
    assert peaks[0]["fit/large"] - peaks[0]["pack"] > 0.9 * SIZE


def test_unknown_field() -> None:
    with pytest.raises(RuntimeError, match="VmNone"):
        process_memory("VmNone")
