"""Ink on paper under some light: a placed mask becomes a colour picture, before any camera sees it.

Pictures here are float32 [FRAME, FRAME, 3] in 0..1.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from synthkit.recipes.glyphs32.placement import FRAME, Placement, place
from synthkit.recipes.glyphs32.shapes import DRAW, smooth_noise

_ROWS, _COLUMNS = (np.mgrid[0:FRAME, 0:FRAME].astype(np.float32) + 0.5) / FRAME * 2 - 1

# Hue, saturation and value ranges of each colour word.
_PALETTE: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "white": ((0.0, 1.0), (0.0, 0.1), (0.8, 1.0)),
    "black": ((0.0, 1.0), (0.0, 0.3), (0.0, 0.2)),
    "grey": ((0.0, 1.0), (0.0, 0.12), (0.4, 0.7)),
    "dark": ((0.0, 1.0), (0.05, 0.4), (0.08, 0.35)),
    "light": ((0.0, 1.0), (0.0, 0.2), (0.65, 0.95)),
    "red": ((-0.03, 0.03), (0.55, 0.95), (0.5, 0.95)),
    "orange": ((0.04, 0.09), (0.6, 0.95), (0.7, 1.0)),
    "yellow": ((0.12, 0.18), (0.4, 0.9), (0.75, 1.0)),
    "green": ((0.22, 0.42), (0.15, 0.8), (0.35, 0.85)),
    "cyan": ((0.45, 0.53), (0.3, 0.9), (0.5, 0.95)),
    "blue": ((0.56, 0.68), (0.35, 0.9), (0.35, 0.9)),
    "purple": ((0.72, 0.85), (0.2, 0.7), (0.35, 0.8)),
    "brown": ((0.05, 0.1), (0.3, 0.6), (0.25, 0.5)),
}

# (weight, ink, paper); every family has its own usual pairs, and the last entry of each draws any pair.
_ANY = ("any", "any")
_PAIRS: dict[str, tuple[tuple[float, tuple[str, str]], ...]] = {
    "printed": (
        (3, ("black", "white")), (3, ("white", "black")), (2, ("dark", "light")), (2, ("light", "dark")),
        (1, ("red", "white")), (1, ("white", "red")), (1, ("blue", "white")), (1, ("grey", "white")),
        (1, ("black", "grey")), (0.5, ("black", "yellow")), (0.7, ("red", "light")), (3, _ANY),
    ),
    "handwritten": (
        (6, ("white", "black")), (3, ("black", "white")), (1.5, ("blue", "white")), (1, ("dark", "light")),
        (1, ("light", "dark")), (1, ("grey", "white")), (0.5, ("red", "white")), (1.5, _ANY),
    ),
    "seven segment display": (
        (2, ("black", "green")), (2, ("dark", "light")), (2.5, ("black", "grey")), (1, ("blue", "light")),
        (1, ("blue", "cyan")), (1, ("dark", "cyan")), (1.5, ("red", "black")), (1, ("green", "black")),
        (1, ("white", "black")), (0.7, ("cyan", "cyan")), (0.7, ("cyan", "white")),
        (0.6, ("orange", "black")), (0.7, ("light", "blue")), (0.7, ("black", "white")), (1, _ANY),
    ),
    "dot matrix display": (
        (2.5, ("dark", "cyan")), (1.5, ("black", "green")), (1, ("black", "grey")), (1, ("dark", "light")),
        (1, ("blue", "light")), (1, ("white", "blue")), (1, ("green", "black")), (1, ("red", "black")),
        (0.7, ("orange", "black")), (0.7, ("light", "dark")), (0.7, ("dark", "green")), (1, _ANY),
    ),
    "roller counter": (
        (4, ("white", "black")), (3, ("black", "white")), (2, ("red", "white")), (2.5, ("white", "red")),
        (1.5, ("light", "dark")), (1.5, ("dark", "light")), (1, ("black", "grey")), (1, ("light", "orange")),
        (0.7, ("red", "grey")), (0.7, ("red", "light")), (0.5, ("black", "red")), (1, _ANY),
    ),
    "engraved": (
        (2, ("grey", "grey")), (2, ("light", "light")), (1, ("dark", "dark")), (1, ("grey", "light")),
        (1, ("brown", "yellow")), (1, ("dark", "grey")), (1, ("light", "grey")), (1, _ANY),
    ),
    "stamped": (
        (3, ("black", "white")), (2, ("blue", "white")), (1.5, ("red", "white")), (1.5, ("purple", "white")),
        (1.5, ("dark", "light")), (1, ("black", "yellow")), (1, ("light", "dark")), (1, ("dark", "brown")),
        (2, _ANY),
    ),
}  # fmt: skip

# Repeated by how often rims have them.
_FRAME_COLOURS = ("black",) * 6 + ("dark",) * 4 + ("light",) * 3 + ("white", "grey", "red") * 2 + ("orange",)


@dataclass(frozen=True)
class Colours:
    """Ink and paper, with the words for them."""

    ink: np.ndarray
    paper: np.ndarray
    words: str


def _colour(word: str, rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = (rng.uniform(low, high) for low, high in _PALETTE[word])
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), dtype=np.float32)


def draw_colours(family: str, rng: np.random.Generator) -> Colours:
    """Choose ink and paper as this family is usually seen, far enough apart to be read.

    Args:
        family: name of the face.
        rng: source of the choices.
    """
    pairs = _PAIRS[family]
    weights = np.array([weight for weight, _ in pairs])
    least = 0.0 if family == "engraved" else 0.22
    while True:
        ink_word, paper_word = pairs[rng.choice(len(pairs), p=weights / weights.sum())][1]
        if ink_word == "any":
            ink_word, paper_word = (str(word) for word in rng.choice(list(_PALETTE), size=2))
        ink, paper = _colour(ink_word, rng), _colour(paper_word, rng)
        # Apart in brightness above all: the eye and a small network both read shapes from it.
        if abs(float((ink - paper).mean())) + 0.3 * float(np.abs(ink - paper).max()) > least:
            return Colours(ink, paper, f"{ink_word} on {paper_word}")


def surroundings(
    symbol: str, family: str, placement: Placement, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ink of other symbols at the rim, and how far a roller's cylinder has turned away at each row.

    Args:
        symbol: the symbol in the middle.
        family: name of the face.
        placement: where the symbol lies.
        rng: source of the choices.

    Returns:
        A frame mask of the neighbours' ink, and [FRAME, 1] brightness of the wheel or None.
    """
    others = np.zeros((FRAME, FRAME), dtype=np.float32)
    shade = None
    if family == "roller counter":
        others = np.maximum(others, _wheel_neighbours(symbol, placement, rng))
        depth, centre = rng.uniform(0, 0.75), rng.uniform(-0.3, 0.3)
        shade = 1 - depth * np.clip(np.abs(_ROWS[:, :1] - centre), 0, 1.3) ** rng.uniform(1.5, 4)
    if rng.random() < (0.35 if family == "roller counter" else 0.15):
        others = np.maximum(others, _sliver(symbol, family, placement, rng))
    return others, shade


