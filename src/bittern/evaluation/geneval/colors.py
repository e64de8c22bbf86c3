"""Colours by CLIP, without training, as GenEval asks for them.

An object is cut out by its mask, laid on the grey #999, cropped to its box and held against ten colours; a colour's
vector is the mean of three sentences about an object of that class in that colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bittern.evaluation.clip import Clip
from bittern.evaluation.geneval.metadata import COLORS
from bittern.evaluation.geneval.rules import Detection

if TYPE_CHECKING:
    from PIL import Image

GROUND = (0x99, 0x99, 0x99)
_SENTENCES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColorNamer:
    """Names the colours of objects in a picture."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._directions: dict[str, Tensor] = {}

    def __call__(self, image: Image.Image, name: str, found: Sequence[Detection]) -> list[str]:
        """The colour of each object of a class in an RGB picture."""
        seen = self._clip.see([cut_out(image, one) for one in found])
        return [COLORS[index] for index in (seen @ self.directions(name).T).argmax(1).tolist()]

    def directions(self, name: str) -> Float[Tensor, "colors d"]:
        """One unit vector a colour, for objects of a class."""
        if name not in self._directions:
            texts = [sentence.format(color=color, name=name) for color in COLORS for sentence in _SENTENCES]
            said = self._clip.read(texts).unflatten(0, (len(COLORS), -1))
            self._directions[name] = F.normalize(said.mean(1), dim=-1)
        return self._directions[name]


def cut_out(image: Image.Image, found: Detection) -> Image.Image:
    """An object on a plain ground, cropped to its box; without a mask the box as it is."""
    from PIL import Image as Pil

    if found.mask is not None:
        image = Pil.composite(image, Pil.new("RGB", image.size, GROUND), Pil.fromarray(found.mask))
    return image.crop(tuple(round(edge) for edge in found.box))
