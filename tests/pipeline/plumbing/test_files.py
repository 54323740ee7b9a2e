"""Arrays written through memory."""

from pathlib import Path

import numpy as np

from pipeline.plumbing.files import create_array


def test_array_is_on_disk_whole_and_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    array = create_array(path, (1000, 3))
    assert path.stat().st_blocks * 512 >= 4 * 3000  # no hole that a full disk could not fill
    assert not array.any()
    array[:] = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    array.flush()
    read = np.load(path)
    assert read.dtype == np.float32
    assert np.array_equal(read.ravel(), np.arange(3000))
