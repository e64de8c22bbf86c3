"""The detector on drawings, and GenEval's rules on detections made by hand."""

import pytest
import torch

from bittern.evaluation import scenes
from bittern.evaluation.scenes import Detection, SceneObject, ScenePrompt

ONE, TWO = SceneObject("circle"), SceneObject("star")


def found(shape: str, color: str = "red", x: float = 50, y: float = 50, half: float = 10) -> Detection:
    return Detection(shape, color, (x - half, y - half, x + half, y + half), 0.9)


def asks(tag: str, *include: SceneObject) -> ScenePrompt:
    return ScenePrompt(tag, "", include)


@pytest.mark.parametrize(("size", "count"), [(96, 240), (128, 600), (256, 240)])
def test_drawings_are_read_back_in_every_task(size, count):
    prompts = scenes.held_out(count, seed=5)
    batch = scenes.sample(scenes.SceneTable.of(prompts), torch.arange(count), torch.Generator().manual_seed(size))
    right = scenes.judge(scenes.draw(batch, size), prompts)
    for task in scenes.TASKS:
        mine = [ok for ok, prompt in zip(right, prompts, strict=True) if prompt.tag == task]
        assert sum(mine) / len(mine) >= 0.98, task


def test_drawings_of_other_prompts_are_refused():
    """A detector that says yes to everything would pass the test above."""
    prompts = scenes.held_out(300, seed=6)
    batch = scenes.sample(scenes.SceneTable.of(prompts), torch.arange(300), torch.Generator().manual_seed(0))
    images = scenes.draw(batch)
    assert sum(scenes.judge(images.roll(6, 0), prompts)) / 300 < 0.06


def test_noise_and_blank_images_hold_nothing():
    assert scenes.detect(torch.full((3, 64, 64), 240, dtype=torch.uint8)) == []
    noise = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert scenes.detect(noise) == []


def test_small_noise_changes_nothing():
    prompts = scenes.held_out(60, seed=8)
    generator = torch.Generator().manual_seed(2)
    images = scenes.draw(scenes.sample(scenes.SceneTable.of(prompts), torch.arange(60), generator))
    noisy = (images + 6 * torch.randn(images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    assert sum(scenes.judge(noisy, prompts)) >= 59


def test_counting_refuses_one_too_many_and_one_too_few():
    three = asks("counting", SceneObject("circle", count=3))
    circles = [found("circle", x=20 * i) for i in range(5)]
    assert [scenes.satisfies(three, circles[:n]) for n in range(6)] == [False, False, False, True, False, False]
    assert scenes.satisfies(three, [*circles[:3], found("star")])


def test_counting_with_a_colour_counts_that_colour_and_no_stray_of_the_shape():
    two = asks("counting", SceneObject("circle", count=2, color="blue"))
    blue = [found("circle", "blue", x=20 * i) for i in range(2)]
    assert scenes.satisfies(two, blue)
    assert not scenes.satisfies(two, [blue[0], found("circle", "red")])
    assert not scenes.satisfies(two, [*blue, found("circle", "red")])


def test_other_tasks_allow_more_than_they_ask():
    assert scenes.satisfies(asks("single_object", ONE), [found("circle"), found("circle"), found("star")])
    assert not scenes.satisfies(asks("two_object", ONE, TWO), [found("circle"), found("circle")])


def test_attributes_must_sit_on_their_own_object():
    prompt = asks("color_attr", SceneObject("circle", color="red"), SceneObject("star", color="blue"))
    assert scenes.satisfies(prompt, [found("circle", "red"), found("star", "blue")])
    assert not scenes.satisfies(prompt, [found("circle", "blue"), found("star", "red")])


@pytest.mark.parametrize(
    ("word", "x", "y"), [("left of", 20, 50), ("right of", 80, 50), ("above", 50, 20), ("below", 50, 80)]
)
def test_relations_hold_one_way_only(word, x, y):
    for other in ("left of", "right of", "above", "below"):
        prompt = asks("position", SceneObject("circle", relation=(other, 1)), TWO)
        assert scenes.satisfies(prompt, [found("circle", x=x, y=y), found("star")]) == (other == word)


def test_relations_have_a_margin_and_diagonals_count_for_both():
    def left(x: float, y: float) -> bool:
        prompt = asks("position", SceneObject("circle", relation=("left of", 1)), TWO)
        return scenes.satisfies(prompt, [found("circle", x=x, y=y), found("star")])

    # Boxes are 20 wide: offsets up to 0.1 * (20 + 20) = 4 pixels do not count.
    assert not left(46, 50)
    assert left(45.9, 50)
    # Past the margin a direction counts when its cosine exceeds one half: within 60 degrees of the axis.
    assert left(50 - 4 - 10, 50 - 4 - 17)
    assert not left(50 - 4 - 10, 50 - 4 - 18)
