"""Drawings: exact areas, soft edges, layouts that answer their prompt."""

import math

import pytest
import torch

from bittern.evaluation import scenes
from bittern.evaluation.scenes import GROUNDS, PALETTE, SHAPES, SceneBatch


def one(shape: str, center=(0.5, 0.5), radius=0.3, color=0, ground=0) -> SceneBatch:
    full = torch.zeros(1, 4)
    return SceneBatch(
        shape=torch.full((1, 4), SHAPES.index(shape)),
        color=torch.full((1, 4), color),
        center=torch.tensor(center).expand(1, 4, 2),
        radius=full + radius,
        count=torch.tensor([1]),
        ground=torch.tensor([ground]),
    )


def coverage(image: torch.Tensor, ground: str, color: str) -> torch.Tensor:
    low, high = (torch.tensor(PALETTE[name], dtype=torch.float64)[:, None, None] for name in (ground, color))
    return ((image.double() - low) * (high - low)).sum(0) / ((high - low) ** 2).sum()


@pytest.mark.parametrize("size", [48, 128, 333])
@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi * 0.97**2),
        ("square", (2 * 0.86) ** 2),
        ("triangle", 1.75),
        ("diamond", 1.44),
        ("ring", math.pi * (1 - 0.55**2)),
        ("cross", (2 * 2 * 0.68 - 0.68**2) * 0.95**2),
    ],
)
def test_areas_are_exact_at_every_size(shape, area, size):
    image = scenes.draw(one(shape), size)[0]
    drawn = coverage(image, "white", "red").sum().item() / (0.3 * size) ** 2
    assert drawn == pytest.approx(area, rel=0.02)


def test_edges_are_soft_and_insides_plain():
    image = scenes.draw(one("circle"), 128)[0]
    share = coverage(image, "white", "red")
    inside, outside = (share > 0.99).float().mean(), (share < 0.01).float().mean()
    soft = 1 - inside - outside
    perimeter = 2 * math.pi * 0.3 * 0.97 * 128 / 128**2
    assert 0.5 * perimeter < soft < 2.5 * perimeter


def test_later_objects_cover_earlier_ones_and_absent_ones_are_not_drawn():
    scene = one("square")
    scene.color[0] = torch.tensor([0, 5, 2, 3])
    scene.count[0] = 2
    middle = scenes.draw(scene, 64)[0, :, 32, 32]
    assert tuple(middle.tolist()) == PALETTE["blue"]


def test_a_seed_draws_the_same_scenes_again():
    prompts = scenes.held_out(24)
    table, index = scenes.SceneTable.of(prompts), torch.arange(24)

    def drawn(seed: int) -> torch.Tensor:
        return scenes.draw(scenes.sample(table, index, torch.Generator().manual_seed(seed)), 32)

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_layouts_answer_their_prompts():
    prompts = scenes.held_out(1200, seed=11)
    batch = scenes.sample(scenes.SceneTable.of(prompts), torch.arange(len(prompts)), torch.Generator().manual_seed(1))
    for row, prompt in enumerate(prompts):
        count = int(batch.count[row])
        assert count == sum(item.count for item in prompt.include)
        center, radius = batch.center[row, :count], batch.radius[row, :count]
        assert bool(((center - radius[:, None] > 0) & (center + radius[:, None] < 1)).all())
        for i in range(count):
            for j in range(i):
                gap = (center[i] - center[j]).abs().max() - radius[i] - radius[j]
                assert gap > 0.02, prompt.prompt
        if prompt.ground:
            assert GROUNDS[batch.ground[row]] == prompt.ground
        names = [SHAPES[k] for k in batch.shape[row, :count].tolist()]
        assert names == [item.shape for item in prompt.include for _ in range(item.count)]
