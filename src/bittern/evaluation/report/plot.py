"""Size against quality: where points, ticks and labels of a small chart lie. The template draws it as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 40
_LABEL_HEIGHT = 15
_LETTER_WIDTH = 7
_TICKS = 5


@dataclass(frozen=True)
class Value:
    """A model's place in the chart before it is drawn: what it weighs, how good it is, and the whisker's length."""

    name: str
    color: int
    size: float
    quality: float
    error: float


@dataclass(frozen=True)
class Point:
    """A model in the chart, in its units of length.

    Attributes:
        value: what is shown.
        x: from the left.
        y: from the top.
        low: the whisker's lower end, from the top.
        high: its upper end.
        label_x: where the label begins, or ends where it stands left of the point.
        label_y: the label's base line.
        left: whether the label stands left of the point.
    """

    value: Value
    x: float
    y: float
    low: float
    high: float
    label_x: float
    label_y: float
    left: bool


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: what quality is measured by.
        points: the models.
        x_ticks: place and text.
        y_ticks: place and text.
        unit: of the sizes.
    """

    title: str
    points: list[Point]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    unit: str


def chart(title: str, values: Sequence[Value], *, floor: float | None = None, ceiling: float | None = None) -> Chart:
    """Lay out a chart of size (from zero) against quality.

    Args:
        title: what quality is measured by.
        values: the models; at least one.
        floor: what quality cannot fall below; None leaves the axis to the values.
        ceiling: what it cannot exceed.
    """
    largest = max(value.size for value in values)
    power = min(3, int(math.log10(max(largest, 1)) // 3))
    unit, scale = ("B", "kB", "MB", "GB")[power], 1000.0**power
    x_ticks = ticks(0.0, largest / scale * 1.04)
    low = min(value.quality - value.error for value in values)
    high = max(value.quality + value.error for value in values)
    low, high = (low if floor is None else max(low, floor)), (high if ceiling is None else min(high, ceiling))
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad
    y_ticks = ticks(low if floor is None else max(low, floor), high if ceiling is None else min(high, ceiling))
    bottom, top = y_ticks[0], y_ticks[-1]

    def across(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * size / scale / x_ticks[-1]

    def down(quality: float) -> float:
        share = (min(max(quality, bottom), top) - bottom) / (top - bottom)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    points: list[Point] = []
    taken: list[tuple[float, float, float]] = []
    for value in sorted(values, key=lambda each: -each.quality):
        x, y = across(value.size), down(value.quality)
        left = x > LEFT + 0.6 * (WIDTH - LEFT - RIGHT)
        width = _LETTER_WIDTH * len(value.name) + 10
        start, end = (x - width, x) if left else (x, x + width)
        # Labels that would lie on one another go below one another.
        label_y = y + 4
        while any(abs(label_y - other) < _LABEL_HEIGHT and start < e and s < end for other, s, e in taken):
            label_y += 1
        taken.append((label_y, start, end))
        points.append(
            Point(
                value, x, y, down(value.quality - value.error), down(value.quality + value.error),
                x - 10 if left else x + 10, label_y, left,
            )
        )  # fmt: skip
    return Chart(
        title,
        points,
        [(across(tick * scale), f"{tick:g}") for tick in x_ticks],
        [(down(tick), f"{tick:g}") for tick in y_ticks],
        unit,
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, equally far apart, from `low` or just below it to `high` or just above."""
    raw = max(high - low, 1e-9) / _TICKS
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]
