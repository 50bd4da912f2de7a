"""The faces: each draws one symbol as a mask, knowing nothing of colours, light or cameras.

A mask is float32 [BASE, BASE] in 0..1 with the symbol centred and about ``HEIGHT`` pixels tall. Unlit
segments and dots appear in it as faint values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from synthkit.recipes.glyphs32.segments import DOTS, DOTS_OTHER, FOURTEEN, SEVEN
from synthkit.recipes.glyphs32.strokes import HANDWRITTEN, STENCILLED, parse_strokes, smooth

BASE = 96
HEIGHT = 76
_WIDEST = 88
_FINE = 2  # pens and segments are drawn this much larger, then averaged down

_UPRIGHT_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
    "DejaVuSerif-Bold", "STIXGeneral", "STIXGeneralBol", "cmb10", "cmr10", "cmss10", "cmtt10",
)  # fmt: skip
_SLANTED_FONTS = (
    "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneralItalic", "STIXGeneralBolIta", "cmti10",
)  # fmt: skip
#: Every font that has all 36 symbols.
FONTS = _UPRIGHT_FONTS + _SLANTED_FONTS
_COUNTER_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "cmss10",
    "STIXGeneralBol",
)


@dataclass(frozen=True)
class Shape:
    """One symbol as a mask, and what a caption may say of it.

    ``box`` is left, top, right and bottom of the cell around the symbol, where that is more than its ink.
    """

    mask: np.ndarray
    words: tuple[str, ...] = ()
    box: tuple[float, float, float, float] | None = None


def _centred(glyph: Image.Image) -> Image.Image:
    """Paste a tightly cropped glyph into the middle of a base-sized canvas."""
    canvas = Image.new("L", (BASE, BASE))
    canvas.paste(glyph, ((BASE - glyph.width) // 2, (BASE - glyph.height) // 2))
    return canvas


def _to_mask(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255.0


@lru_cache(maxsize=2048)
def font_glyph(font: str, symbol: str) -> Image.Image:
    """Draw a symbol from one of matplotlib's fonts, scaled to the common height."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    face = ImageFont.truetype(str(path), 120)
    canvas = Image.new("L", (240, 240))
    ImageDraw.Draw(canvas).text((60, 40), symbol, font=face, fill=255)
    tight = canvas.crop(canvas.getbbox())
    width = min(_WIDEST, max(1, round(tight.width * HEIGHT / tight.height)))
    return _centred(tight.resize((width, HEIGHT), Image.Resampling.LANCZOS))


def _pen(polylines: list[np.ndarray], pens: list[float], blunt: bool = False) -> Image.Image:
    """Draw polylines given in base pixels, with one pen width per polyline."""
    canvas = Image.new("L", (BASE * _FINE, BASE * _FINE))
    draw = ImageDraw.Draw(canvas)
    for line, pen in zip(polylines, pens, strict=True):
        width = max(2, round(pen * _FINE))
        points = [(float(x) * _FINE, float(y) * _FINE) for x, y in line]
        draw.line(points, fill=255, width=width, joint="curve")
        if blunt:
            continue
        for x, y in (points[0], points[-1]):
            r = width / 2 - 0.5
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return canvas.reduce(_FINE)


def _boxed(points: np.ndarray, width: float, height: float) -> np.ndarray:
    """Map unit points to base pixels, in a box of the given size around the centre."""
    boxed: np.ndarray = (points - 0.5) * np.array([width, height]) + BASE / 2
    return boxed


@lru_cache(maxsize=2048)
def _stencil(symbol: str, variant: int, aspect: float, pen: float, blunt: bool) -> Image.Image:
    text = STENCILLED[symbol][variant]
    inner = HEIGHT - pen
    lines = [_boxed(smooth(p, c), inner * aspect, inner) for p, c in parse_strokes(text)]
    return _pen(lines, [pen] * len(lines), blunt)


def _stencilled(symbol: str, rng: np.random.Generator) -> Shape:
    variant = int(rng.integers(len(STENCILLED[symbol])))
    aspect = float(rng.choice([0.4, 0.5, 0.6, 0.7, 0.85]))
    pen = float(rng.choice([5.0, 7.0, 9.0, 11.0, 13.0]))
    words = ("thin",) if pen < 6 else ("bold",) if pen > 10 else ()
    return Shape(_to_mask(_stencil(symbol, variant, aspect, pen, bool(rng.random() < 0.3))), words)


@lru_cache(maxsize=4096)
def _reweighted(font: str, symbol: str, change: int) -> Image.Image:
    """A font's glyph thickened (above zero), thinned (below) or, at zero, hollowed out to an outline."""
    glyph = font_glyph(font, symbol)
    if change < 0:
        return glyph.filter(ImageFilter.MinFilter(1 - 2 * change))
    if change > 0:
        return glyph.filter(ImageFilter.MaxFilter(1 + 2 * change))
    return ImageChops.subtract(glyph.filter(ImageFilter.MaxFilter(7)), glyph)


