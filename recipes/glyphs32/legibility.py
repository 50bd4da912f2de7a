"""Whether a person could still read a rendered symbol: does its ink stand out, did its form survive?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter


@dataclass(frozen=True)
class Legibility:
    """Contrast in 8-bit steps, and likeness as a correlation with the drawn mask."""

    contrast: float
    likeness: float


def measure(image: np.ndarray, mask: np.ndarray) -> Legibility:
    """Compare a finished picture with the mask it was made from.

    Args:
        image: uint8 picture, [size, size, 3].
        mask: the symbol's ink in 0..1, of any square size.
    """
    side = (image.shape[1], image.shape[0])
    drawn = Image.fromarray((np.clip(mask, 0, 1) * 255).astype(np.uint8)).resize(side, Image.Resampling.BOX)
    ink = np.asarray(drawn, dtype=np.float32) / 255.0
    # Only the symbol and its close surroundings count: a frame at the rim must not pass for ink or paper.
    near = np.asarray(drawn.filter(ImageFilter.BoxBlur(3))) > 3
    pixels = image.astype(np.float32)
    inked, paper = ink > 0.5 * ink.max(), near & (ink < 0.1)
    if not inked.any() or not paper.any():
        return Legibility(0.0, 0.0)
    difference = pixels[inked].mean(axis=0) - pixels[paper].mean(axis=0)
    contrast = float(0.7 * abs(difference.mean()) + 0.3 * np.abs(difference).max())
    seen, wanted = (pixels @ difference)[near], ink[near]
    spread = float(seen.std() * wanted.std())
    likeness = float(((seen - seen.mean()) * (wanted - wanted.mean())).mean()) / spread if spread > 0 else 0.0
    return Legibility(contrast, likeness)
