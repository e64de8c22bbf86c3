"""Points over bits per weight as an SVG on paper of its own, readable on light and dark pages alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, HEAD = 780, 380, 48
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 34, 46
LEAST, MOST = 1.4, 9.5  # bits per weight
TICKS = (1.6, 2, 3, 4, 5, 6, 7, 8, 9)
INK, FAINT, GRID, PAPER = "#22262b", "#5b636d", "#e3e3de", "#fbfbf9"
COLORS = {
    "int8": "#5b636d",
    "int4": "#1d4ed8",
    "svdquant-fast": "#0e7490",
    "svdquant": "#15803d",
    "two planes": "#7c3aed",
    "ternary": "#c2410c",
    "ternary-fast": "#a16207",
    "absmean": "#78716c",
    "distilled": "#be123c",
}
HOLLOW = "4-bit activations"
SIZE = 11.5
"""Of labels, in pixels; a letter is about half as wide."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A row of the table, and what it is called beside its point; hollow with 4-bit activations."""

    name: str
    label: str
    family: str
    bits: float
    value: float
    error: float
    filled: bool = True


@dataclass(frozen=True)
class Panel:
    """A model's points, and levels that are worth a line."""

    title: str
    points: Sequence[Point]
    lines: Mapping[str, float]


def picture(title: str, what: str, panels: Sequence[Panel]) -> str:
    """The panels below one another; `what` is said at their upright axes."""
    height = HEAD + HEIGHT * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" '
        f'font-size="{SIZE}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{PAPER}"/>',
        *_legend(sorted({p.family for panel in panels for p in panel.points}, key=list(COLORS).index)),
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, what, HEAD + index * HEIGHT)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(families: Sequence[str]) -> Iterator[str]:
    x, y = float(LEFT), 20
    for said in (*families, HOLLOW):
        wide = 24 + 0.6 * SIZE * len(said)
        if x + wide > WIDTH:
            x, y = float(LEFT), y + 20
        color = COLORS.get(said, FAINT)
        fill = PAPER if said == HOLLOW else color
        yield f'<circle cx="{x:.0f}" cy="{y}" r="3.5" fill="{fill}" stroke="{color}" stroke-width="1.5"/>'
        yield _text(x + 8, y + 4, said, INK)
        x += wide


def _panel(panel: Panel, what: str, top: float) -> Iterator[str]:
    low, high, step = _span([p.value for p in panel.points] + list(panel.lines.values()))
    ceiling, floor = top + TOP, top + HEIGHT - BOTTOM

    def x(bits: float) -> float:
        return LEFT + math.log(bits / LEAST) / math.log(MOST / LEAST) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return floor - (value - low) / (high - low) * (floor - ceiling)

    yield _text(LEFT, top + 20, panel.title, INK, weight=600, size=14)
    for bits in TICKS:
        yield f'<path d="M{x(bits):.1f} {ceiling}V{floor}" stroke="{GRID}"/>'
        yield _text(x(bits), floor + 16, f"{bits:g}", FAINT, "middle")
    yield _text((LEFT + WIDTH - RIGHT) / 2, floor + 34, "bits per weight of the quantized layers", FAINT, "middle")
    for index in range(round((high - low) / step) + 1):
        level = low + index * step
        yield f'<path d="M{LEFT} {y(level):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>'
        yield _text(LEFT - 6, y(level) + 4, f"{level:.3g}", FAINT, "end")
    middle = (ceiling + floor) / 2
    yield (
        f'<text x="16" y="{middle:.0f}" fill="{FAINT}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle:.0f})">{escape(what)}</text>'
    )
    taken: list[Box] = []
    for index, (name, value) in enumerate(panel.lines.items()):
        # Lines that lie close together are told apart above the first and below the others.
        base = y(value) + (14 if index else -4)
        yield f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="{FAINT}" stroke-dasharray="5 4"/>'
        yield _text(WIDTH - RIGHT - 4, base, name, FAINT, "end")
        taken.append((WIDTH - RIGHT - 4 - 0.55 * SIZE * len(name), base - SIZE, WIDTH - RIGHT, base + 2))
    yield from _series(panel.points, x, lambda value: min(max(y(value), ceiling), floor))
    yield from _labels(panel.points, x, y, taken, (LEFT, ceiling, WIDTH - RIGHT, floor))


def _series(points: Sequence[Point], x: Callable[[float], float], y: Callable[[float], float]) -> Iterator[str]:
    for point in points:
        color, at, height = COLORS[point.family], x(point.bits), y(point.value)
        up, down = y(point.value + point.error), y(point.value - point.error)
        fill = color if point.filled else PAPER
        yield f'<path d="M{at:.1f} {up:.1f}V{down:.1f}" stroke="{color}" stroke-opacity=".6"/>'
        said = f"{point.name}: {point.bits:.2f} bits, {point.value:.4g} ± {point.error:.2g}"
        yield (
            f'<circle cx="{at:.1f}" cy="{height:.1f}" r="4" fill="{fill}" stroke="{color}" stroke-width="1.5">'
            f"<title>{escape(said)}</title></circle>"
        )


def _labels(
    points: Sequence[Point],
    x: Callable[[float], float],
    y: Callable[[float], float],
    taken: list[Box],
    frame: Box,
) -> Iterator[str]:
    """Names beside their points, where there is room; those without any are in the table, and in the tooltip."""
    taken = taken + [(x(p.bits) - 5, y(p.value) - 5, x(p.bits) + 5, y(p.value) + 5) for p in points]
    # The plainest names first: they must not lose their places to variants of theirs.
    for point in sorted((p for p in points if p.filled), key=lambda p: (len(p.name), p.name)):
        wide, at, height = 0.53 * SIZE * len(point.label), x(point.bits), y(point.value)
        for left, base in (
            (at + 8, height + 4), (at - 8 - wide, height + 4), (at - wide / 2, height - 8),
            (at - wide / 2, height + 16), (at + 6, height - 6), (at + 6, height + 14), (at - 6 - wide, height - 6),
            (at - 6 - wide, height + 14),
        ):  # fmt: skip
            box = (left, base - SIZE + 1, left + wide, base + 2)
            inside = frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3]
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                yield _text(left, base, point.label, COLORS[point.family])
                break


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _span(values: Sequence[float]) -> tuple[float, float, float]:
    """A round step, and multiples of it around all values."""
    low, high = min(values), max(values)
    wide = max(high - low, 1e-3)
    power = 10.0 ** math.floor(math.log10(wide / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 6 >= wide)
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, (last if last > first else first + 1) * step, step


def _text(
    x: float,
    y: float,
    said: str,
    color: str,
    anchor: str = "start",
    weight: int | None = None,
    size: float | None = None,
) -> str:
    more = "".join(f' {key}="{value}"' for key, value in (("font-weight", weight), ("font-size", size)) if value)
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}"{more}>{escape(said)}</text>'
