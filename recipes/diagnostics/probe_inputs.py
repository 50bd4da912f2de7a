"""What a student of `probe` sees of an image: all, or what is left without colour, surface or shape.

Every function takes and gives uint8 pixels [N, height, width, 3].
"""

from __future__ import annotations

import numpy as np


def _photos(pixels: np.ndarray) -> np.ndarray:
    return pixels


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Brightness without colour."""
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    return np.repeat((pixels @ weights).round().astype(np.uint8)[..., None], 3, axis=-1)


def _edges(pixels: np.ndarray) -> np.ndarray:
    """Shape without surface: how steep the brightness is, scaled to the image's steepest."""
    down, right = np.gradient(_grey(pixels)[..., 0].astype(np.float32), axis=(1, 2))
    steep = np.hypot(down, right)
    scaled = 255 * steep / np.maximum(steep.max(axis=(1, 2), keepdims=True), 1e-6)
    return np.repeat(scaled.astype(np.uint8)[..., None], 3, axis=-1)


def _patches(pixels: np.ndarray, parts: int = 4) -> np.ndarray:
    """Texture without shape: the tiles of a grid, shuffled, each image in its own way."""
    count, height, width, _ = pixels.shape
    high, wide = height // parts, width // parts
    tiles = pixels[:, : high * parts, : wide * parts].reshape(count, parts, high, parts, wide, 3)
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(count, parts * parts, high, wide, 3)
    shuffled = np.stack([one[np.random.default_rng(i).permutation(len(one))] for i, one in enumerate(tiles)])
    shuffled = shuffled.reshape(count, parts, parts, high, wide, 3).transpose(0, 1, 3, 2, 4, 5)
    found: np.ndarray = np.array(pixels)
    found[:, : high * parts, : wide * parts] = shuffled.reshape(count, high * parts, wide * parts, 3)
    return found


#: What a student is shown of an image: all of it, or what is left without colour, surface or shape.
INPUTS = {"photos": _photos, "grey": _grey, "edges": _edges, "patches": _patches}
