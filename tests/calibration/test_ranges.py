"""Ranges of a network's values: every method cuts where its rule says."""

import numpy as np
import pytest

from synthkit.calibration.ranges import METHODS, Observed, fit_ranges, observe


def seen(values: np.ndarray) -> Observed:
    found = observe(lambda batch: {"x": values}, np.zeros((1, 2, 2, 3), np.uint8))
    return found["x"]


def test_every_batch_and_channel_is_looked_at() -> None:
    def compute(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": images.transpose(0, 3, 1, 2).astype(np.float32)}

    images = np.zeros((20, 4, 4, 3), np.uint8)
    images[..., 1] = 10
    images[17, 3, 3, 2] = 160
    found = observe(compute, images)["x"]
    assert (found.low, found.high) == (0, 160)
    assert found.channel_means[:2].tolist() == [0, 10] and found.channel_means[2] > 0
    assert found.sample.size == images.size


def test_a_range_holds_zero() -> None:
    for values, expected in ((np.full((1, 2, 2), 3.0), (0.0, 3.0)), (np.full((1, 2, 2), -3.0), (-3.0, 0.0))):
        one = seen(values.astype(np.float32))
        for method in METHODS:
            low, high = fit_ranges({"x": one}, method)["x"]
            assert low <= 0 <= high, method
        assert fit_ranges({"x": one}, "min-max")["x"] == expected


def test_percentiles_clip_outliers_and_min_max_does_not() -> None:
    values = np.random.default_rng(0).normal(size=(8, 1, 64, 64)).astype(np.float32)
    values[0, 0, 0, 0] = 1000
    one = seen(values)
    assert fit_ranges({"x": one}, "min-max")["x"][1] == 1000
    wide, narrow = (fit_ranges({"x": one}, f"percentile {share}")["x"] for share in ("99.99", "99.9"))
    assert 2.5 < narrow[1] < wide[1] < 6 and -6 < wide[0] < narrow[0] < -2.5


def test_entropy_clips_a_thin_tail_and_leaves_an_even_spread() -> None:
    rng = np.random.default_rng(0)
    even = seen(rng.uniform(-1, 1, (1, 1, 100, 100)).astype(np.float32))
    low, high = fit_ranges({"x": even}, "entropy")["x"]
    assert low < -0.95 and high > 0.95
    tailed = rng.normal(0, 0.1, (1, 1, 100, 100)).astype(np.float32)
    tailed[0, 0, 0, :3] = (1.0, -1.0, 0.9)
    assert fit_ranges({"x": seen(tailed)}, "entropy")["x"][1] < 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_a_range(method: str) -> None:
    assert fit_ranges({"x": seen(np.zeros((1, 3, 4, 4), np.float32))}, method)["x"] == (0.0, 0.0)
