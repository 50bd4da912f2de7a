"""The measures of the gap against closed forms, brute force and planted differences."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from synthkit.metrics.distributions import (
    channel_statistics,
    density_and_coverage,
    expected_coverage,
    frechet_distance,
    mean_distance,
    power_spectrum,
    sharpness,
)

RANDOM = np.random.default_rng(0)


def normal(count: int, mean: float = 0.0, scale: float = 1.0, width: int = 4, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(mean, scale, (count, width)).astype(np.float32)


def test_the_frechet_distance_of_normal_sets_is_the_closed_form() -> None:
    pytest.importorskip("sklearn")
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.normal(size=(4, 4)))[0]
    first = random.normal(size=(40000, 4)) * [1, 2, 3, 4]
    second = random.normal(size=(40000, 4)) * [2, 2, 1, 4] + [1, 0, 0, 2]
    expected = (1 + 4) + (1 + 0 + 4 + 0)  # means, then (deviation - deviation)^2 as the axes agree
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(expected, rel=0.03)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    turned = np.linalg.qr(random.normal(size=(4, 4)))[0]
    one, other = np.diag([1.0, 4, 9, 16]), turned.T @ np.diag([1.0, 4, 9, 16]) @ turned
    scipy_linalg = pytest.importorskip("scipy.linalg")
    root = scipy_linalg.sqrtm(one @ other).real
    exact = np.trace(one + other - 2 * root)
    assert frechet_distance(first, first @ turned) == pytest.approx(exact, rel=0.05)


def test_the_frechet_distance_is_usable_with_fewer_images_than_dimensions() -> None:
    pytest.importorskip("sklearn")
    real, alike, other = (normal(24, shift, width=64, seed=seed) for seed, shift in ((0, 0), (1, 0), (2, 1)))
    near, far = frechet_distance(real, alike), frechet_distance(real, other)
    assert 0 < near < far and far - near == pytest.approx(64, rel=0.25), "the shift of the means"
    assert frechet_distance(real, other) == pytest.approx(frechet_distance(other, real))


@pytest.mark.parametrize("shapes", [((1, 4), (5, 4)), ((5, 4), (5, 3)), ((5, 4), (0, 4))])
def test_sets_without_a_frechet_distance(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="need two images and one width"):
        frechet_distance(*(np.zeros(shape) for shape in shapes))


def slowly(real: np.ndarray, synthetic: np.ndarray, k: int) -> tuple[float, float]:
    """Density and coverage by their definition."""
    radii = [sorted(np.linalg.norm(real - one, axis=1))[k] for one in real]
    hits = np.array(
        [
            [np.linalg.norm(one - centre) <= radius for centre, radius in zip(real, radii, strict=True)]
            for one in synthetic
        ]
    )
    return hits.sum() / (k * len(synthetic)), hits.any(0).mean()


@pytest.mark.parametrize(("k", "shift"), [(1, 0.0), (3, 0.5), (5, 2.0)])
def test_density_and_coverage_are_their_definition(k: int, shift: float) -> None:
    real, synthetic = normal(30), normal(1500, shift, seed=1)
    assert density_and_coverage(real, synthetic, k) == pytest.approx(slowly(real, synthetic, k))


def test_equal_sets_have_density_and_coverage_near_one_and_modes_that_are_missed_show() -> None:
    real = np.concatenate([normal(300), normal(300, 20, seed=2)])
    alike = np.concatenate([normal(300, seed=3), normal(300, 20, seed=4)])
    density, coverage = density_and_coverage(real, alike)
    assert density == pytest.approx(1, abs=0.1) and coverage > 0.9
    assert density_and_coverage(real, alike[:300])[1] == pytest.approx(0.48, abs=0.05), "one mode of two"
    peaked = alike * 0.1
    density, coverage = density_and_coverage(normal(300), peaked[:300])
    assert density > 1 and coverage < 0.2, "all images in a few balls"


@pytest.mark.parametrize(("real", "synthetic", "k"), [(100, 100, 5), (6, 6, 3), (8, 40, 3), (300, 100, 5)])
def test_expected_coverage_is_what_one_distribution_gives(real: int, synthetic: int, k: int) -> None:
    found = [
        density_and_coverage(normal(real, seed=seed), normal(synthetic, seed=1000 + seed), k)[1]
        for seed in range(60 if real > 50 else 600)
    ]
    assert np.mean(found) == pytest.approx(expected_coverage(real, synthetic, k), abs=0.02)


@pytest.mark.parametrize(("real", "synthetic", "k"), [(5, 9, 5), (5, 0, 2), (5, 9, 0)])
def test_too_few_images_for_coverage(real: int, synthetic: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs more than"):
        density_and_coverage(normal(real), normal(synthetic), k)


def test_mean_distance_is_of_different_images() -> None:
    features = np.array([[0.0, 0], [3, 4], [0, 0]])
    assert mean_distance(features) == pytest.approx(10 / 3)
    assert mean_distance(features[:1]) is None
    far = features + 1e6
    assert mean_distance(far) == pytest.approx(10 / 3)


def images(count: int = 6, side: int = 32) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def test_channel_statistics_are_in_units_of_the_full_range() -> None:
    flat = np.zeros((1, 8, 8, 3), np.uint8)
    flat[..., 0], flat[:, ::2, :, 1] = 255, 255
    assert np.allclose(channel_statistics(flat), [[1, 0.5, 0, 0, 0.5, 0]])


def test_a_wave_shows_at_its_frequency() -> None:
    x = np.arange(32)
    for periods in (2, 5, 12):
        wave = 127 + 100 * np.sin(2 * np.pi * periods * x / 32)
        picture = np.broadcast_to(wave[None, None, :, None], (1, 32, 32, 3)).astype(np.uint8)
        spectrum = power_spectrum(picture)
        assert spectrum.shape == (16,) and int(spectrum.argmax()) == periods - 1
        upright = power_spectrum(np.swapaxes(picture, 1, 2))
        assert np.allclose(spectrum, upright, atol=1e-4)


def test_blur_lowers_high_frequencies_and_sharpness() -> None:
    sharp = images()
    soft = np.stack([np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(1))) for one in sharp])
    change = power_spectrum(soft) - power_spectrum(sharp)
    assert change[0] == pytest.approx(0, abs=0.2) and change[-1] < -1
    assert (sharpness(soft) < sharpness(sharp) - 1).all() and sharpness(sharp).shape == (6,)
    assert np.isfinite(sharpness(np.zeros((1, 8, 8, 3), np.uint8))).all()
