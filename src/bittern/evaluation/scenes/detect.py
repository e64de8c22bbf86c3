"""A deterministic detector for the scenes world: colour segmentation, components, shape by template.

A pixel takes the nearest colour of the palette; pixels whose neighbours all agree form the insides of regions
(edges, where colours blend, drop out); each connected inside of an object colour is one object, and its shape is
the one whose mask, stretched to the same bounding box, overlaps best.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from bittern.errors import UserError
from bittern.evaluation.scenes.draw import PALETTE, SceneBatch, draw
from bittern.scene_prompts import COLORS, GROUNDS, SHAPES

MIN_AREA = 0.004  # of the image: half of the smallest star
MIN_OVERLAP = 0.70  # intersection over union with the best template
_TEMPLATE_SIZE = 48
_WORKING_SIZE = 256


@dataclass(frozen=True)
class Detection:
    """One object found: `box` is (x0, y0, x1, y1) in pixels, `overlap` the template's IoU."""

    shape: str
    color: str
    box: tuple[float, float, float, float]
    overlap: float


def detect(image: UInt8[Tensor, "3 h w"]) -> list[Detection]:
    """Find the objects of one 8-bit RGB image, best template match first.

    Raises:
        UserError: scipy, of the extra `metrics`, is not installed.
    """
    ndimage = scipy_ndimage()
    names = (*COLORS, *GROUNDS)
    palette = np.array([PALETTE[name] for name in names], dtype=np.float32)
    # The erosion takes a pixel all round: of a small picture that would be the arms of a small star.
    zoom = max(1, -(-_WORKING_SIZE // min(image.shape[1:])))
    large = F.interpolate(image[None].cpu().float(), scale_factor=zoom, mode="bicubic", align_corners=False)
    pixels = large[0].permute(1, 2, 0).numpy()
    # The nearest colour maximises p·c - |c|²/2; no array of differences is needed.
    label = (pixels @ palette.T - (palette**2).sum(1) / 2).argmax(-1)
    cross = ndimage.generate_binary_structure(2, 1)
    found: list[Detection] = []
    present = np.bincount(label.ravel(), minlength=len(names))
    for color in np.flatnonzero(present[: len(COLORS)] >= MIN_AREA * label.size):
        inside = ndimage.binary_erosion(label == color, cross)
        parts, _ = ndimage.label(inside)
        for part, window in enumerate(ndimage.find_objects(parts), start=1):
            # Give back the rim that the erosion took, so that thin shapes keep their proportions.
            rim = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in window)
            mask = ndimage.binary_dilation(parts[rim] == part, cross)
            if mask.sum() < MIN_AREA * label.size:
                continue
            shape, overlap = _classify(mask)
            if overlap >= MIN_OVERLAP:
                box = (rim[1].start, rim[0].start, rim[1].stop, rim[0].stop)
                found.append(Detection(shape, names[color], tuple(side / zoom for side in box), overlap))
    return sorted(found, key=lambda item: -item.overlap)


def scipy_ndimage() -> Any:
    """`scipy.ndimage`.

    Raises:
        UserError: scipy, of the extra `metrics`, is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError:
        raise UserError("scenes are scored with scipy, which is missing: pip install 'bittern[metrics]'") from None
    return ndimage


def _classify(mask: np.ndarray) -> tuple[str, float]:
    h, w = mask.shape
    stretched = _stretch(mask)
    templates, aspects = _templates()
    both = (templates & stretched).sum((1, 2))
    either = (templates | stretched).sum((1, 2))
    # A shape stretched out of its proportions is not that shape: the overlap is charged for it.
    aspect = np.log(w / h) - np.log(aspects)
    overlap = both / either * np.exp(-np.maximum(np.abs(aspect) - 0.12, 0) * 2)
    best = int(overlap.argmax())
    return SHAPES[best], float(overlap[best])


def _stretch(mask: np.ndarray) -> np.ndarray:
    h, w = mask.shape
    step = (np.arange(_TEMPLATE_SIZE) + 0.5) / _TEMPLATE_SIZE
    return mask[np.ix_((step * h).astype(int), (step * w).astype(int))]


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    ndimage = scipy_ndimage()
    size = 256
    count = len(SHAPES)
    shape = torch.arange(count)[:, None].expand(-1, 4)
    scenes = SceneBatch(
        shape=shape,
        color=torch.zeros_like(shape),
        center=torch.full((count, 4, 2), 0.5),
        radius=torch.full((count, 4), 0.4),
        count=torch.ones(count, dtype=torch.long),
        ground=torch.zeros(count, dtype=torch.long),
    )
    target = torch.tensor(PALETTE[COLORS[0]], dtype=torch.float32)
    masks = (draw(scenes, size).float() - target[:, None, None]).abs().sum(1).lt(60).numpy()
    crops = [mask[ndimage.find_objects(mask.astype(int))[0]] for mask in masks]
    aspects = np.array([crop.shape[1] / crop.shape[0] for crop in crops])
    return np.stack([_stretch(crop) for crop in crops]), aspects
