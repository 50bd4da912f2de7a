"""Top-1 of a bundle on a test folder that shares no image with what the student was trained on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from synthkit import standalone
from synthkit.data.images import ImageSet
from synthkit.data.splits import refuse_shared
from synthkit.engines.bundle.format import Bundle
from synthkit.metrics import classification as metrics

_CHUNK = 256  # images decoded at once


def evaluate_bundle(bundle: Bundle, test_dir: Path, skip_bad: bool = False) -> dict[str, Any]:
    """Measure a bundle.

    Args:
        bundle: an opened bundle.
        test_dir: class folders; classes of the bundle may be absent, others are refused.
        skip_bad: leave unreadable files out instead of refusing the folder.

    Returns:
        top1, n_test, per_class, interval (95 %, Wilson), confusion (rows = true class), calibration_error
        and seconds; "answers" and "sets" as far as the bundle has a threshold and label sets.

    Raises:
        DataError: a class is unknown, or an image was trained on.
    """
    started = time.perf_counter()
    images = ImageSet.scan(test_dir, skip_bad).with_classes(bundle.labels)
    trained_on = bundle.facts["provenance"].get("trained_on", [])
    known = dict.fromkeys(trained_on, "trained on")
    refuse_shared(images, known, ("the training photos", str(test_dir)))
    logits = compute_logits(bundle, images)
    measured = _measured(logits.argmax(axis=1), images)
    measured |= _judged(logits, images.labels, standalone.read_confidence(bundle.folder))
    return {**measured, "seconds": round(time.perf_counter() - started, 3)}


def predict_labels(bundle: Bundle, images: ImageSet) -> np.ndarray:
    """Index of the predicted class of every image."""
    return np.asarray(compute_logits(bundle, images).argmax(axis=1))


def compute_logits(bundle: Bundle, images: ImageSet) -> np.ndarray:
    """Logits of every image [N, classes], a few hundred of them decoded at once."""
    positions = range(len(images))
    chunks = [images.subset(positions[start : start + _CHUNK]) for start in positions[::_CHUNK]]
    return np.concatenate([bundle.logits(one.load(bundle.preprocessing)) for one in chunks])


def _judged(logits: np.ndarray, labels: np.ndarray, confidence: Mapping[str, Any]) -> dict[str, Any]:
    """How far the probabilities can be believed, and what the bundle's limits make of them."""
    scores = standalone.softmax(logits.astype(np.float64)).round(6)  # as `predict` compares them
    best, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    found: dict[str, Any] = {"calibration_error": metrics.calibration_error(best, right)}
    if (threshold := confidence.get("threshold")) is not None:
        found["answers"] = _of_answers(right[best >= threshold], len(labels), threshold)
    if (minimum := confidence.get("conformal_threshold")) is not None:
        inside = scores >= minimum
        found["sets"] = {
            "minimum": minimum,
            "mean_size": float(inside.sum(axis=1).mean()),
            "coverage": float(inside[np.arange(len(labels)), labels].mean()),
            "empty": int(np.sum(~inside.any(axis=1))),
        }
    return found


def _of_answers(right: np.ndarray, count: int, threshold: float) -> dict[str, Any]:
    """Figures of the images that get an answer; right: which of these answers are right, bool."""
    return {
        "threshold": threshold,
        "coverage": len(right) / count,
        "unknown": count - len(right),
        "accuracy": float(right.mean()) if len(right) else None,
        "interval": list(metrics.wilson_interval(int(right.sum()), len(right))) if len(right) else None,
    }


def _measured(predicted: np.ndarray, images: ImageSet) -> dict[str, Any]:
    labels = images.labels
    right = int(np.sum(predicted == labels))
    return {
        "top1": metrics.top1(predicted, labels),
        "n_test": len(labels),
        "interval": list(metrics.wilson_interval(right, len(labels))),
        "per_class": metrics.per_class(predicted, labels, images.classes),
        "confusion": metrics.confusion(predicted, labels, len(images.classes)).tolist(),
    }
