"""Whether a picture's shapes are outlines, and the picture with its outlines filled in, so that it can be judged.

What differs from the ground is an object, a connected part by a part. Its heart is what lies deep inside it, holes
counted in: farther from the outside than 75 % of the deepest point. An object is an outline when at least half of its
heart is ground. A ring, which the world draws the same in both ways, is one by this rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from bittern.evaluation.scenes.detect import MIN_AREA, scipy_ndimage
from bittern.evaluation.scenes.draw import PALETTE
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


def has_edges(prompt: ScenePrompt) -> bool:
    """Whether a prompt's outlines tell from its filled shapes: it asks for no ring."""
    return all(item.shape != "ring" for item in prompt.include)


def outlines(image: UInt8[Tensor, "3 h w"]) -> Outlines:
    """Find the outlines of one 8-bit RGB picture.

    Raises:
        UserError: scipy, of the extra `metrics`, is not installed.
    """
    ndimage = scipy_ndimage()
    pixels = image.cpu().permute(1, 2, 0).numpy().astype(np.float32)
    grounds = np.array([PALETTE[name] for name in GROUNDS], dtype=np.float32)
    usual = np.median(pixels.reshape(-1, 3), axis=0)
    ground = grounds[((grounds - usual) ** 2).sum(-1).argmin()]
    objects = ((pixels - ground) ** 2).sum(-1) > _CONTRAST**2
    parts, _ = ndimage.label(objects)
    filled, hollow = pixels.copy(), []
    for part in range(1, parts.max() + 1):
        line = parts == part
        whole = ndimage.binary_fill_holes(line)
        if whole.sum() < MIN_AREA * whole.size:
            continue
        depth = ndimage.distance_transform_edt(whole)
        heart = depth >= _HEART * depth.max()
        hollow.append(bool((~line & heart).sum() >= _HOLLOW * heart.sum()))
        if hollow[-1]:
            filled[whole & (depth > 1)] = np.median(pixels[line & (depth > 1)], axis=0)
    return Outlines(hollow, torch.from_numpy(filled.round().astype(np.uint8)).permute(2, 0, 1))
