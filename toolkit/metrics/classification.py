"""Quality of predictions: top-1, per class, confusion, and the interval that so many images allow.

Pure NumPy on label indices; it knows no model and no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def top1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of right predictions, 0..1."""
    return float(np.mean(predicted == labels))


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats of the right classes.

    Args:
        logits: float [N, classes].
        labels: class indices [N].
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_likelihood = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-log_likelihood[np.arange(len(labels)), labels].mean())


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts [classes, classes]: row = true class, column = predicted class."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def per_class(predicted: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Class name -> share of its images that are predicted right; classes without images are left out."""
    matrix = confusion(predicted, labels, len(classes))
    return {
        name: float(matrix[index, index] / matrix[index].sum())
        for index, name in enumerate(classes)
        if matrix[index].sum()
    }


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's confidence interval of a share, sound for small samples and near 0 and 1.

    Args:
        right: right predictions.
        total: all predictions, at least one.
        z: standard score of the confidence level; 1.96 is 95 %.
    """
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def is_worse(correct: np.ndarray, baseline: np.ndarray, z: float = 1.0) -> bool:
    """True if the McNemar z-statistic against `baseline` exceeds `z`.

    The statistic is (n01 - n10) / sqrt(n01 + n10), where n01 counts the images that only the baseline
    classifies correctly and n10 those that only the other classifier does (McNemar 1947).

    Args:
        correct: which images a classifier got right, bool [N].
        baseline: which of the same images its baseline got right, bool [N].
        z: threshold in standard deviations of chance.
    """
    lost, won = int((baseline & ~correct).sum()), int((correct & ~baseline).sum())
    return lost - won > z * math.sqrt(lost + won)


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy differ, 0..1 (Guo et al. 2017).

    Predictions are sorted into bins of equal width by their confidence; the difference between mean
    confidence and share of right predictions counts by the number of predictions in the bin.

    Args:
        confidence: probability of the predicted class, 0..1 [N].
        right: whether the prediction is right [N].
        bins: number of bins.
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    surplus = np.bincount(place, weights=confidence - right, minlength=bins)
    return float(np.abs(surplus).sum() / len(confidence))


def mean_and_std(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean and sample standard deviation (n - 1) as `<name>_mean` and `<name>_std`, to four places.

    The deviation of a single value is 0.
    """
    samples = np.asarray(values, dtype=float)
    deviation = float(samples.std(ddof=1)) if len(samples) > 1 else 0.0
    return {f"{name}_mean": round(float(samples.mean()), 4), f"{name}_std": round(deviation, 4)}


def mean_interval(values: np.ndarray) -> list[float] | None:
    """95 % confidence interval of a mean by Student's t; None for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return [round(float(values.mean()) - half, 4), round(float(values.mean()) + half, 4)]


def paired_test(values: np.ndarray, baseline: np.ndarray) -> dict[str, float | int | None]:
    """Paired two-sided t-test of one method against another on the same splits.

    Args:
        values: top-1 of the method, one per split.
        baseline: top-1 of the other method on the same splits, in the same order.

    Returns:
        `difference`, the mean of values - baseline; `p_value`, None for a single pair or if the differences
        do not vary; `pairs`, their number.
    """
    differences = values - baseline
    return {
        "difference": round(float(differences.mean()), 4),
        "p_value": _p_value(differences),
        "pairs": len(differences),
    }


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for the number of tests (Holm 1979, step down), to four places.

    Args:
        p_values: of all tests that were made; None for a test that could not be, which does not count.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = round(largest, 4)
    return corrected


def _p_value(differences: np.ndarray) -> float | None:
    from scipy.stats import ttest_1samp

    if len(differences) < 2 or np.ptp(differences) == 0:
        return None
    return round(float(ttest_1samp(differences, 0).pvalue), 4)
