"""Effects: outlines and a new colour, drawn where they should be, seen where they are, and judged without them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bittern.evaluation import scenes
from bittern.evaluation.scenes import SHAPES, SceneBatch

STROKE = scenes.EFFECTS["outline"].stroke
PROMPTS = [prompt for prompt in scenes.held_out(200) if scenes.EFFECTS["outline"].concerns(prompt)][:96]


def drawings(
    prompts: list[scenes.ScenePrompt], stroke: float = 0.0, paint: tuple[int, int, int] | None = None
) -> Tensor:
    table, index = scenes.SceneTable.of(prompts), torch.arange(len(prompts))
    return scenes.draw(scenes.sample(table, index, torch.Generator().manual_seed(5)), 128, stroke=stroke, paint=paint)


def one(shape: str) -> SceneBatch:
    return SceneBatch(
        shape=torch.full((1, 4), SHAPES.index(shape)),
        color=torch.zeros(1, 4, dtype=torch.long),
        center=torch.full((1, 4, 2), 0.5),
        radius=torch.full((1, 4), 0.3),
        count=torch.tensor([1]),
        ground=torch.tensor([0]),
    )


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi * (0.97**2 - 0.87**2)),
        ("square", (2 * 0.86) ** 2 - (2 * 0.76) ** 2),
        ("ring", math.pi * (1 - 0.55**2)),
    ],
)
def test_a_line_has_its_width_and_a_ring_stays_a_ring(shape: str, area: float, size: int) -> None:
    # The line is a tenth of the radius wide, and lies inside the edge.
    image = scenes.draw(one(shape), size, stroke=0.03)[0].double()
    red, white = (torch.tensor(scenes.PALETTE[name]).double()[:, None, None] for name in ("red", "white"))
    drawn = ((image - white) * (red - white)).sum() / ((red - white) ** 2).sum()
    assert drawn / (0.3 * size) ** 2 == pytest.approx(area, rel=0.04)


def test_drawn_outlines_are_seen_and_filled_shapes_are_none() -> None:
    assert not any(any(scenes.outlines(image).hollow) for image in drawings(PROMPTS, 0.0))
    seen = [scenes.outlines(image) for image in drawings(PROMPTS, STROKE)]
    assert sum(found.success for found in seen) >= 0.99 * len(PROMPTS)
    assert [len(found.hollow) for found in seen] == [sum(item.count for item in prompt.include) for prompt in PROMPTS]


def test_filled_in_they_show_what_the_prompt_asks() -> None:
    prompts = PROMPTS[:36]
    lines = drawings(prompts, STROKE)
    filled = torch.stack([scenes.outlines(image).filled for image in lines])
    assert all(scenes.judge(filled, prompts))
    # The judge itself reads no outlines: filling in is what lets it.
    assert sum(scenes.judge(lines, prompts)) < 0.2 * len(prompts)


def test_one_filled_shape_among_outlines_and_an_empty_picture_fail() -> None:
    pair = next(index for index, prompt in enumerate(PROMPTS) if len(prompt.include) == 2)
    line, whole = (drawings(PROMPTS[pair : pair + 1], stroke)[0] for stroke in (STROKE, 0.0))
    left = scenes.detect(whole)[0].box
    mixed = line.clone()
    x0, y0, x1, y1 = (int(side) for side in left)
    mixed[:, y0 : y1 + 1, x0 : x1 + 1] = whole[:, y0 : y1 + 1, x0 : x1 + 1]
    assert sorted(scenes.outlines(mixed).hollow) == [False, True]
    assert not scenes.outlines(mixed).success
    assert scenes.outlines(line).success
    empty = scenes.outlines(torch.full((3, 128, 128), 240, dtype=torch.uint8))
    assert empty.hollow == [] and not empty.success


def test_filling_in_leaves_filled_pictures_as_they_are() -> None:
    for image in drawings(PROMPTS[:12], 0.0):
        assert torch.equal(scenes.outlines(image).filled, image)


def test_a_colour_is_seen_and_no_other_is() -> None:
    green = scenes.EFFECTS["green"]
    prompts = [prompt for prompt in scenes.held_out(60) if green.concerns(prompt)]
    assert any(item.shape == "ring" for prompt in prompts for item in prompt.include)
    looks = [
        green.look(image, prompt) for image, prompt in zip(drawings(prompts, paint=green.paint), prompts, strict=True)
    ]
    assert all(success and shown for success, shown in looks)
    assert not green.is_in(torch.full((3, 128, 128), 240, dtype=torch.uint8))
    usual = drawings(prompts)
    looks = [green.look(image, prompt) for image, prompt in zip(usual, prompts, strict=True)]
    by_chance = [all(found.color == "green" for found in scenes.detect(image)) for image in usual]
    assert [success for success, _ in looks] == by_chance and sum(by_chance) < 0.3 * len(prompts)
    assert all(shown for _, shown in looks)
    asked = [prompt for prompt in scenes.every_prompt() if all(item.color == "green" for item in prompt.include)]
    assert asked and not any(green.concerns(prompt) for prompt in asked)
    one_of_two = drawings(prompts[1:2])[0]
    left = scenes.detect(one_of_two)[0]
    apart = (one_of_two.float() - torch.tensor(scenes.PALETTE[left.color])[:, None, None]).square().sum(0) < 30**2
    one_of_two[:, apart] = torch.tensor(green.paint, dtype=torch.uint8)[:, None]
    assert sorted(scenes.painted(one_of_two, green.paint)) == [False, True]
