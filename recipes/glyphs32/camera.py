"""What a cheap camera does to a scene: few pixels, blur, noise, colour cast, sharpening and JPEG."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageFilter

_FILTER = Image.Resampling
_SMOOTH = (_FILTER.BILINEAR, _FILTER.BICUBIC, _FILTER.BOX, _FILTER.LANCZOS)


def _motion_kernel(rng: np.random.Generator) -> ImageFilter.Kernel:
    """A short streak of equal weights, in one of four directions."""
    line = np.zeros((5, 5))
    reach = int(rng.integers(1, 3))
    dx, dy = [(1, 0), (0, 1), (1, 1), (1, -1)][rng.integers(4)]
    for step in range(-reach, reach + 1):
        line[2 + step * dy, 2 + step * dx] = 1
    return ImageFilter.Kernel((5, 5), line.ravel().tolist())


def to_image(picture: np.ndarray) -> Image.Image:
    """Quantise a float picture."""
    return Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))


def expose(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exposure, gamma and colour cast."""
    gain = rng.normal(1, 0.12) * (1 + (rng.normal(0, 0.08, size=3) if rng.random() < 0.4 else 0.0))
    picture = np.clip(picture * np.asarray(gain, dtype=np.float32) + np.float32(rng.normal(0, 0.04)), 0, 1)
    return picture ** math.exp(rng.normal(0, 0.2)) if rng.random() < 0.5 else picture


def defocus(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, bool]:
    """Blur the scene before sampling; says whether it shows."""
    roll = rng.random()
    if roll < 0.35:
        return image, False
    if roll < 0.8:
        radius = rng.gamma(2.0, 0.6)
        return image.filter(ImageFilter.GaussianBlur(radius)), radius > 1.8
    if roll < 0.9:
        return image.filter(_motion_kernel(rng)), True
    radius = rng.uniform(1, 2.5)
    return image.filter(ImageFilter.BoxBlur(radius)), radius > 1.5


def sample(image: Image.Image, size: int, rng: np.random.Generator) -> tuple[Image.Image, bool]:
    """Bring the scene to its final size, often by way of the few pixels a real crop has.

    Args:
        image: the scene.
        size: side of the result.
        rng: source of the choices.

    Returns:
        The sampled picture, and whether it lost visible detail.
    """
    roll = rng.random()
    if roll < 0.5:
        return image.resize((size, size), _FILTER.BOX), False
    few = int(rng.integers(8, 13)) if roll < 0.65 else int(rng.integers(12, 26))
    small = image.resize((few, int(few * rng.uniform(1, 1.6))), _FILTER.BOX)
    back = _SMOOTH[rng.integers(len(_SMOOTH))]
    return small.resize((size, size), back), few < 14


def scan(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Count ink in a coarse grid of eight to ten cells, then enlarge it softly."""
    few = 8 if rng.random() < 0.7 else int(rng.integers(9, 12))
    gain = float(rng.uniform(1.0, 1.35))
    small = image.resize((few, few), _FILTER.BOX).point(lambda level: min(255.0, level * gain))
    enlarge = _SMOOTH[rng.integers(2)] if rng.random() < 0.85 else _FILTER.NEAREST
    return small.resize((size, size), enlarge)


def sharpen(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The halos of a phone's over-eager sharpening."""
    return image.filter(ImageFilter.UnsharpMask(rng.uniform(1, 2.5), int(rng.uniform(80, 300)), 0))


def add_noise(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, bool]:
    """Sensor noise, grey or coloured; says whether it shows."""
    level = rng.gamma(1.5, 4.0)
    channels = 3 if rng.random() < 0.5 else 1
    noise = rng.normal(0, level, size=(image.height, image.width, channels))
    noisy = np.clip(np.asarray(image, dtype=np.float32) + noise, 0, 255)
    return Image.fromarray(noisy.astype(np.uint8)), level > 12


def jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Compress and open again."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(25, 92)))
    return Image.open(buffer).convert("RGB")
