"""Distances of synthetic images from real ones: measures of what is shown, and of how it looks.

Content is measured on features of some network, float [N, D]; appearance on pixels, uint8 [N, H, W, 3]. Pure
NumPy, with scikit-learn for a shrunk covariance; it knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from synthkit.errors import MissingExtra

_ROWS = 1024  # of a distance matrix at a time
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # of ITU-R BT.601


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two sets of features, each taken for normal (Heusel et al. 2017):

        || mean_1 - mean_2 ||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

    The covariances are Ledoit and Wolf's (2004), which are regular with fewer images than dimensions, where
    sample covariances are singular and understate. The distance is still biased by the number of images
    (Chong & Forsyth 2020): compare only values of equally many images on the same features, and beside them
    the distance of two parts of the real set. A square, as FID is, but no FID: the network is another.

    Args:
        first: float [N, D].
        second: float [M, D].

    Raises:
        ValueError: a set has fewer than two images, or the dimensions differ.
        MissingExtra: scikit-learn is not installed.
    """
    for one in (first, second):
        if len(one) < 2 or one.ndim != 2 or one.shape[1] != first.shape[1]:
            raise ValueError(f"features of {first.shape} and {second.shape}: need two images and one width")
    means = first.mean(0, dtype=np.float64) - second.mean(0, dtype=np.float64)
    covariances = [_covariance(one) for one in (first, second)]
    root = _square_root(covariances[0])
    cross = np.linalg.eigvalsh(root @ covariances[1] @ root)
    trace = sum(float(np.trace(one)) for one in covariances)
    distance = float(means @ means) + trace - 2 * float(np.sqrt(np.maximum(cross, 0)).sum())
    return max(0.0, distance)


def _covariance(features: np.ndarray) -> np.ndarray:
    try:
        from sklearn.covariance import ledoit_wolf
    except ImportError:
        raise MissingExtra("sklearn", "train") from None
    return np.asarray(ledoit_wolf(features.astype(np.float64))[0])


def _square_root(matrix: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T)


def density_and_coverage(real: np.ndarray, synthetic: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020), with balls up to the k-th neighbour around each real image.

    Density, 0 and up: in how many of the k balls expected there a synthetic image lies; near 1 where the sets
    are alike. Coverage, 0..1: share of the real images with a synthetic one in their ball.

    Args:
        real: float [N, D].
        synthetic: float [M, D].
        k: neighbours; below N.

    Raises:
        ValueError: there are not more than k real images, or no synthetic one.
    """
    if not 1 <= k < len(real) or not len(synthetic):
        raise ValueError(f"k = {k} needs more than {k} real images ({len(real)}) and a synthetic one")
    radii = np.concatenate([np.partition(rows, k, axis=1)[:, k] for rows in _distances(real, real)])
    inside, covered = 0, np.zeros(len(real), dtype=bool)
    for rows in _distances(synthetic, real):
        within = rows <= radii
        inside += int(within.sum())
        covered |= within.any(axis=0)
    return inside / (k * len(synthetic)), float(covered.mean())


def expected_coverage(real: int, synthetic: int, k: int = 5) -> float:
    """Coverage to be expected where both sets come from one distribution (Naeem et al. 2020).

    Args:
        real: number of real images.
        synthetic: number of synthetic images.
        k: neighbours.
    """
    missed = 1.0
    for step in range(1, k + 1):
        missed *= (real - step) / (synthetic + real - step)
    return 1 - missed


def mean_distance(features: np.ndarray) -> float | None:
    """Mean distance of two different images of a set: its diversity; None for a single image."""
    if len(features) < 2:
        return None
    total = sum(float(rows.sum()) for rows in _distances(features, features))
    return total / (len(features) * (len(features) - 1))


def _distances(first: np.ndarray, second: np.ndarray) -> Iterator[np.ndarray]:
    """Euclidean distances [n, M] of some rows of the first set at a time; exactly 0 to an equal image."""
    centre = second.mean(0, dtype=np.float64)  # keeps the squares below small
    others = second - centre
    lengths = np.einsum("ij,ij->i", others, others)
    for start in range(0, len(first), _ROWS):
        rows = first[start : start + _ROWS] - centre
        squares = np.einsum("ij,ij->i", rows, rows)[:, None] + lengths - 2 * rows @ others.T
        scale = 1e-12 * max(1e-300, float(lengths.max(initial=0)))
        yield np.sqrt(np.where(squares > scale, squares, 0))


def channel_statistics(images: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of each colour channel of each image, float [N, 6], pixels in 0..1."""
    pixels = images.astype(np.float32) / 255
    return np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2))], axis=1)


def power_spectrum(images: np.ndarray) -> np.ndarray:
    """Mean log10 power of the brightness by spatial frequency, averaged over directions, float [H // 2].

    Entry i is of i + 1 periods over the image's shorter side; each image has its mean taken off, and a window
    (Hann) keeps its border from counting as an edge.

    Args:
        images: uint8 [N, H, W, 3].
    """
    grey = images.astype(np.float32) @ _LUMA / 255
    height, width = grey.shape[1:]
    grey = (grey - grey.mean((1, 2), keepdims=True)) * np.hanning(height)[:, None] * np.hanning(width)
    power = np.abs(np.fft.fft2(grey)) ** 2 / (height * width)
    side = min(height, width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) * side
    rings = np.rint(radius).astype(int)
    found = [np.log10(power[:, rings == ring].mean(1) + 1e-10).mean() for ring in range(1, side // 2 + 1)]
    return np.array(found)


def sharpness(images: np.ndarray) -> np.ndarray:
    """log10 of the variance of the brightness's Laplacian of each image [N] (Pech-Pacheco et al. 2000)."""
    grey = images.astype(np.float32) @ _LUMA / 255
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return np.asarray(np.log10((around - 4 * inner).var((1, 2)) + 1e-8))
