"""Does a picture show what its prompt asks? GenEval's rules [arXiv:2310.11513, appendix], on our detections.

Every line of the prompt needs its count of objects of its shape and colour; counting refuses one too many; a relation
holds when the second object lies in that direction from the first, boxes' centres measured with a margin of a tenth
of the boxes' sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import UInt8
from torch import Tensor

from bittern.evaluation.scenes.detect import Detection, detect
from bittern.scene_prompts import SceneObject, ScenePrompt

POSITION_MARGIN = 0.1


def judge(images: UInt8[Tensor, "b 3 h w"], prompts: Sequence[ScenePrompt]) -> list[bool]:
    """Whether each image shows what its prompt asks."""
    return [satisfies(prompt, detect(image)) for image, prompt in zip(images, prompts, strict=True)]


def satisfies(prompt: ScenePrompt, found: Sequence[Detection]) -> bool:
    """Whether detections, best first, fulfil a prompt."""
    chosen: list[list[Detection]] = []
    for item in prompt.include:
        of_shape = [one for one in found if one.shape == item.shape]
        if prompt.tag == "counting" and len(of_shape) > item.count:
            return False
        matching = [one for one in of_shape if item.color in (None, one.color)][: item.count]
        if len(matching) < item.count:
            return False
        chosen.append(matching)
    return all(_placed(item, mine, chosen) for item, mine in zip(prompt.include, chosen, strict=True))


def _placed(item: SceneObject, mine: list[Detection], chosen: list[list[Detection]]) -> bool:
    if item.relation is None:
        return True
    word, other = item.relation
    return all(word in _relations(one, target) for one in mine for target in chosen[other])


def _relations(one: Detection, target: Detection) -> set[str]:
    """Where `one` lies as seen from `target`: at most one word an axis, none where they overlap in the main."""
    offsets: list[float] = []
    for axis in (0, 1):
        width = one.box[axis + 2] - one.box[axis]
        target_width = target.box[axis + 2] - target.box[axis]
        apart = (one.box[axis] + one.box[axis + 2] - target.box[axis] - target.box[axis + 2]) / 2
        beyond = max(abs(apart) - POSITION_MARGIN * (width + target_width), 0.0)
        offsets.append(beyond if apart > 0 else -beyond)
    length = (offsets[0] ** 2 + offsets[1] ** 2) ** 0.5
    if length < 1e-3:
        return set()
    dx, dy = offsets[0] / length, offsets[1] / length
    words = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {word for word, holds in words.items() if holds}
