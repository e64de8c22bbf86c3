"""Which prompts are learned from, and which fidelity is watched with; what evaluation draws is neither."""

from __future__ import annotations

import random
from collections.abc import Sequence

from bittern.errors import UserError
from bittern.scene_prompts import TASKS, refuse_held_out, training_prompts

_WATCHED = 32
"""One prompt in so many is watched and not learned."""


def groups_of(prompts: Sequence[str]) -> list[list[str]]:
    """The texts to learn from, in groups that count the same.

    Prompts that all belong to the scenes world stand for it: its whole training side takes their place, a group a
    task, since a model of a small world should see all of it.

    Raises:
        UserError: for a prompt that is held out for evaluation.
    """
    refuse_held_out(prompts)
    world = training_prompts()
    if not {prompt.prompt for prompt in world}.issuperset(prompts):
        return [list(dict.fromkeys(prompts))]
    return [[prompt.prompt for prompt in world if prompt.tag == task] for task in TASKS]


def split(groups: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """The groups' texts to learn from and those to watch fidelity with, the same for any seed: a training that goes on
    from another must not have learned what it is watched with.

    Raises:
        UserError: for fewer than two texts.
    """
    rng = random.Random("watched")
    learned: list[list[str]] = []
    watched: list[list[str]] = []
    for group in groups:
        order = rng.sample(list(group), len(group))
        count = max(1, len(order) // _WATCHED)
        watched.append(order[:count])
        learned.append(order[count:])
    if not all(learned):
        raise UserError("1 prompt to distill with: expected at least 2, since one is kept to watch fidelity with")
    return learned, watched


def draw_texts(groups: Sequence[Sequence[str]], count: int, seed: int) -> list[str]:
    """So many texts, the groups in turn; in a group none comes twice before all have come once."""
    rng = random.Random(f"texts:{seed}")
    queues: list[list[str]] = [[] for _ in groups]
    texts: list[str] = []
    for index in range(count):
        turn = index % len(groups)
        if not queues[turn]:
            queues[turn] = rng.sample(list(groups[turn]), len(groups[turn]))
        texts.append(queues[turn].pop())
    return texts
