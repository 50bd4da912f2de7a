"""How far a classifier's probabilities can be believed, fitted to photos that its head has not seen.

    temperature   logits / T: the one number that makes the probabilities fit (Guo et al. 2017,
                  arXiv 1706.04599)
    threshold     below this probability of the best label the answer is "unknown"; from a share of photos to
                  answer, or from a share of wrong answers to allow (selective classification, El-Yaniv and
                  Wiener 2010)
    conformal threshold
                  the labels at least this likely form a set that lacks the right one with a share of at most
                  alpha of the photos (split conformal prediction with the score 1 - p, Sadinle et al. 2019,
                  arXiv 1609.00451); with cross-validated scores the guarantee is 2 alpha (Barber et al. 2021,
                  arXiv 1905.02928)

NumPy on logits and class indices; this module knows no image and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from synthkit.errors import ConfigError, DataError
from synthkit.metrics.classification import calibration_error, wilson_interval
from synthkit.standalone import softmax

FEWEST = 10
"""Held-out photos below which nothing is fitted: a temperature of a handful of photos is noise."""

_TEMPERATURES = (0.05, 20.0)
_PARTS = 5  # for the calibration error after: each part is measured with the temperature of the others


@dataclass(frozen=True)
class Target:
    """What the user asks of the answers; at most one of coverage and error.

    Attributes:
        coverage: share of photos to answer, the most certain ones.
        error: share of wrong labels to allow among the answers.
        alpha: share of photos whose set of labels may lack the right one.
    """

    coverage: float | None = None
    error: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.coverage is not None and self.error is not None:
            raise ConfigError("--coverage and --max-error both set the threshold; give one of them")
        wrong = [f"{name} {value}" for name, value in asdict(self).items() if not _is_share(value)]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)} must lie between 0 and 1, for example 0.9 or 0.05")


def _is_share(value: float | None) -> bool:
    return value is None or 0 < value < 1


@dataclass(frozen=True)
class Confidence:
    """What was fitted, and how it does on the held-out photos.

    Attributes:
        temperature: the logits were divided by it; 1 where there were too few photos.
        threshold: smallest probability that is an answer; None: every photo gets one.
        conformal_threshold: smallest probability of a label in the set of labels; None: no sets.
        facts: number of photos, calibration error before and after, coverage, error, set size.
    """

    temperature: float
    threshold: float | None
    conformal_threshold: float | None
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Facts and numbers in one object."""
        own = {
            "temperature": self.temperature,
            "threshold": self.threshold,
            "conformal_threshold": self.conformal_threshold,
        }
        return {**self.facts, **own}


def fit_confidence(logits: np.ndarray, labels: np.ndarray, target: Target) -> Confidence:
    """Temperature, threshold and conformal threshold from held-out photos.

    Args:
        logits: float [N, classes], each row from a head that has not seen the photo.
        labels: class indices [N].
        target: what the user asks for.

    Raises:
        DataError: the photos are too few, or no threshold keeps the error.
    """
    if len(labels) < FEWEST:
        return _without(len(labels), target)
    temperature = fit_temperature(logits, labels)
    scores = softmax(logits / temperature)
    best, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    threshold = _rounded_down(_threshold(best, right, target))
    chosen = scores[np.arange(len(labels)), labels]
    minimum = _rounded_down(None if target.alpha is None else conformal_threshold(chosen, target.alpha))
    facts = {
        "photos": len(labels),
        "calibration_error_before": _error_of(softmax(logits), labels),
        "calibration_error_after": _error_of(_cross_fitted(logits, labels), labels),
        "target": {name: value for name, value in asdict(target).items() if value is not None},
        **_of_answers(best, right, threshold),
        **_of_sets(scores, labels, minimum),
    }
    return Confidence(temperature, threshold, minimum, facts)


def _rounded_down(probability: float | None) -> float | None:
    """With fewer digits than an answer has, so that the photo that set the limit stays within it."""
    return None if probability is None else math.floor(probability * 1e5) / 1e5


