"""What LoRAs do to drawings, and whether a picture shows it.

What differs from the ground is an object, a connected part by a part. Its heart is what lies deep inside it, holes
counted in: farther from the outside than 75 % of the deepest point. An object is an outline when at least half of its
heart is ground. A ring, which the world draws the same in both ways, is one by this rule. An object has a colour when
what is usual in it is nearer to that colour than to all others of the world's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from bittern.evaluation.scenes.detect import MIN_AREA, scipy_ndimage
from bittern.evaluation.scenes.draw import PALETTE
from bittern.evaluation.scenes.judge import judge
from bittern.scene_prompts import GROUNDS, ScenePrompt

_CONTRAST = 55  # half of what the two nearest of an object's colour and a ground are apart
_HEART = 0.75
_HOLLOW = 0.5


@dataclass(frozen=True)
class Outlines:
    """What was found in a picture.

    Attributes:
        hollow: of every object, whether it is an outline.
        filled: the picture with all outlines filled in with the colour of their line.
    """

    hollow: list[bool]
    filled: UInt8[Tensor, "3 h w"]

    @property
    def success(self) -> bool:
        """Whether there are objects, and all of them are outlines."""
        return bool(self.hollow) and all(self.hollow)


@dataclass(frozen=True)
class Effect:
    """Another way to draw, as a LoRA may learn it.

    Attributes:
        stroke: of `draw`.
        paint: of `draw`.
    """

    stroke: float = 0.0
    paint: tuple[int, int, int] | None = None

    def concerns(self, prompt: ScenePrompt) -> bool:
        """Whether the effect tells from the world's own way: a ring is its own outline, what is green is painted."""
        if self.paint and all(item.color and PALETTE[item.color] == self.paint for item in prompt.include):
            return False
        return not self.stroke or all(item.shape != "ring" for item in prompt.include)

    def look(self, image: UInt8[Tensor, "3 h w"], prompt: ScenePrompt) -> tuple[bool, bool]:
        """Whether a picture has the effect, on every object; and whether it shows what its prompt asks otherwise.

        Outlines are filled in for the second; where all is painted alike, colours are not asked for.

        Raises:
            UserError: scipy, of the extra `metrics`, is not installed.
        """
        if self.stroke:
            found = outlines(image)
            return found.success, judge(found.filled[None], [prompt])[0]
        plain = replace(prompt, include=tuple(replace(item, color=None) for item in prompt.include))
        return self.is_in(image), judge(image[None], [plain])[0]

    def is_in(self, image: UInt8[Tensor, "3 h w"]) -> bool:
        """Whether there are objects in a picture, and all of them have the effect.

        Raises:
            UserError: scipy, of the extra `metrics`, is not installed.
        """
        if self.stroke:
            return outlines(image).success
        hits = painted(image, self.paint) if self.paint else []
        return bool(hits) and all(hits)


EFFECTS = {
    # 4 pixels of tiny-flux's 128: the thinnest line of which its VAE's decoder keeps shape and colour.
    "outline": Effect(stroke=1 / 32),
    # One of the world's own colours: tiny-flux's VAE holds others badly, above all on grey ground, which is as bright.
    "green": Effect(paint=PALETTE["green"]),
}
"""What the embedded LoRAs learned, by their names."""


def outlines(image: UInt8[Tensor, "3 h w"]) -> Outlines:
    """Find the outlines of one 8-bit RGB picture.

    Raises:
        UserError: scipy, of the extra `metrics`, is not installed.
    """
    pixels = _pixels(image)
    filled, hollow = pixels.copy(), []
    for line, whole, depth in _objects(pixels):
        heart = depth >= _HEART * depth.max()
        hollow.append(bool((~line & heart).sum() >= _HOLLOW * heart.sum()))
        if hollow[-1]:
            filled[whole & (depth > 1)] = np.median(pixels[line & (depth > 1)], axis=0)
    return Outlines(hollow, torch.from_numpy(filled.round().astype(np.uint8)).permute(2, 0, 1))


def painted(image: UInt8[Tensor, "3 h w"], color: tuple[int, int, int]) -> list[bool]:
    """Whether each object of one 8-bit RGB picture has a colour, and no other of the world's.

    Raises:
        UserError: scipy, of the extra `metrics`, is not installed.
    """
    pixels = _pixels(image)
    known = np.array([color, *PALETTE.values()], dtype=np.float32)
    usual = [np.median(pixels[line & (depth > 1)], axis=0) for line, _, depth in _objects(pixels)]
    return [bool(((known - one) ** 2).sum(-1).argmin() == 0) for one in usual]


def _pixels(image: Tensor) -> np.ndarray:
    return image.cpu().permute(1, 2, 0).numpy().astype(np.float32)


def _objects(pixels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each object its own pixels, these with the holes, and how far from the outside each pixel lies."""
    ndimage = scipy_ndimage()
    grounds = np.array([PALETTE[name] for name in GROUNDS], dtype=np.float32)
    usual = np.median(pixels.reshape(-1, 3), axis=0)
    ground = grounds[((grounds - usual) ** 2).sum(-1).argmin()]
    parts, count = ndimage.label(((pixels - ground) ** 2).sum(-1) > _CONTRAST**2)
    for part in range(1, count + 1):
        line = parts == part
        whole = ndimage.binary_fill_holes(line)
        if whole.sum() >= MIN_AREA * whole.size:
            yield line, whole, ndimage.distance_transform_edt(whole)
