"""The prompts: what is said, and the split that nothing may blur."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bittern.errors import UserError
from bittern.evaluation import scenes

ALL = scenes.every_prompt()


def content(prompt: scenes.ScenePrompt) -> tuple:
    return prompt.tag, prompt.include


def test_every_sentence_is_said_once():
    assert len({prompt.prompt for prompt in ALL}) == len(ALL) == 59520


def test_the_split_is_what_it_was():
    """Weights were trained on one side of it: a change here would put seen prompts into evaluation."""
    sentences = "\n".join(sorted(prompt.prompt for prompt in ALL if prompt.held_out))
    assert hashlib.sha256(sentences.encode()).hexdigest()[:16] == "f65b91153966013b"


def test_training_and_held_out_share_no_content_even_mirrored():
    def canonical(prompt: scenes.ScenePrompt):
        first = prompt.include[0]
        lines = [(item.shape, item.count, item.color, item.size) for item in prompt.include]
        if first.relation is None:
            return prompt.tag, frozenset(lines) if len(set(lines)) == len(lines) else tuple(lines)
        word = first.relation[0]
        mirrored = {"right of": "left of", "below": "above"}
        return prompt.tag, (mirrored[word], lines[1], lines[0]) if word in mirrored else (word, *lines)

    trained = {canonical(prompt) for prompt in scenes.training_prompts()}
    kept = {canonical(prompt) for prompt in ALL if prompt.held_out}
    assert not trained & kept
    assert len(trained | kept) == len({canonical(prompt) for prompt in ALL})


def test_held_out_prompts_are_balanced_and_held_out():
    prompts = scenes.held_out(600)
    assert all(prompt.held_out for prompt in prompts)
    assert Counter(prompt.tag for prompt in prompts) == dict.fromkeys(scenes.TASKS, 100)
    assert len({prompt.prompt for prompt in prompts}) == 600


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 3))
def test_fewer_prompts_are_the_first_of_more(few, more, seed):
    few, more = sorted((few, more))
    assert scenes.held_out(more, seed)[:few] == scenes.held_out(few, seed)


def test_seeds_differ_and_repeat():
    assert scenes.held_out(60, 1) == scenes.held_out(60, 1)
    assert scenes.held_out(60, 1) != scenes.held_out(60, 2)


@pytest.mark.parametrize("limit", [0, -3])
def test_no_prompts_is_a_mistake(limit):
    with pytest.raises(UserError, match=f"limit is {limit}"):
        scenes.held_out(limit)


def test_learning_from_held_out_prompts_is_refused_however_they_are_written():
    kept = scenes.held_out(6)[3].prompt
    scenes.refuse_held_out([prompt.prompt for prompt in scenes.training_prompts()[:50]])
    with pytest.raises(UserError, match="held out"):
        scenes.refuse_held_out(["something else", f"  {kept.upper()}. "])


def test_sentences_say_their_content():
    by_sentence = {prompt.prompt: prompt for prompt in ALL}
    two = by_sentence["a photo of two green triangles"]
    assert two.include == (scenes.SceneObject("triangle", count=2, color="green"),)
    assert two.metadata()["exclude"] == [{"class": "triangle", "count": 3}]
    left = by_sentence["a drawing of a ring left of a star on a grey background"]
    assert left.ground == "grey"
    assert left.metadata() == {
        "tag": "position",
        "include": [{"class": "ring", "count": 1, "position": ["left of", 1]}, {"class": "star", "count": 1}],
        "prompt": left.prompt,
    }
    assert "an image of an orange cross and a red ring" in by_sentence
    assert "a picture of four crosses" in by_sentence
