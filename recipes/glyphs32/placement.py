"""Where a symbol lies in the frame: size, position, slant, turn, perspective and elastic warps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates

from synthkit.recipes.glyphs32.shapes import Shape, smooth_noise

FRAME = 64


@dataclass(frozen=True)
class Placement:
    """How base pixels map to frame pixels; sizes in pixels, angles in radians."""

    scale_x: float
    scale_y: float
    shear: float
    turn: float
    centre_x: float
    centre_y: float
    tilt: tuple[float, float]
    height: float
    width: float
    origin: tuple[float, float]


def _extent(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the visible ink."""
    columns = np.flatnonzero(mask.max(axis=0) > 0.3)
    rows = np.flatnonzero(mask.max(axis=1) > 0.3)
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def draw_placement(shape: Shape, rng: np.random.Generator, *, loose: bool, upright: bool) -> Placement:
    """Choose a placement that keeps the symbol in the frame but for a small crop.

    Args:
        shape: the symbol.
        rng: source of the choices.
        loose: whether a hand placed it, with more slant and turn.
        upright: whether slant and turn should be nearly absent.
    """
    left, top, right, bottom = shape.box or _extent(shape.mask)
    height = FRAME * (rng.uniform(0.7, 0.98) if rng.random() < 0.75 else rng.uniform(0.45, 0.75))
    scale_y = height / (bottom - top)
    # Crops of single digits are taller than wide, and become square by stretching them.
    stretch = float(np.exp(rng.normal(0.15, 0.28)))
    shear = rng.normal(0, 0.22 if loose else 0.06 if upright else 0.1)
    if rng.random() < 0.15 and not upright:
        shear = rng.uniform(0.1, 0.3)
    shear = float(np.clip(shear, -0.4, 0.4))
    lean = abs(shear) * height * 0.7
    width = min((right - left) * scale_y * stretch, FRAME - lean)
    scale_x = width / (right - left)
    turn = rng.normal(0, 0.1 if loose else 0.02 if upright else 0.05)
    free_x, free_y = (FRAME - width - lean) / 2, (FRAME - height) / 2
    pull = rng.uniform(0.2, 0.95)
    return Placement(
        scale_x,
        scale_y,
        shear,
        turn,
        FRAME / 2 + rng.uniform(-1, 1) * max(free_x * pull, 2.0),
        FRAME / 2 + rng.uniform(-1, 1) * max(free_y * pull, 2.0),
        (rng.normal(0, 0.0015), rng.normal(0, 0.0015)),
        height,
        width,
        ((left + right) / 2, (top + bottom) / 2),
    )


def fill_frame(placement: Placement, mask: np.ndarray, rng: np.random.Generator) -> Placement:
    """Stretch a placement to the frame's full height, as scanners of forms crop single characters."""
    left, top, right, bottom = _extent(mask)
    height = FRAME * rng.uniform(0.94, 1.04)
    # A bare stroke stays a stroke; everything else takes half to most of the width.
    width = FRAME * rng.uniform(0.45, 0.85) * min(1.0, 2.2 * (right - left) / (bottom - top))
    return replace(
        placement,
        scale_x=width / (right - left),
        scale_y=height / (bottom - top),
        shear=placement.shear * 0.4,
        centre_x=FRAME / 2 + rng.normal(0, 2.5),
        centre_y=FRAME / 2 + rng.normal(0, 1.0),
        height=height,
        width=width,
    )


def place(mask: np.ndarray, placement: Placement, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Warp a base mask into the frame.

    Args:
        mask: float mask, [BASE, BASE].
        placement: where it goes.
        shift: a further move in frame pixels, before slant and turn; neighbours use it.

    Returns:
        The mask in the frame, float32 [FRAME, FRAME].
    """
    p = placement
    cos, sin = np.cos(p.turn), np.sin(p.turn)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, -p.shear], [0, 1]])
    inverse = np.diag([1 / p.scale_x, 1 / p.scale_y]) @ np.linalg.inv(linear)
    core = np.array([[*inverse[0], 0.0], [*inverse[1], 0.0], [*p.tilt, 1.0]])
    from_centre = np.array([[1, 0, -p.centre_x], [0, 1, -p.centre_y], [0, 0, 1.0]])
    x = p.origin[0] - shift[0] / p.scale_x
    y = p.origin[1] - shift[1] / p.scale_y
    matrix = np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]]) @ core @ from_centre
    matrix = matrix / matrix[2, 2]
    image = Image.fromarray((mask * 255).astype(np.uint8))
    warped = image.transform(
        (FRAME, FRAME), Image.Transform.PERSPECTIVE, tuple(matrix.ravel()[:8]), Image.Resampling.BILINEAR
    )
    return np.asarray(warped, dtype=np.float32) / 255.0


def elastic(mask: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Bend a frame mask smoothly by up to ``strength`` pixels."""
    rows, columns = np.mgrid[0:FRAME, 0:FRAME].astype(np.float32)
    moved = [rows + strength * smooth_noise(rng, FRAME, 4), columns + strength * smooth_noise(rng, FRAME, 4)]
    return np.asarray(map_coordinates(mask, moved, order=1, mode="nearest"), dtype=np.float32)
