"""The prompts of the scenes world: every sentence it knows, split once and for all into training and held out.

The world is small enough to be written down whole: eight shapes, eight colours, three grounds, and GenEval's six
task forms [Ghosh et al. 2023, arXiv:2310.11513]. A prompt is a *content* (which objects, how many, which colours,
which relation) in one of sixteen wordings. The split is drawn over contents, so that a held-out prompt is never a
mere rewording of a training prompt, and it is a pure function of the content: no list of files to keep in step.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from bittern.errors import UserError

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
GROUNDS = ("white", "grey", "black")
SIZES = ("small", "large")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")

_NUMBERS = {2: "two", 3: "three", 4: "four"}
_OPENINGS = ("a photo of", "a picture of", "a drawing of", "an image of")
_HELD_OUT_SHARE = 0.25
_SPLIT_KEY = "scenes-split-1"


@dataclass(frozen=True)
class SceneObject:
    """One line of a prompt's content: `count` objects of a shape.

    `color` and `size` are None where the prompt leaves them open; `relation` is (word, index of the other line),
    as in GenEval's metadata.
    """

    shape: str
    count: int = 1
    color: str | None = None
    size: str | None = None
    relation: tuple[str, int] | None = None

    def metadata(self) -> dict[str, Any]:
        """The line as GenEval writes it, with the size beside it where one is asked for."""
        line: dict[str, Any] = {"class": self.shape, "count": self.count}
        if self.color is not None:
            line["color"] = self.color
        if self.size is not None:
            line["size"] = self.size
        if self.relation is not None:
            line["position"] = [self.relation[0], self.relation[1]]
        return line


@dataclass(frozen=True)
class ScenePrompt:
    """A sentence, the task it belongs to, and what a picture of it must show."""

    tag: str
    prompt: str
    include: tuple[SceneObject, ...]
    ground: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether the prompt's content is kept for evaluation. The ground and the opening are only wording."""
        return _is_held_out(self.tag, self.include)

    def metadata(self) -> dict[str, Any]:
        """GenEval's metadata line: tag, include, exclude (counting only) and prompt."""
        line: dict[str, Any] = {"tag": self.tag, "include": [item.metadata() for item in self.include]}
        if self.tag == "counting":
            line["exclude"] = [{"class": item.shape, "count": item.count + 1} for item in self.include]
        return line | {"prompt": self.prompt}


_MIRRORED = {"right of": "left of", "below": "above"}


def _canonical(include: tuple[SceneObject, ...]) -> tuple[str, ...]:
    # "a circle and a star" and "a star and a circle" are one content, as are "a circle left of a star" and
    # "a star right of a circle": both sides of such a pair must fall on the same side of the split.
    words = ["", *(f"{item.count} {item.size} {item.color} {item.shape}" for item in include)]
    relation = include[0].relation
    if relation is None:
        return tuple(sorted(words))
    if relation[0] in _MIRRORED:
        return (_MIRRORED[relation[0]], words[2], words[1])
    return (relation[0], words[1], words[2])


@cache
def _is_held_out(tag: str, include: tuple[SceneObject, ...]) -> bool:
    digest = hashlib.sha256("|".join((_SPLIT_KEY, tag, *_canonical(include))).encode()).digest()
    return int.from_bytes(digest[:8], "little") < _HELD_OUT_SHARE * 2**64


def _contents() -> Iterator[tuple[str, tuple[SceneObject, ...]]]:
    pairs = list(itertools.permutations(SHAPES, 2))
    for shape, size in itertools.product(SHAPES, (None, *SIZES)):
        yield "single_object", (SceneObject(shape, size=size),)
    for first, second in pairs:
        yield "two_object", (SceneObject(first), SceneObject(second))
    for shape, count, color in itertools.product(SHAPES, _NUMBERS, (None, *COLORS)):
        yield "counting", (SceneObject(shape, count=count, color=color),)
    for shape, color in itertools.product(SHAPES, COLORS):
        yield "colors", (SceneObject(shape, color=color),)
    for (first, second), word in itertools.product(pairs, RELATIONS):
        yield "position", (SceneObject(first, relation=(word, 1)), SceneObject(second))
    for (first, second), (one, two) in itertools.product(pairs, itertools.permutations(COLORS, 2)):
        yield "color_attr", (SceneObject(first, color=one), SceneObject(second, color=two))


