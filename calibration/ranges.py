"""Ranges of a network's inner values on a site's images, by several methods: the scales of an 8-bit model.

    images ─► values of every tensor, a sample kept ─► min-max | percentile | entropy ─► (low, high)

A range trades clipping of the few large values against rounding of the many small ones. No method wins on
every student, so the search for an int8 config tries them all on held-out images. This module knows no model
file; it is given a function that computes the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Ranges = Mapping[str, tuple[float, float]]

_BATCH = 8
_KEPT = 4096  # values of a tensor per image: 60 images give 250,000, enough for a 99.9 % percentile
_BINS, _LEVELS = 256, 128  # of the entropy method's histogram, and of the 8-bit one it is compared with


@dataclass(frozen=True)
class Observed:
    """Statistics of one tensor over all images.

    Attributes:
        low: smallest value, or 0 where that is larger: 8-bit ranges contain 0.
        high: largest value, or 0 where that is smaller.
        sample: evenly taken values, float32.
        channel_means: mean of each channel of an [N, C, ...] tensor.
    """

    low: float
    high: float
    sample: np.ndarray
    channel_means: np.ndarray


def observe(
    compute: Callable[[np.ndarray], Mapping[str, np.ndarray]], images: np.ndarray
) -> dict[str, Observed]:
    """Collect statistics of every tensor over the images.

    Args:
        compute: tensor name -> values [n, ...] of a few images.
        images: uint8 [N, height, width, 3].
    """
    parts: dict[str, list[Observed]] = {}
    for start in range(0, len(images), _BATCH):
        for name, values in compute(images[start : start + _BATCH]).items():
            parts.setdefault(name, []).append(_look(values))
    return {name: _merged(seen) for name, seen in parts.items()}


def _look(values: np.ndarray) -> Observed:
    flat = values.ravel()
    step = max(1, flat.size // (_KEPT * len(values))) | 1  # odd, so that it visits all rows and channels
    others = tuple(axis for axis in range(values.ndim) if axis != 1)
    return Observed(
        min(0.0, float(flat.min())),
        max(0.0, float(flat.max())),
        flat[::step].copy(),
        values.mean(axis=others),
    )


def _merged(seen: list[Observed]) -> Observed:
    return Observed(
        min(one.low for one in seen),
        max(one.high for one in seen),
        np.concatenate([one.sample for one in seen]),
        np.mean([one.channel_means for one in seen], axis=0),
    )


def min_max(seen: Observed) -> tuple[float, float]:
    """Range of all values."""
    return seen.low, seen.high


def percentile(share: float) -> Callable[[Observed], tuple[float, float]]:
    """Make a method that keeps a fraction of the values, for example 0.999, and clips evenly at both ends."""

    def cut(seen: Observed) -> tuple[float, float]:
        low, high = np.quantile(seen.sample, [(1 - share) / 2, (1 + share) / 2])
        return max(seen.low, min(0.0, float(low))), min(seen.high, max(0.0, float(high)))

    return cut


def entropy(seen: Observed) -> tuple[float, float]:
    """Range whose 8-bit histogram has the least KL divergence from the full one (Migacz, GTC 2017).

    Uses ONNX Runtime's search with more bins than levels; at its default, as many, nothing is ever clipped.
    """
    from onnxruntime.quantization.calibrate import HistogramCollector

    largest = np.float32(max(-seen.low, seen.high) or 1.0)
    counts, edges = np.histogram(seen.sample, _BINS, (-largest, largest))
    limits = (counts, edges.astype(np.float32), np.float32(seen.low), np.float32(seen.high))
    search = HistogramCollector("entropy", False, _BINS, _LEVELS, 100.0, "same")
    with np.errstate(all="ignore"):  # it divides by the sums of empty histograms, which it then passes over
        low, high = search.get_entropy_threshold(limits, _LEVELS)
    return min(0.0, float(low)), max(0.0, float(high))


METHODS: dict[str, Callable[[Observed], tuple[float, float]]] = {
    "min-max": min_max,
    "percentile 99.99": percentile(0.9999),
    "percentile 99.9": percentile(0.999),
    "entropy": entropy,
}


def fit_ranges(observed: Mapping[str, Observed], method: str) -> dict[str, tuple[float, float]]:
    """Tensor name -> range, by one of `METHODS`."""
    return {name: METHODS[method](seen) for name, seen in observed.items()}
