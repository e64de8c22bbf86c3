"""Nothing that evaluation draws is ever learned from."""

from __future__ import annotations

from collections import Counter

import pytest

from bittern import pipelines, scene_prompts
from bittern.distillation.texts import draw_texts, groups_of, split
from bittern.errors import UserError
from bittern.trajectories import default_prompts


def test_held_out_prompts_are_refused() -> None:
    held_out = scene_prompts.held_out(6)[3].prompt
    with pytest.raises(UserError, match="is held out for evaluation"):
        groups_of(["a cat", f" {held_out.upper()}."])


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-unet"])
def test_the_embedded_models_learn_from_the_whole_training_side_and_nothing_else(model: str) -> None:
    learned, watched = split(groups_of(default_prompts(pipelines.resolve(model))))
    every = [text for group in (*learned, *watched) for text in group]
    assert sorted(every) == sorted(prompt.prompt for prompt in scene_prompts.training_prompts())
    forbidden = {prompt.prompt for prompt in scene_prompts.every_prompt() if prompt.held_out}
    assert not forbidden & set(every)
    assert not {t for group in learned for t in group} & {t for group in watched for t in group}


def test_each_task_is_drawn_equally_often() -> None:
    learned, _ = split(groups_of([scene_prompts.training_prompts()[0].prompt]))
    drawn = draw_texts(learned, 1200, seed=0)
    tag = {prompt.prompt: prompt.tag for prompt in scene_prompts.every_prompt()}
    assert Counter(tag[text] for text in drawn) == dict.fromkeys(scene_prompts.TASKS, 200)
    single = [text for text in drawn if tag[text] == "colors"]
    assert len(set(single)) == 200
    assert drawn == draw_texts(learned, 1200, seed=0) != draw_texts(learned, 1200, seed=1)


def test_other_prompts_are_one_group_and_one_of_them_is_watched() -> None:
    learned, watched = split(groups_of(["a", "b", "b", "c"]))
    assert sorted(learned[0] + watched[0]) == ["a", "b", "c"]
    assert len(watched[0]) == 1
    with pytest.raises(UserError, match="expected at least 2"):
        split(groups_of(["a", "a"]))