def _phrase(item: SceneObject) -> str:
    words = [word for word in (item.size, item.color, item.shape) if word is not None]
    if item.count > 1:
        plural = "es" if item.shape == "cross" else "s"
        return " ".join([_NUMBERS[item.count], *words]) + plural
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _sentence(opening: str, include: Sequence[SceneObject], ground: str | None) -> str:
    first = include[0]
    joint = first.relation[0] if first.relation else "and"
    tail = f" on a {ground} background" if ground else ""
    return f"{opening} {f' {joint} '.join(_phrase(item) for item in include)}{tail}"


@cache
def every_prompt() -> tuple[ScenePrompt, ...]:
    """Every prompt of the world, in a fixed order."""
    wordings = list(itertools.product(_OPENINGS, (None, *GROUNDS)))
    return tuple(
        ScenePrompt(tag, _sentence(opening, include, ground), include, ground)
        for tag, include in _contents()
        for opening, ground in wordings
    )


@cache
def training_prompts() -> tuple[ScenePrompt, ...]:
    """The prompts that training, distillation and calibration may see. None of them is ever evaluated."""
    return tuple(prompt for prompt in every_prompt() if not prompt.held_out)


@cache
def _by_task(held_out: bool) -> dict[str, list[ScenePrompt]]:
    return {tag: [p for p in every_prompt() if p.held_out == held_out and p.tag == tag] for tag in TASKS}


def held_out(limit: int = 120, seed: int = 0) -> list[ScenePrompt]:
    """Draw `limit` held-out prompts, task by task in turn, so that any prefix is balanced.

    Within a task no prompt comes twice until all of that task's have come once (beyond that, repeats meet other
    noise, as GenEval's four images a prompt do).

    Args:
        limit: how many prompts, at least 1.
        seed: shuffles each task's prompts; the split itself does not depend on it.

    Raises:
        UserError: limit below 1.
    """
    return _drawn(True, limit, seed)


def some_of_training(limit: int = 120, seed: int = 0) -> list[ScenePrompt]:
    """As `held_out`, of the prompts that a model may have learned from: a gauge beside a score, and no result."""
    return _drawn(False, limit, seed)


def _drawn(held_out: bool, limit: int, seed: int) -> list[ScenePrompt]:
    if limit < 1:
        raise UserError(f"limit is {limit}; expected at least 1 prompt; leave it out for the default")
    queues: list[list[ScenePrompt]] = []
    for tag, prompts in _by_task(held_out).items():
        rounds = -(-limit // (len(TASKS) * len(prompts))) + 1
        queue: list[ScenePrompt] = []
        for turn in range(rounds):
            order = random.Random(f"{tag}:{seed}:{turn}").sample(prompts, len(prompts))
            queue.extend(order)
        queues.append(queue)
    return [queues[i % len(TASKS)][i // len(TASKS)] for i in range(limit)]


def held_out_among(prompts: Sequence[str]) -> list[str]:
    """Those of `prompts` that are held-out sentences, however they are spaced or capitalized."""
    forbidden = _held_out_sentences()
    return [prompt for prompt in prompts if _normal(prompt) in forbidden]


def refuse_held_out(prompts: Sequence[str]) -> None:
    """Guard of everything that learns from prompts: held-out sentences are refused.

    Raises:
        UserError: names the first held-out prompt among `prompts`.
    """
    if found := held_out_among(prompts):
        raise UserError(
            f"prompt {found[0]!r} is held out for evaluation; expected training prompts only; "
            "take them from scenes.training_prompts()"
        )


def _normal(prompt: str) -> str:
    return " ".join(prompt.lower().split()).rstrip(".")


@cache
def _held_out_sentences() -> frozenset[str]:
    return frozenset(_normal(prompt.prompt) for prompt in every_prompt() if prompt.held_out)