def _without(count: int, target: Target) -> Confidence:
    asked = [name for name, value in asdict(target).items() if value is not None]
    if asked:
        raise DataError(
            f"a target for {', '.join(asked)} needs at least {FEWEST} photos that can be held out, there are "
            f"{count}; add photos, or leave the target out"
        )
    return Confidence(1.0, None, None, {"photos": count})


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of the smallest log loss, between 0.05 and 20.

    The loss is convex in 1/T, so that bisecting its slope finds the only minimum. Each label counts as one
    that may be wrong once in N + 2 (Platt 1999, Laplace's rule), or a few photos that are all right would
    make every answer certain.

    Args:
        logits: float [N, classes].
        labels: class indices [N].
    """
    logits = logits - logits.mean(axis=1, keepdims=True)
    believed = 1 - 1 / (len(labels) + 2)
    chosen = believed * logits[np.arange(len(labels)), labels]  # the other labels' logits average to about 0
    low, high = (1 / bound for bound in reversed(_TEMPERATURES))
    for _ in range(60):
        middle = math.sqrt(low * high)
        slope = np.sum((softmax(logits * middle) * logits).sum(axis=1) - chosen)
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 1 / math.sqrt(low * high)


def _cross_fitted(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities [N, classes], each with the temperature that the other parts of the photos give."""
    scores = np.empty(logits.shape)
    part = np.arange(len(labels)) % _PARTS
    for one in range(_PARTS):
        temperature = fit_temperature(logits[part != one], labels[part != one])
        scores[part == one] = softmax(logits[part == one] / temperature)
    return scores


def _error_of(scores: np.ndarray, labels: np.ndarray) -> float:
    return calibration_error(scores.max(axis=1), scores.argmax(axis=1) == labels)


def _threshold(best: np.ndarray, right: np.ndarray, target: Target) -> float | None:
    if target.coverage is not None:
        return threshold_for_coverage(best, target.coverage)
    return None if target.error is None else threshold_for_error(best, right, target.error)


def threshold_for_coverage(best: np.ndarray, coverage: float) -> float:
    """The probability that the most certain share of the photos reaches.

    Args:
        best: probability of the best label of every photo [N].
        coverage: share to answer, 0..1.
    """
    # In decimals: as floats, 0.55 of 100 photos would be 55.00000000000001 and give 56.
    answered = math.ceil(Decimal(str(coverage)) * len(best))
    return float(np.sort(best)[::-1][answered - 1])


def threshold_for_error(best: np.ndarray, right: np.ndarray, error: float) -> float:
    """The threshold that answers most photos while no more than a share of the answers is wrong.

    Args:
        best: probability of the best label of every photo [N].
        right: whether that label is the right one [N].
        error: share of wrong answers to allow, 0..1.

    Raises:
        DataError: there is none.
    """
    order = np.argsort(-best, kind="stable")
    wrong = np.cumsum(~right[order]) / np.arange(1, len(order) + 1)
    # A threshold answers all photos of equal probability, so only the last of them is a place to cut.
    last = np.append(np.diff(best[order]) < 0, True)
    fits = np.flatnonzero((wrong <= error) & last)
    if not len(fits):
        raise DataError(
            f"no threshold keeps the wrong answers to {error:.1%} of the {len(best)} held-out photos: the "
            "most certain ones are wrong; allow more errors, or add photos"
        )
    return float(best[order[fits[-1]]])


def conformal_threshold(chosen: np.ndarray, alpha: float) -> float:
    """The probability that a label needs to belong to the set.

    Args:
        chosen: probability of the right label of every held-out photo [N].
        alpha: share of photos whose set may lack the right label, 0..1.

    Raises:
        DataError: so few photos can promise no such share.
    """
    rank = math.floor((len(chosen) + 1) * alpha)
    if rank < 1:
        raise DataError(
            f"sets that miss {alpha:.1%} of the photos need at least {math.ceil(1 / alpha) - 1} held-out "
            f"ones, there are {len(chosen)}; allow more misses, or add photos"
        )
    return float(np.sort(chosen)[rank - 1])


def _of_answers(best: np.ndarray, right: np.ndarray, threshold: float | None) -> dict[str, Any]:
    if threshold is None:
        return {}
    answered = best >= threshold
    count, good = int(answered.sum()), int(right[answered].sum())
    low, high = wilson_interval(good, count)
    return {"coverage": count / len(best), "error": 1 - good / count, "error_interval": [1 - high, 1 - low]}


def _of_sets(scores: np.ndarray, labels: np.ndarray, minimum: float | None) -> dict[str, Any]:
    if minimum is None:
        return {}
    inside = scores >= minimum
    hit = inside[np.arange(len(labels)), labels].mean()
    return {"set_size": float(inside.sum(axis=1).mean()), "set_miscoverage": float(1 - hit)}
