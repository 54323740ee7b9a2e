"""Baselines of image classifiers: what cannot be made or run is left out, with the reason."""

from typing import Any

import numpy as np
import pytest
from factored_samples import tiny

from pipeline.evaluation import image_speed
from pipeline.evaluation.image_speed import DENSE_FLOAT32, DENSE_INT4, dense_sessions
from pipeline.evaluation.measurements import NATIVE, ImageSpeed, ImageSpeedRow
from pipeline.plumbing.errors import first_line

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)


def test_both_run_whatever_the_width() -> None:
    sessions, left_out = dense_sessions(tiny("vit", width=36), IMAGES, 1)
    assert left_out == {}
    logits = {name: session.run(["logits"], {"pixel_values": IMAGES})[0] for name, session in sessions.items()}
    assert list(logits) == [DENSE_FLOAT32, DENSE_INT4]
    difference = np.abs(logits[DENSE_INT4] - logits[DENSE_FLOAT32]).max() / np.abs(logits[DENSE_FLOAT32]).max()
    assert 0 < difference < 0.5


def test_what_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room\nfor it")

    monkeypatch.setattr(image_speed, "with_nbits", fail)
    sessions, left_out = dense_sessions(tiny("vit"), IMAGES, 1)
    assert list(sessions) == [DENSE_FLOAT32]
    assert left_out == {DENSE_INT4: "MemoryError: no room"}
    monkeypatch.setattr(image_speed, "export_image_classifier", fail)
    sessions, left_out = dense_sessions(tiny("vit"), IMAGES, 1)
    assert sessions == {}
    assert list(left_out) == [DENSE_FLOAT32, DENSE_INT4]


def test_reasons_are_one_line() -> None:
    assert first_line(ValueError("  a\nb")) == "ValueError: a"
    assert first_line(AssertionError()) == "AssertionError"


def test_without_a_baseline_there_is_no_ratio() -> None:
    row = ImageSpeedRow(backend=NATIVE, images_per_second=12.0, ratio_to_float32=None)
    speed = ImageSpeed(unit="images/s", batch=2, threads=1, rows=(row,), left_out={DENSE_FLOAT32: "why"})
    assert (speed.ratio_to_dense, speed.rate) == (None, 12.0)