def _like(symbol: str, step: int) -> str:
    return str((int(symbol) + step) % 10) if symbol.isdigit() else chr((ord(symbol) - 65 + step) % 26 + 65)


def _wheel_neighbours(symbol: str, placement: Placement, rng: np.random.Generator) -> np.ndarray:
    """The wheel's next or previous digit, peeking in from above or below."""
    if rng.random() < 0.4:
        return np.zeros((FRAME, FRAME), dtype=np.float32)
    step = int(rng.choice([-1, 1]))
    mask = DRAW["roller counter"](_like(symbol, step), rng).mask
    rim = placement.centre_y if step < 0 else FRAME - placement.centre_y
    # The neighbour starts beyond the symbol's own edge and shows at most a third of itself.
    clear = placement.height * rng.uniform(1.04, 1.25)
    shift = max(clear, rim + placement.height * (0.5 - rng.uniform(0.0, 0.33)))
    return place(mask, placement, (0.0, step * shift))


def _sliver(symbol: str, family: str, placement: Placement, rng: np.random.Generator) -> np.ndarray:
    """A narrow part of the symbol to the left or right."""
    other = _like(symbol, int(rng.integers(0, 26)))
    side = int(rng.choice([-1, 1]))
    rim = placement.centre_x if side < 0 else FRAME - placement.centre_x
    shift = max(placement.width * 1.15, rim + placement.width * 0.5 - rng.uniform(2, 9))
    mask = place(DRAW[family](other, rng).mask, placement, (side * shift, 0.0))
    margin = np.clip((np.abs(_COLUMNS - side) * FRAME / 2 - 9) / -1.0, 0, 1)
    return np.asarray(mask * margin, dtype=np.float32)


def paint(mask: np.ndarray, colours: Colours, strength: float) -> np.ndarray:
    """Lay ink over paper; a strength below one leaves the ink pale."""
    ink = colours.paper + (colours.ink - colours.paper) * strength
    return np.asarray(colours.paper + (ink - colours.paper) * mask[:, :, None], dtype=np.float32)