def _font_shape(font: str, symbol: str, rng: np.random.Generator) -> Shape:
    """A font's glyph, sometimes thickened, thinned or outlined."""
    bold = "Bol" in font or font == "cmb10"
    words = ("bold",) if bold else ()
    roll = rng.random()
    if roll < 0.15:
        return Shape(_to_mask(_reweighted(font, symbol, 1 + (roll < 0.07))), ("bold",))
    if roll < 0.25 and bold:
        return Shape(_to_mask(_reweighted(font, symbol, -1)))
    if roll < 0.29:
        return Shape(_to_mask(_reweighted(font, symbol, 0)), ("outlined",))
    return Shape(_to_mask(font_glyph(font, symbol)), words)


def printed(symbol: str, rng: np.random.Generator) -> Shape:
    """Letterpress: a font of matplotlib's, or for digits sometimes a stencilled line."""
    if symbol in STENCILLED and rng.random() < 0.3:
        return _stencilled(symbol, rng)
    slanted = rng.random() < 0.2
    font = str(rng.choice(_SLANTED_FONTS if slanted else _UPRIGHT_FONTS))
    shape = _font_shape(font, symbol, rng)
    return Shape(shape.mask, shape.words + (("italic",) if slanted else ()))


def counter(symbol: str, rng: np.random.Generator) -> Shape:
    """The plain upright lettering of counter wheels and nameplates."""
    if symbol in STENCILLED and rng.random() < 0.6:
        return _stencilled(symbol, rng)
    font = str(rng.choice(_COUNTER_FONTS))
    bold = "Bol" in font
    return Shape(_to_mask(font_glyph(font, symbol)), ("bold",) if bold else ())


def handwritten(symbol: str, rng: np.random.Generator, thick: bool = False) -> Shape:
    """A pen moved by a hand: the symbol's strokes with their points, size and pen width disturbed.

    Args:
        symbol: what to write.
        rng: source of the choices.
        thick: whether the pen must be broad enough to survive a scan of eight pixels.
    """
    variants = HANDWRITTEN[symbol]
    strokes = parse_strokes(variants[rng.integers(len(variants))])
    pen = rng.uniform(9, 16) if thick else rng.uniform(3.5, 7) if rng.random() < 0.35 else rng.uniform(7, 14)
    width, height = (HEIGHT - pen) * rng.uniform(0.42, 0.98), HEIGHT - pen
    wobble = rng.uniform(0.01, 0.05)
    # One smooth bend for the whole symbol keeps strokes that meet together; the rest is each point's own.
    bend = rng.normal(0, 0.05, size=(2, 2))
    lines, pens = [], []
    for points, corners in strokes:
        moved = points + rng.normal(0, wobble, size=points.shape) + rng.normal(0, wobble / 2, size=2)
        moved = (
            moved
            + np.sin(moved[:, ::-1] * np.pi) * bend[0]
            + np.sin(moved[:, ::-1] * 2 * np.pi) * bend[1] * 0.5
        )
        lines.append(_boxed(smooth(moved, corners), width, height))
        pens.append(pen * rng.uniform(0.85, 1.15))
    words = ("thin",) if pen < 6 else ("bold",) if pen > 10 else ()
    return Shape(_to_mask(_pen(lines, pens)), words)


def _segment_lines(width: float) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """Ends of every segment in a box of the given width and height 2, centred on the origin."""
    w = width / 2
    return {
        "a": ((-w, -1), (w, -1)), "b": ((w, -1), (w, 0)), "c": ((w, 0), (w, 1)), "d": ((-w, 1), (w, 1)),
        "e": ((-w, 0), (-w, 1)), "f": ((-w, -1), (-w, 0)), "g": ((-w, 0), (w, 0)), "1": ((-w, 0), (0, 0)),
        "2": ((0, 0), (w, 0)), "h": ((-w, -1), (0, 0)), "i": ((0, -1), (0, 0)), "j": ((w, -1), (0, 0)),
        "k": ((-w, 1), (0, 0)), "l": ((0, 0), (0, 1)), "m": ((w, 1), (0, 0)),
    }  # fmt: skip


def _segment_polygon(start: np.ndarray, end: np.ndarray, half: float, gap: float, tip: float) -> list[float]:
    """Outline of one segment: a bar whose ends are cut back by the gap and pointed by the tip."""
    along = (end - start) / np.linalg.norm(end - start)
    across = np.array([-along[1], along[0]]) * half
    a, b = start + along * gap, end - along * gap
    inset = along * half * tip
    corners = [a, a + inset + across, b - inset + across, b, b - inset - across, a + inset - across]
    return [float(v) for corner in corners for v in corner]


