"""Photos that look alike, whatever they show: k-means on what their latents say of colour and contrast.

A feature is a channel's mean or standard deviation over a photo's latent, as in the style losses of Huang &
Belongie 2017 (AdaIN). What remains of the class in them is estimated as a random effect and taken off, so
that groups tell lamps, cameras and print apart and not digits. Pure NumPy and scikit-learn.
"""

from __future__ import annotations

import numpy as np

from synthkit.errors import ConfigError, MissingExtra

_RESTARTS = 10  # of k-means


def cluster_by_style(latents: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Group photos by their appearance.

    Args:
        latents: float [N, C, h, w].
        labels: class index of each photo [N].
        count: number of groups.
        seed: of k-means.

    Returns:
        Group of each photo [N]; 0 is the largest one. Every group has a photo.

    Raises:
        ConfigError: there are fewer photos that differ than groups.
    """
    if count == 1:
        return np.zeros(len(latents), dtype=np.int64)
    features = style_features(latents, labels)
    differing = len(np.unique(features.round(6), axis=0))
    if differing < count:
        raise ConfigError(
            f"{count} clusters were asked for, but there are {differing} photos that differ; "
            "ask for fewer --clusters"
        )
    return _by_size(_k_means(features, count, seed))


def style_features(latents: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Features of the appearance [N, 2 C]: each channel's mean and standard deviation, the class taken off.

    They keep the units of the latents, in which a channel counts by how much it varies. Standardised, those
    that tell nothing apart would count as much.

    Args:
        latents: float [N, C, h, w].
        labels: class index of each photo [N].
    """
    features = np.concatenate([latents.mean((2, 3)), latents.std((2, 3))], axis=1).astype(np.float64)
    return np.asarray(features - class_effects(features, labels))


def class_effects(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Shift by each image's class of its features [N, D]: best linear unbiased prediction.

    With a few photos a class mean is mostly chance, so it counts by the share of variance that classes
    explain beyond chance (one-way analysis of variance, Searle et al. 1992). Where every class has one photo,
    nothing can be told apart and nothing is taken off.

    Args:
        features: float [N, D].
        labels: class index of each image [N].
    """
    present, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    freedom = len(features) - len(present)
    if freedom < 1 or len(present) < 2:
        return np.zeros_like(features)
    means = np.stack([features[index == one].mean(0) for one in range(len(present))])
    within = ((features - means[index]) ** 2).sum(0) / freedom
    weight = sizes[:, None] / len(features)
    around = means - (weight * means).sum(0)
    between = (sizes[:, None] * around**2).sum(0) / (len(present) - 1)
    usual_size = (len(features) - (sizes**2).sum() / len(features)) / (len(present) - 1)
    variance = np.maximum(0, (between - within) / usual_size)  # of the classes, chance taken off
    total = variance + within / sizes[:, None]
    effects = np.divide(variance, total, out=np.zeros_like(total), where=total > 0) * around
    return np.asarray(effects[index])


def _k_means(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise MissingExtra("sklearn", "train") from None
    fitted = KMeans(count, n_init=_RESTARTS, random_state=seed % (1 << 32)).fit(features)
    return np.asarray(fitted.labels_)


def _by_size(groups: np.ndarray) -> np.ndarray:
    """Groups renumbered from the largest to the smallest; of equal ones the one with the first photo."""
    numbers, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    renumbered = np.empty(numbers.max() + 1, dtype=np.int64)
    renumbered[numbers[order]] = np.arange(len(numbers))
    return np.asarray(renumbered[groups])