def emboss(picture: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light the edges of a cut or raised symbol from one side and shade them on the other."""
    hard = Image.fromarray((mask * 255).astype(np.uint8))
    soft = np.asarray(hard.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 1.8))), dtype=np.float32)
    down, right = np.gradient(soft / 255.0)
    angle = rng.uniform(0, 2 * math.pi)
    slope = down * math.sin(angle) + right * math.cos(angle)
    lit: np.ndarray = picture + (slope * rng.uniform(2.0, 4.5))[:, :, None]
    return lit


def cast_shadow(picture: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darken the paper beside the ink, as a display's glass or a raised letter does."""
    dx, dy = (int(v) for v in rng.integers(-5, 6, size=2))
    shadow = np.roll(mask, (dy, dx), axis=(0, 1)) * (1 - mask) * rng.uniform(0.1, 0.35)
    shaded: np.ndarray = picture * (1 - shadow[:, :, None])
    return shaded


def add_texture(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grain, brushing or blotches of the surface."""
    amount = rng.uniform(0.02, 0.12)
    kind = rng.integers(3)
    if kind == 0:
        grain = smooth_noise(rng, FRAME, int(rng.integers(3, 10)))
    elif kind == 1:
        grain = np.repeat(rng.normal(0, 0.6, size=(FRAME, 1)), FRAME, axis=1)
        grain = grain if rng.random() < 0.6 else grain.T
    else:
        grain = rng.normal(0, 0.7, size=(FRAME, FRAME))
    grained: np.ndarray = picture * (1 + amount * grain[:, :, None])
    return grained


def add_frame(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Window edges, borders, separators and the toothed rails beside counter wheels, at the rim only."""
    canvas = Image.new("L", (FRAME, FRAME))
    draw = ImageDraw.Draw(canvas)
    inset, thick = float(rng.uniform(0, 4)), float(rng.uniform(1, 5))
    sides = rng.random(4) < rng.choice([0.35, 0.6, 1.0])
    # Either everything outside the window is covered, or a line runs inside the rim.
    near = 0.0 if rng.random() < 0.6 else inset
    far = inset + thick
    last = FRAME - 1
    boxes = (
        (near, 0, far, last),
        (last - far, 0, last - near, last),
        (0, near, last, far),
        (0, last - far, last, last - near),
    )
    for side in np.flatnonzero(sides):
        draw.rectangle(boxes[side], fill=255)
    if rng.random() < 0.25:
        _draw_rail(draw, rng)
    cover = np.asarray(canvas, dtype=np.float32)[:, :, None] / 255.0 * rng.uniform(0.5, 1.0)
    word = str(rng.choice(_FRAME_COLOURS))
    framed: np.ndarray = picture * (1 - cover) + _colour(word, rng) * cover
    return framed


def _draw_rail(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """A row of short teeth or dashes along one rim."""
    depth = float(rng.uniform(3, 7))
    near = 0.0 if rng.random() < 0.5 else FRAME - depth
    upright = rng.random() < 0.5
    pitch, filled = float(rng.uniform(6, 24)), float(rng.uniform(0.4, 0.8))
    start = float(rng.uniform(-pitch, 0))
    while start < FRAME:
        end = start + pitch * filled
        tooth = (near, start, near + depth, end) if upright else (start, near, end, near + depth)
        draw.rectangle(tooth, fill=255)
        start += pitch


def add_uneven_light(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A gradient, a spot or darker corners."""
    angle, amount = rng.uniform(0, 2 * math.pi), rng.uniform(0.15, 0.5)
    light = 1 + amount * (_COLUMNS * math.cos(angle) + _ROWS * math.sin(angle))
    if rng.random() < 0.4:
        x, y = rng.uniform(-1, 1, size=2)
        light = light * (1.1 - amount * ((_COLUMNS - x) ** 2 + (_ROWS - y) ** 2) / 2)
    lit: np.ndarray = picture * np.clip(light, 0.25, 1.6)[:, :, None]
    return lit


def add_reflection(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A bright streak or spot on the glass."""
    angle, offset = rng.uniform(0, math.pi), rng.uniform(-0.9, 0.9)
    along = _COLUMNS * math.cos(angle) + _ROWS * math.sin(angle) - offset
    across = -_COLUMNS * math.sin(angle) + _ROWS * math.cos(angle)
    length = rng.uniform(0.2, 0.6) if rng.random() < 0.5 else 10.0
    glow = np.exp(-((along / rng.uniform(0.08, 0.35)) ** 2) - (across / length) ** 2) * rng.uniform(0.2, 0.65)
    tint = np.array([1.0, 1.0, 1.0]) - rng.uniform(0, 0.15, size=3)
    glazed: np.ndarray = picture * (1 - glow[:, :, None]) + tint * glow[:, :, None]
    return glazed
