"""The course of a training as files: its records, and a picture of loss and fidelity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LOG, CURVE = "distillation.jsonl", "distillation.svg"

_SECTION = """
## Training

![Relative error of the answers and PSNR of the pictures over steps]({curve})

{steps} steps on states of the original's own trajectories, {minutes:.1f} minutes with validation. On prompts that were
not learned the relative error of the answers fell from {first:.3f} to {last:.3f}, and the PSNR to the original's
pictures, before activations are rounded, went from {before:.1f} to {after:.1f} dB. [{log}]({log}) has every validation.
"""

_WIDTH, _HEIGHT, _MARGIN = 640, 280, 56


def training_report(log: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By file name: a JSON line a validation, and a picture of them."""
    return {LOG: "".join(json.dumps(record) + "\n" for record in log), CURVE: curve(log)}


def card_section(log: Sequence[Mapping[str, Any]]) -> str:
    """What a model card says of a training."""
    # The weights that are kept are those of the least error.
    first, kept, last = log[0], min(log, key=lambda record: record["relative_error"]), log[-1]
    return _SECTION.format(
        curve=CURVE, log=LOG, steps=last["step"], minutes=last["seconds"] / 60, first=first["relative_error"],
        last=kept["relative_error"], before=first["psnr"], after=kept["psnr"],
    )  # fmt: skip


def curve(log: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of relative error (logarithmic, left) and PSNR (right, dB) on watched prompts over steps."""
    steps = [float(record["step"]) for record in log]
    errors = [math.log10(max(float(record["relative_error"]), 1e-6)) for record in log]
    psnrs = [float(record["psnr"]) for record in log]
    x = _axis(steps, _MARGIN, _WIDTH - _MARGIN)
    left, right = (_axis(values, _HEIGHT - _MARGIN, _MARGIN / 2) for values in (errors, psnrs))
    bottom, last = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<path d="M{_MARGIN} {_MARGIN / 2}V{bottom}H{last}V{_MARGIN / 2}" fill="none" stroke="#999"/>',
        _line(steps, errors, x, left, "#c2410c"),
        _line(steps, psnrs, x, right, "#1d4ed8"),
        *_ends(errors, left, _MARGIN - 6, "end", "#c2410c", lambda value: f"{10**value:.3g}"),
        *_ends(psnrs, right, last + 6, "start", "#1d4ed8", lambda value: f"{value:.1f}"),
        *_ends(steps, lambda _: bottom + 18, None, "middle", "#333", lambda value: f"{value:.0f}", x),
        f'<text x="{_MARGIN}" y="{_HEIGHT - 10}" fill="#c2410c">relative error of the answers</text>',
        f'<text x="{last}" y="{_HEIGHT - 10}" fill="#1d4ed8" text-anchor="end">PSNR of the pictures, dB</text>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}" fill="#333" text-anchor="middle">steps</text>',
        "</svg>\n",
    ]
    return "\n".join(parts)


def _axis(values: Sequence[float], start: float, stop: float) -> Callable[[float], float]:
    """Maps the span of values to a span of the picture."""
    low, high = min(values), max(values)
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _line(
    steps: Sequence[float],
    values: Sequence[float],
    x: Callable[[float], float],
    y: Callable[[float], float],
    color: str,
) -> str:
    points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True))
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'


def _ends(
    values: Sequence[float],
    y: Callable[[float], float],
    at: float | None,
    anchor: str,
    color: str,
    told: Callable[[float], str],
    x: Callable[[float], float] | None = None,
) -> list[str]:
    """The least and the greatest value, written at their places."""
    return [
        f'<text x="{x(value) if x else at:.1f}" y="{y(value):.1f}" fill="{color}" text-anchor="{anchor}">'
        f"{told(value)}</text>"
        for value in sorted({min(values), max(values)})
    ]