@lru_cache(maxsize=4096)
def _segments(
    lit: str, every: str, width: float, half: float, gap: float, tip: float, ghost: float
) -> Image.Image:
    canvas = Image.new("L", (BASE * _FINE, BASE * _FINE))
    draw = ImageDraw.Draw(canvas)
    scale = (HEIGHT / 2 - half) * _FINE
    ends = _segment_lines(width)
    # The lit ones are drawn last, over their unlit neighbours.
    for name in [*(n for n in every if n not in lit), *lit]:
        start, end = (np.array(p) * scale + BASE * _FINE / 2 for p in ends[name])
        outline = _segment_polygon(start, end, half * _FINE, gap * _FINE, tip)
        draw.polygon(outline, fill=255 if name in lit else round(255 * ghost))
    return canvas.reduce(_FINE)


def segmented(symbol: str, rng: np.random.Generator) -> Shape:
    """A seven-segment face, or fourteen segments where seven cannot spell the letter."""
    seven = symbol in SEVEN and (symbol.isdigit() or rng.random() < 0.6)
    if seven:
        forms = SEVEN[symbol]
        lit, every = forms[rng.integers(len(forms))], "abcdefg"
    else:
        lit, every = FOURTEEN[symbol], "abcdef12hijklm"
    half = float(rng.choice([2.5, 4.0, 5.0, 6.5] if seven else [2.5, 3.5, 4.5]))
    ghost = float(rng.choice([0.0, 0.06, 0.12, 0.2], p=[0.45, 0.25, 0.2, 0.1]))
    width = float(rng.choice([0.8, 1.0, 1.2, 1.4]))
    gap, tip = float(rng.choice([0.0, 1.0, 2.5])), float(rng.choice([0.0, 0.6, 1.0]))
    mask = _to_mask(_segments(lit, every, width, half, gap, tip, ghost))
    # A one lies at the right of its cell, and crops of displays are cut by cells as often as by ink.
    across, down = width / 2 * (HEIGHT / 2 - half) + half, HEIGHT / 2
    cell = (BASE / 2 - across, BASE / 2 - down, BASE / 2 + across, BASE / 2 + down)
    return Shape(mask, ("thin",) if half < 3 else (), cell if rng.random() < 0.6 else None)


@lru_cache(maxsize=2048)
def _dots(rows: str, pitch: float, fill: float, round_dots: bool, ghost: float) -> Image.Image:
    canvas = Image.new("L", (BASE * _FINE, BASE * _FINE))
    draw = ImageDraw.Draw(canvas)
    step_x, step_y = pitch * _FINE, HEIGHT / 7 * _FINE
    half_x, half_y = step_x * fill / 2, step_y * fill / 2
    centre = BASE * _FINE / 2
    paint = draw.ellipse if round_dots else draw.rectangle
    for row in range(7):
        bits = int(rows[2 * row : 2 * row + 2], 16)
        for column in range(5):
            x, y = centre + (column - 2) * step_x, centre + (row - 3) * step_y
            level = 255 if bits >> (4 - column) & 1 else round(255 * ghost)
            paint((x - half_x, y - half_y, x + half_x, y + half_y), fill=level)
    return canvas.reduce(_FINE)


def dotted(symbol: str, rng: np.random.Generator) -> Shape:
    """A matrix of five by seven dots."""
    forms = (DOTS[symbol], *DOTS_OTHER.get(symbol, ()))
    rows = forms[rng.integers(len(forms))]
    pitch = float(rng.choice([8.0, 10.0, 11.0, 13.0]))
    ghost = float(rng.choice([0.0, 0.08, 0.15, 0.25], p=[0.4, 0.25, 0.2, 0.15]))
    fill = float(rng.choice([0.6, 0.75, 0.9, 1.0]))
    return Shape(_to_mask(_dots(rows, pitch, fill, bool(rng.random() < 0.35), ghost)))


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Blotches: random values on a coarse grid, interpolated to [size, size] in about -1..1."""
    coarse = Image.fromarray(rng.uniform(-1, 1, size=(cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def stamped(symbol: str, rng: np.random.Generator) -> Shape:
    """Ink from a stamp: fonts with uneven, partly missing ink."""
    shape = printed(symbol, rng) if rng.random() < 0.7 else counter(symbol, rng)
    blotches = smooth_noise(rng, BASE, int(rng.integers(4, 9))) * 0.6 + smooth_noise(rng, BASE, 28) * 0.5
    cover = np.clip(0.95 + rng.uniform(0.4, 1.1) * (blotches - rng.uniform(-0.25, 0.15)), 0.15, 1.0)
    return Shape((shape.mask * cover).astype(np.float32), shape.words)


def engraved(symbol: str, rng: np.random.Generator) -> Shape:
    """Letters cut into or raised from a plate: the outline only; the scene lights the edges."""
    return counter(symbol, rng) if rng.random() < 0.6 else printed(symbol, rng)


#: The drawing function of each family, by the name that captions use.
DRAW: dict[str, Callable[[str, np.random.Generator], Shape]] = {
    "printed": printed,
    "handwritten": handwritten,
    "seven segment display": segmented,
    "dot matrix display": dotted,
    "roller counter": counter,
    "engraved": engraved,
    "stamped": stamped,
}
