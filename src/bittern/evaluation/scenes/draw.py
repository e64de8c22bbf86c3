"""Draw scenes: antialiased coloured shapes on plain grounds, in batches, at any size, on any device.

Every shape is a signed distance field, computed once on a fine grid from its outline and sampled at the pixels of
each object. Coverage is the clamped distance in pixels, so edges are antialiased the same at every size. Distances
are in units of the image side; y points down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bittern.scene_prompts import COLORS, GROUNDS, RELATIONS, SHAPES, SIZES, ScenePrompt

MAX_OBJECTS = 4
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 38),
    "orange": (245, 140, 20),
    "yellow": (250, 218, 50),
    "green": (50, 165, 75),
    "cyan": (70, 205, 225),
    "blue": (45, 85, 215),
    "purple": (130, 60, 175),
    "pink": (245, 130, 185),
    "white": (240, 240, 240),
    "grey": (140, 140, 140),
    "black": (25, 25, 25),
}

_FIELD_EXTENT = 1.25  # half width of a field, in radii: beyond it every shape is outside
_FIELD_SIZE = 160
_RADII = {None: (0.13, 0.20), "small": (0.10, 0.13), "large": (0.18, 0.22)}
_RADII_CROWDED = (0.11, 0.145)  # three or four objects
_MARGIN = 0.03
_GAP = 0.04
_CANDIDATES = 64


@dataclass(frozen=True)
class SceneBatch:
    """B scenes of up to MAX_OBJECTS objects; `count` says how many of the rows are drawn."""

    shape: Int[Tensor, "b o"]
    color: Int[Tensor, "b o"]
    center: Float[Tensor, "b o 2"]
    radius: Float[Tensor, "b o"]
    count: Int[Tensor, "b"]
    ground: Int[Tensor, "b"]


@dataclass(frozen=True)
class SceneTable:
    """What each of P prompts asks of its picture, as tensors: -1 leaves a colour or the ground to chance.

    `size` indexes (None, *SIZES), `relation` indexes ("", *RELATIONS).
    """

    shape: Int[Tensor, "p o"]
    color: Int[Tensor, "p o"]
    size: Int[Tensor, "p"]
    count: Int[Tensor, "p"]
    relation: Int[Tensor, "p"]
    ground: Int[Tensor, "p"]
    same_color: Int[Tensor, "p"]

    @classmethod
    def of(cls, prompts: Sequence[ScenePrompt], device: torch.device | str = "cpu") -> SceneTable:
        """Tabulate prompts."""
        rows = [_tabulate(prompt) for prompt in prompts]
        columns = [torch.tensor(column, dtype=torch.long, device=device) for column in zip(*rows, strict=True)]
        return cls(*columns)


def _tabulate(prompt: ScenePrompt) -> tuple[list[int], list[int], int, int, int, int, int]:
    objects = [item for item in prompt.include for _ in range(item.count)]
    spare = [0] * (MAX_OBJECTS - len(objects))
    first = prompt.include[0]
    return (
        [SHAPES.index(item.shape) for item in objects] + spare,
        [COLORS.index(item.color) if item.color else -1 for item in objects] + spare,
        (None, *SIZES).index(first.size),
        len(objects),
        ("", *RELATIONS).index(first.relation[0]) if first.relation else 0,
        GROUNDS.index(prompt.ground) if prompt.ground else -1,
        int(first.count > 1),
    )


def sample(table: SceneTable, index: Int[Tensor, "b"], generator: torch.Generator) -> SceneBatch:
    """Draw B random scenes that answer the prompts `index` of the table.

    Positions come by rejection: of 64 random layouts the first in which no two objects come near each other and
    the relation holds, else a fixed grid. Runs on the table's device, without a synchronisation.
    """
    device, b = index.device, index.shape[0]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    count, relation, same = table.count[index], table.relation[index], table.same_color[index]
    color = table.color[index]
    chance = (uniform(b, MAX_OBJECTS) * len(COLORS)).long()
    chance = torch.where(same[:, None] > 0, chance[:, :1], chance)
    color = torch.where(color < 0, chance, color)
    ground = table.ground[index]
    ground = torch.where(ground < 0, (uniform(b) * len(GROUNDS)).long(), ground)

    ranges = torch.tensor([*(_RADII[size] for size in (None, *SIZES)), _RADII_CROWDED], device=device)
    low, high = ranges[torch.where(count > 2, len(ranges) - 1, table.size[index])].unbind(-1)
    radius = low[:, None] + (high - low)[:, None] * uniform(b, MAX_OBJECTS)

    room = radius + _MARGIN
    layouts = room[:, None, :, None] + (1 - 2 * room)[:, None, :, None] * uniform(b, _CANDIDATES, MAX_OBJECTS, 2)
    grid = torch.tensor([[0.27, 0.27], [0.73, 0.73], [0.73, 0.27], [0.27, 0.73]], device=device)
    sign = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], device=device)[relation]
    lined = torch.where(sign == 0, grid.new_full((), 0.5), 0.5 + 0.23 * sign)
    fallback = grid.expand(b, -1, -1).clone()
    related = (relation > 0)[:, None]
    fallback[:, 0] = torch.where(related, lined, fallback[:, 0])
    fallback[:, 1] = torch.where(related, 1 - lined, fallback[:, 1])
    layouts = torch.cat([layouts, fallback[:, None]], dim=1)

    valid = _apart(layouts, radius, count) & _related(layouts, radius, relation)
    valid[:, -1] = True
    choice = valid.to(torch.int8).argmax(dim=1)
    center = layouts[torch.arange(b, device=device), choice]
    return SceneBatch(table.shape[index], color, center, radius, count, ground)


def _apart(layouts: Tensor, radius: Tensor, count: Tensor) -> Tensor:
    # Boxes, not discs: two objects are apart when their bounding squares are, along either axis.
    distance = (layouts[:, :, :, None] - layouts[:, :, None, :]).abs().amax(-1)
    enough = distance > (radius[:, :, None] + radius[:, None, :])[:, None] + _GAP
    slot = torch.arange(MAX_OBJECTS, device=layouts.device)
    first, second = slot[:, None], slot[None, :]
    concerned = (first < second) & (second < count[:, None, None])
    return (enough | ~concerned[:, None]).flatten(2).all(-1)


def _related(layouts: Tensor, radius: Tensor, relation: Tensor) -> Tensor:
    # The second object lies from the first along the relation's axis: clear of it there, and mostly in that direction.
    ahead = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], device=layouts.device)[relation].to(layouts)
    delta = layouts[:, :, 1] - layouts[:, :, 0]
    along = (delta * ahead[:, None]).sum(-1)
    across = (delta * ahead[:, None].flip(-1)).sum(-1).abs()
    clear = along > (radius[:, 0] + radius[:, 1])[:, None] + _GAP
    return (relation == 0)[:, None] | (clear & (across < 0.6 * along))


def draw(
    scenes: SceneBatch, size: int = 128, *, stroke: float = 0.0, paint: tuple[int, int, int] | None = None
) -> UInt8[Tensor, "b 3 size size"]:
    """Draw scenes as 8-bit RGB images on the scenes' device.

    Args:
        scenes: what to draw.
        size: pixels a side.
        stroke: width of a line along the inside of every edge, of the image side, that is drawn in place of the
            filled shape; 0 fills. A ring, which is its own outline, is the same with either.
        paint: RGB of all objects, in place of their own.
    """
    device = scenes.center.device
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    yy, xx = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.stack([xx, yy], dim=-1)
    colors = torch.tensor([paint or PALETTE[name] for name in COLORS], device=device, dtype=torch.float32)
    grounds = torch.tensor([PALETTE[name] for name in GROUNDS], device=device, dtype=torch.float32)
    image = grounds[scenes.ground][:, :, None, None].expand(-1, -1, size, size)
    atlas = _atlas(str(device))
    for slot in range(MAX_OBJECTS):
        radius = scenes.radius[:, slot, None, None, None]
        local = (pixels - scenes.center[:, slot, None, None]) / (radius * _FIELD_EXTENT)
        field = _sample_field(atlas, scenes.shape[:, slot], local) * radius[..., 0]
        if stroke:
            hollow = torch.maximum(field, -field - stroke)
            field = torch.where((scenes.shape[:, slot] == SHAPES.index("ring"))[:, None, None], field, hollow)
        coverage = (0.5 - field * size).clamp(0, 1)
        coverage = (coverage * (slot < scenes.count)[:, None, None])[:, None]
        image = torch.lerp(image, colors[scenes.color[:, slot]][:, :, None, None], coverage)
    return image.round().to(torch.uint8)


def _sample_field(atlas: Tensor, shape: Tensor, local: Tensor) -> Tensor:
    # All fields stand in one tall texture, so that a batch of mixed shapes is one lookup without a copy of each field.
    edge = 1 - 1 / _FIELD_SIZE
    inside = local.clamp(-edge, edge)
    row = (inside[..., 1] + 1) / 2 + shape[:, None, None]
    where = torch.stack([inside[..., 0], row / (len(SHAPES) / 2) - 1], dim=-1)
    flat = where.reshape(1, -1, where.shape[2], 2)
    return F.grid_sample(atlas, flat, mode="bilinear", align_corners=False).reshape(local.shape[:-1])


@cache
def _atlas(device: str) -> Float[Tensor, "1 1 rows cols"]:
    fields = [_field(outline) for outline in _outlines().values()]
    fields[SHAPES.index("ring")] = np.maximum(fields[SHAPES.index("ring")], -_field(0.55 * _circle()))
    return torch.from_numpy(np.concatenate(fields)).float()[None, None].to(device)


def _field(outline: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon [V, 2], negative inside, on the grid of a field."""
    axis = ((np.arange(_FIELD_SIZE) + 0.5) / _FIELD_SIZE * 2 - 1) * _FIELD_EXTENT
    points = np.stack(np.meshgrid(axis, axis), axis=-1)[:, :, None]
    start, end = outline, np.roll(outline, -1, axis=0)
    edge = end - start
    along = np.clip(((points - start) * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    distance = np.linalg.norm(points - start - along[..., None] * edge, axis=-1).min(-1)
    crosses = (start[:, 1] > points[..., 1]) != (end[:, 1] > points[..., 1])
    rise = np.where(edge[:, 1] == 0, 1, edge[:, 1])
    left = points[..., 0] < start[:, 0] + (points[..., 1] - start[:, 1]) * edge[:, 0] / rise
    inside = (crosses & left).sum(-1) % 2 == 1
    return np.where(inside, -distance, distance)


def _circle() -> np.ndarray:
    angle = np.arange(96) * (2 * math.pi / 96)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _outlines() -> dict[str, np.ndarray]:
    """Outlines in SHAPES' order, in units of the object's radius."""
    spokes = np.arange(10) * (math.pi / 5) - math.pi / 2
    reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    turn = np.arange(96) * (2 * math.pi / 96)
    lobes = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    heart = np.stack([16 * np.sin(turn) ** 3, -lobes - 2.5], axis=-1) / 16
    arm = 0.34
    corners = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
    outlines = {
        "circle": _circle() * 0.97,
        "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.86,
        "triangle": np.array([(0, -0.95), (1, 0.8), (-1, 0.8)]),
        "diamond": np.array([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]),
        "star": np.stack([np.cos(spokes) * reach, np.sin(spokes) * reach], axis=-1) * 1.06,
        "cross": np.array([*corners, *((-x, -y) for x, y in corners)]) * 0.95,
        "heart": heart,
        "ring": _circle(),
    }
    return {name: outlines[name].astype(np.float64) for name in SHAPES}
