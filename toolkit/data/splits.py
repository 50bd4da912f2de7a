"""Splits of photos: leak-proof by content hash, nested few shots, folds.

pool ──k_shot──► few shots ──stratified_folds──► (training, validation) positions
few shots, test ──check_disjoint──► refused where they share an image
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from synthkit.data.images import ImageSet
from synthkit.errors import DataError, abridged


def check_disjoint(first: ImageSet, second: ImageSet, names: tuple[str, str]) -> None:
    """Refuse two image sets that share a file's content.

    Args:
        first: one set.
        second: the other.
        names: what to call them in the message, for example ("the few shots", "the test set").

    Raises:
        DataError: names some of the shared files.
    """
    refuse_shared(second, {item.sha256: str(item.path) for item in first.items}, names)


def refuse_shared(images: ImageSet, known: Mapping[str, str], names: tuple[str, str]) -> None:
    """Refuse an image set that holds content of which only hashes are known.

    Args:
        images: the set.
        known: SHA-256 -> where that content was seen before.
        names: what to call the known content and the set in the message.

    Raises:
        DataError: names some of the shared files.
    """
    shared = [f"{item.path} ({known[item.sha256]})" for item in images.items if item.sha256 in known]
    if shared:
        raise DataError(
            f"{names[1]} shares {len(shared)} image(s) with {names[0]}: "
            f"{abridged(shared, 5, '; ')}; a measurement needs images never trained on, "
            "so remove them from one of the two"
        )


def stratified_folds(labels: np.ndarray, k: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cross-validation splits as (training, validation) positions, each class spread evenly over the folds.

    An image that is alone in its class is trained on in every fold, and there are no more folds than the
    largest class has images; where every class has one image there is no fold.

    Args:
        labels: class index per image.
        k: number of folds at the most.
        seed: of the sample.
    """
    sizes = np.bincount(labels)
    count = min(k, int(sizes.max()))
    if count < 2:
        return []
    fold = np.full(len(labels), -1)
    dealt = 0
    random = np.random.default_rng(seed)
    for label in np.flatnonzero(sizes > 1):
        members = random.permutation(np.flatnonzero(labels == label))
        fold[members] = (dealt + np.arange(len(members))) % count
        dealt += len(members)
    return [(np.flatnonzero(fold != one), np.flatnonzero(fold == one)) for one in range(count)]


def k_shot(images: ImageSet, shots: int, seed: int) -> np.ndarray:
    """Positions of a few images of every class; a larger sample of the same seed contains the smaller ones.

    Of exact copies one is drawn at the most.

    Args:
        images: where to draw from.
        shots: images per class.
        seed: of the sample; the order within a class is that of a hash of seed and content.

    Raises:
        DataError: a class has fewer images.
    """
    few = [f"{name} has {number}" for name, number in images.distinct().counts().items() if number < shots]
    if few:
        raise DataError(f"{shots} images per class were asked for, but {', '.join(few)}; ask for fewer")
    return sample(images, [shots] * len(images.classes), seed)


def sample(images: ImageSet, numbers: Sequence[int], seed: int) -> np.ndarray:
    """Positions of so many images of each class; like `k_shot`, but for other numbers.

    Args:
        images: where to draw from.
        numbers: images of each class; where it has fewer, all of them.
        seed: of the sample.
    """
    first = {item.sha256: position for position, item in reversed(list(enumerate(images.items)))}
    order = [hashlib.sha256(f"{seed}/{item.sha256}".encode()).digest() for item in images.items]
    chosen: list[int] = []
    for label, number in enumerate(numbers):
        members = [position for position in first.values() if images.items[position].label == label]
        chosen += sorted(members, key=lambda position: order[position])[:number]
    return np.array(sorted(chosen))
