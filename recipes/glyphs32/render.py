"""Render one labelled and captioned picture from a symbol and a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from synthkit.recipes.glyphs32 import camera, scene
from synthkit.recipes.glyphs32.captions import CLASS_WORDS, FAMILIES, SYMBOLS, caption
from synthkit.recipes.glyphs32.legibility import Legibility, measure
from synthkit.recipes.glyphs32.placement import FRAME, Placement, draw_placement, elastic, fill_frame, place
from synthkit.recipes.glyphs32.shapes import DRAW, Shape, handwritten

# Shares in the order of FAMILIES; letters are rare on rollers.
_DIGIT_SHARES = np.array([0.22, 0.26, 0.15, 0.09, 0.18, 0.05, 0.05])
_LETTER_SHARES = np.array([0.36, 0.31, 0.08, 0.09, 0.02, 0.06, 0.08])

# Share of the handwriting that comes from a form scanner.
_SCANNED = 0.35

#: The least that a picture must keep to be given out; engraving shows by its edges and is not measured.
LEAST = Legibility(contrast=18.0, likeness=0.5)


@dataclass(frozen=True)
class Rendering:
    """One picture with what is known about it."""

    image: np.ndarray
    symbol: str
    caption: str
    family: str


def _place(
    shape: Shape, family: str, scanned: bool, rng: np.random.Generator
) -> tuple[Placement, np.ndarray]:
    upright = family in ("roller counter", "engraved")
    placement = draw_placement(shape, rng, loose=family == "handwritten", upright=upright)
    if scanned:
        placement = fill_frame(placement, shape.mask, rng)
    mask = place(shape.mask, placement)
    if rng.random() < (0.4 if family == "handwritten" else 0.12):
        mask = elastic(mask, rng, rng.uniform(1, 3))
    return placement, mask


def _paint(
    symbol: str, family: str, shape: Shape, placement: Placement, mask: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, list[str]]:
    """Give the placed symbol its surroundings, ink and paper; returns the picture and its words."""
    others, shade = scene.surroundings(symbol, family, placement, rng)
    colours = scene.draw_colours(family, rng)
    strength = 1.0 if rng.random() < 0.6 else rng.uniform(0.3, 1.0)
    if family == "engraved":
        strength *= 0.4
    picture = scene.paint(np.maximum(mask, others), colours, strength)
    words = [family, colours.words, *shape.words]
    if placement.height < 0.58 * FRAME:
        words.append("small")
    elif placement.height > 0.9 * FRAME:
        words.append("large")
    if strength < 0.5:
        words.append("low contrast")
    if family == "engraved":
        picture = scene.emboss(picture, mask, rng)
    if shade is not None:
        picture = picture * shade[:, :, None]
    return picture, words


def _light(
    picture: np.ndarray, mask: np.ndarray, family: str, rng: np.random.Generator
) -> tuple[np.ndarray, list[str]]:
    """Surface, frame, light and glass, each with its own chance."""
    plain = family == "handwritten"
    words = []
    if rng.random() < (0.1 if plain else 0.2):
        picture = scene.cast_shadow(picture, mask, rng)
        words.append("shadow")
    if rng.random() < (0.2 if plain else 0.4):
        picture = scene.add_texture(picture, rng)
    if rng.random() < (0.08 if plain else 0.55 if family == "roller counter" else 0.3):
        picture = scene.add_frame(picture, rng)
        words.append("framed")
    if rng.random() < (0.2 if plain else 0.4):
        picture = scene.add_uneven_light(picture, rng)
        words.append("uneven light")
    if rng.random() < (0.04 if plain else 0.15):
        picture = scene.add_reflection(picture, rng)
        words.append("reflection")
    return picture, words


def _photograph(picture: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Pass the scene through the camera."""
    image, blurred = camera.defocus(camera.to_image(camera.expose(picture, rng)), rng)
    image, coarse = camera.sample(image, size, rng)
    if rng.random() < 0.2:
        image = camera.sharpen(image, rng)
    noisy = False
    if rng.random() < 0.4:
        image, noisy = camera.add_noise(image, rng)
    if rng.random() < 0.35:
        image = camera.jpeg(image, rng)
    words = [word for word, said in (("blurred", blurred or coarse), ("noisy", noisy)) if said]
    return np.asarray(image), words


def _scan(picture: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Pass the scene through a form scanner, which sees ink and paper and no light."""
    image = camera.scan(camera.to_image(picture), size, rng)
    if rng.random() < 0.15:
        image = camera.add_noise(image, rng)[0]
    return np.asarray(image), ["scanned"]


def _attempt(
    symbol: str, family: str, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draw one picture; returns it with the symbol's own mask and what a caption may say."""
    scanned = family == "handwritten" and rng.random() < _SCANNED
    shape = handwritten(symbol, rng, thick=True) if scanned else DRAW[family](symbol, rng)
    placement, mask = _place(shape, family, scanned, rng)
    picture, words = _paint(symbol, family, shape, placement, mask, rng)
    if scanned:
        image, seen = _scan(picture, size, rng)
        return image, mask, words + seen
    picture, lit = _light(picture, mask, family, rng)
    image, seen = _photograph(picture, size, rng)
    return image, mask, words + lit + seen


def _legible(image: np.ndarray, mask: np.ndarray) -> bool:
    found = measure(image, mask)
    return found.contrast >= LEAST.contrast and found.likeness >= LEAST.likeness


def render(symbol: str, seed: int, size: int = 32) -> Rendering:
    """Render one picture; the same symbol and seed always give the same one.

    Args:
        symbol: a digit or capital letter.
        seed: any non-negative integer.
        size: side of the picture in pixels.

    Returns:
        The picture with its caption.

    Raises:
        ValueError: if the symbol is not one of the 36.
    """
    if symbol not in CLASS_WORDS:
        raise ValueError(f"symbol {symbol!r} is not drawn here; give a digit or a capital letter A-Z")
    shares = _DIGIT_SHARES if symbol.isdigit() else _LETTER_SHARES
    rng = np.random.default_rng((SYMBOLS.index(symbol), seed))
    family = FAMILIES[rng.choice(len(FAMILIES), p=shares)]
    # The family is fixed first, so that throwing away illegible pictures does not shift the shares.
    attempt = 0
    while True:
        attempt += 1
        rng = np.random.default_rng((SYMBOLS.index(symbol), seed, attempt))
        image, mask, words = _attempt(symbol, family, size, rng)
        if family == "engraved" or _legible(image, mask):
            return Rendering(image, symbol, caption(CLASS_WORDS[symbol], words, rng), family)
