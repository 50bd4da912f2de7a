"""Line charts as SVG for the report page: no script, no file, colours from the page's own style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 40
_COLOURS = 6  # of the style sheet: classes c0 to c5


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend.
        x: positions.
        y: values.
        error: half the length of each error bar; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = field(default=())


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, log_x: bool = False) -> str:
    """An SVG element with axes, lines, error bars and a legend.

    Args:
        lines: at least one point in all.
        x_label: name and unit of the positions.
        y_label: name and unit of the values.
        log_x: whether positions are spaced by their logarithm; they must then be positive.
    """
    xs = [math.log2(x) if log_x else x for line in lines for x in line.x]
    ys = [y + sign * error for line in lines for y, error in _bars(line) for sign in (-1, 1)]
    across, up = _scale(xs, _LEFT, _WIDTH - _RIGHT), _scale(ys, _HEIGHT - _BOTTOM, _TOP)
    title = f"{escape(y_label)} over {escape(x_label)}"
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">']
    for value in _ticks(min(ys), max(ys)):
        height = up(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {height:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{height + 4:.1f}">{value:g}</text>')
    marks = sorted({x for line in lines for x in line.x}) if log_x else _ticks(min(xs), max(xs))
    for value in marks:
        place = across(math.log2(value) if log_x else value)
        parts.append(f'<text class="x" x="{place:.1f}" y="{_HEIGHT - _BOTTOM + 16}">{value:g}</text>')
    parts.append(f'<text class="x" x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 6}">{escape(x_label)}</text>')
    for number, line in enumerate(lines):
        points = [
            (across(math.log2(x) if log_x else x), up(y), up(y - error), up(y + error))
            for x, (y, error) in zip(line.x, _bars(line), strict=True)
        ]
        parts += _drawn(points, f"c{number % _COLOURS}", bool(line.error))
    return "".join([*parts, "</svg>", _legend(lines, y_label)])


def _bars(line: Line) -> list[tuple[float, float]]:
    return list(zip(line.y, line.error or [0.0] * len(line.y), strict=True))


def _scale(values: Sequence[float], start: float, end: float) -> _Scale:
    low, high = min(values), max(values)
    return _Scale(low, high - low or 1.0, start, end)


@dataclass(frozen=True)
class _Scale:
    """Value -> pixel."""

    low: float
    length: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / self.length * (self.end - self.start)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, about five."""
    step = 10 ** math.floor(math.log10((high - low or abs(high) or 1) / 4))
    while (high - low) / step > 6:
        step *= 2 if str(f"{step:e}")[0] in "15" else 2.5
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _drawn(points: Sequence[tuple[float, float, float, float]], style: str, barred: bool) -> list[str]:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in points)
    parts = [f'<path class="line {style}" d="M{path}"/>'] if points else []
    if barred:
        parts += [
            f'<path class="line {style}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>' for x, _, low, high in points
        ]
    if len(points) < 40:
        parts += [f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y, _, _ in points]
    return parts


def _legend(lines: Sequence[Line], y_label: str) -> str:
    names = "".join(
        f'<span><i class="c{number % _COLOURS}"></i>{escape(line.name)}</span>'
        for number, line in enumerate(lines)
    )
    return f'<p class="legend">{escape(y_label)}: {names}</p>'


def smoothed(values: Sequence[float], window: int) -> tuple[list[float], list[float]]:
    """Positions and means of consecutive windows, for a curve that is noise from step to step.

    Args:
        values: one per step, from step 1.
        window: steps of a mean.
    """
    chunks = [(start, values[start : start + window]) for start in range(0, len(values), window)]
    return (
        [start + (len(chunk) + 1) / 2 for start, chunk in chunks],
        [sum(chunk) / len(chunk) for _, chunk in chunks],
    )
