"""Top-1 of a bundle on a test folder that shares no image with what the student was trained on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from synthkit import metrics
from synthkit.engines.bundle import Bundle
from synthkit.images import ImageSet, refuse_shared

_CHUNK = 256  # images decoded at once


def evaluate_bundle(bundle: Bundle, test_dir: Path, skip_bad: bool = False) -> dict[str, Any]:
    """Measure a bundle.

    Args:
        bundle: an opened bundle.
        test_dir: class folders; classes of the bundle may be absent, others are refused.
        skip_bad: leave unreadable files out instead of refusing the folder.

    Returns:
        top1, n_test, per_class, interval (95 %, Wilson), confusion (rows = true class) and seconds.

    Raises:
        DataError: a class is unknown, or an image was trained on.
    """
    started = time.perf_counter()
    images = ImageSet.scan(test_dir, skip_bad).with_classes(bundle.labels)
    trained_on = bundle.facts["lineage"].get("trained_on", [])
    known = dict.fromkeys(trained_on, "trained on")
    refuse_shared(images, known, ("the training photos", str(test_dir)))
    measured = _measured(predict_labels(bundle, images), images)
    return {**measured, "seconds": round(time.perf_counter() - started, 3)}


def predict_labels(bundle: Bundle, images: ImageSet) -> np.ndarray:
    """Index of the predicted class of every image, a few hundred of them decoded at once."""
    positions = range(len(images))
    chunks = [images.subset(positions[start : start + _CHUNK]) for start in positions[::_CHUNK]]
    return np.concatenate([bundle.logits(one.load(bundle.preprocessing)).argmax(axis=1) for one in chunks])


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
