"""A picture of many pictures: labelled rows of small images, for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image | np.ndarray]]], path: Path, cell: int = 48
) -> None:
    """Write a PNG of labelled rows of small images.

    Args:
        rows: label and images (Pillow's or uint8 [height, width, 3]) of each row.
        path: the PNG file.
        cell: side of one picture in pixels.
    """
    font = ImageFont.load_default(size=max(10, cell // 3))
    margin = 8 + max(int(font.getlength(label)) for label, _ in rows)
    step = cell + 2
    width = margin + step * max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (width, step * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(rows):
        draw.text((4, row * step + step // 2), label, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(_cell(picture, cell), (margin + column * step, row * step))
    sheet.save(path, format="PNG")


def _cell(picture: Image.Image | np.ndarray, side: int) -> Image.Image:
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    filter = Image.Resampling.NEAREST if max(image.size) <= side else Image.Resampling.BOX
    return image.convert("RGB").resize((side, side), filter)
