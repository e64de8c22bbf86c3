"""Pictures for a page that has to stay small: the first way of storing them that fits a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from bittern.evaluation.drawing import Drawing
from bittern.evaluation.generate import png_info, to_pil

BUDGET = 5_300_000
"""Bytes of all pictures together; base64 adds a third, and the page is to weigh less than 8 MB."""
MOST_CARDS = 96
_SAMPLE = 2
_SLACK = 1.5


@dataclass(frozen=True)
class Level:
    """A way of storing pictures: PNG with their metadata where no quality is given, else WebP, and its largest side."""

    quality: int | None = None
    side: int | None = None


LEVELS = (
    Level(),
    Level(92),
    Level(85, 1024),
    Level(82, 768),
    Level(80, 512),
    Level(75, 384),
    Level(70, 256),
    Level(60, 192),
    Level(45, 128),
)


@dataclass(frozen=True)
class Shown:
    """Pictures as the page has them.

    Attributes:
        uris: by prompt and model, ready for CSS.
        level: how they are stored.
    """

    uris: list[list[str]]
    level: Level

    @property
    def note(self) -> str:
        """What the reader must know of how they are stored."""
        if self.level.quality is None:
            return "Every picture is in this page as it was drawn, to the bit."
        small = f", at most {self.level.side} pixels wide and high" if self.level.side else ""
        return (
            f"To keep this page small its pictures are WebP of quality {self.level.quality}{small}, which shows in the "
            "differences; the numbers were measured on the pictures themselves."
        )


def show(drawings: Sequence[Drawing], count: int, *, budget: int = BUDGET) -> Shown:
    """The first `count` prompts' pictures of several models, stored as well as the budget allows.

    Where even the last level exceeds the budget, it is taken all the same.
    """
    for level in LEVELS:
        # The first prompts tell whether a level is worth trying: storing hundreds of large pictures takes minutes.
        tried = min(_SAMPLE, count)
        sample = sum(len(_encode(drawing, index, level)) for index in range(tried) for drawing in drawings)
        if sample * count / tried > _SLACK * budget and level is not LEVELS[-1]:
            continue
        uris: list[list[str]] = []
        left = budget
        for index in range(count):
            files = [_encode(drawing, index, level) for drawing in drawings]
            left -= sum(map(len, files))
            if left < 0 and level is not LEVELS[-1]:
                break
            uris.append([_data_uri(file, level) for file in files])
        else:
            return Shown(uris, level)
    raise AssertionError


def _encode(drawing: Drawing, index: int, level: Level) -> bytes:
    picture = to_pil(drawing.images[index])
    buffer = io.BytesIO()
    if level.quality is None:
        picture.save(buffer, format="PNG", pnginfo=png_info(drawing.metadata(index)))
        return buffer.getvalue()
    if level.side is not None and level.side < max(picture.size):
        picture.thumbnail((level.side, level.side))
    picture.save(buffer, format="WEBP", quality=level.quality)
    return buffer.getvalue()


def _data_uri(file: bytes, level: Level) -> str:
    kind = "png" if level.quality is None else "webp"
    return f"url(data:image/{kind};base64,{base64.b64encode(file).decode()})"
