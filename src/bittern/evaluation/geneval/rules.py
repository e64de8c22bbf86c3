"""GenEval's rules [Ghosh et al. 2023, arXiv:2310.11513]: from detections to a verdict. No model is needed here.

What the published scorer does, and what is easily done otherwise:

- A detection counts if its score is *above* the threshold, .3 or in counting .9; of each class the 16 most certain
  are kept, and nothing is suppressed for overlapping another. Scores are compared in float32.
- A clause looks at the most certain `count` objects of its class only. All of these must have the colour: a black
  dog that is more certain hides the white one that was asked for. Surplus objects are no fault but where `exclude`
  names them, and `exclude` counts objects of any colour.
- Clauses are independent: two clauses of one class may be met by the same object.
- A relation must hold between every object of the clause and every object of the clause it refers to. The offset of
  the centres, less a margin of a tenth of both boxes' sizes, is divided by the length of the *whole* offset; an
  object is "left of" another if that gives less than -.5 in x, and so on. So boxes that nearly touch have no relation
  at all, and a diagonal one may have two.
- A relation to a clause that failed fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bittern.evaluation.geneval.metadata import Request

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MOST_OF_A_CLASS = 16
POSITION_MARGIN = 0.1
_ALONG_AN_AXIS = 0.5


@dataclass(frozen=True, eq=False)
class Detection:
    """An object that was found.

    Attributes:
        name: its class, one of `metadata.OBJECTS`.
        box: left, top, right, bottom in pixels; right and bottom are the first that lie outside.
        score: the detector's certainty, 0 to 1.
        mask: its pixels, [height, width] of the picture, for the colour; None where nobody asks for one.
    """

    name: str
    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what its prompt asks, and every reason why not."""

    correct: bool
    reason: str


Objects = Mapping[str, Sequence[Detection]]
Namer = Callable[[str, Sequence[Detection]], Sequence[str]]
"""Gives the colours of some objects of one class."""


def threshold(tag: str) -> float:
    """The score above which a detection counts in a task."""
    return COUNTING_THRESHOLD if tag == "counting" else THRESHOLD


def keep(found: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count, by class, the most certain first."""
    by_class: dict[str, list[Detection]] = {}
    for one in found:
        by_class.setdefault(one.name, []).append(one)
    kept: dict[str, list[Detection]] = {}
    for name, ones in by_class.items():
        scores = np.array([one.score for one in ones], np.float32)
        # numpy's own order of equal scores, as in the published scorer; all are sorted before some are left out.
        order = np.argsort(scores)[::-1]
        order = order[scores[order] > np.float32(threshold(tag))][:MOST_OF_A_CLASS]
        if order.size:
            kept[name] = [ones[index] for index in order]
    return kept


def relations(one: Detection, target: Detection) -> set[str]:
    """Where `one` lies as seen from `target`."""
    # float32, as the detections were compared when the published numbers were made.
    a, b = (np.asarray(each.box, np.float32).reshape(2, 2) for each in (one, target))
    apart = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.maximum(np.abs(apart) - POSITION_MARGIN * sizes, 0) * np.sign(apart)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(apart)
    holds = {
        "left of": x < -_ALONG_AN_AXIS,
        "right of": x > _ALONG_AN_AXIS,
        "above": y < -_ALONG_AN_AXIS,
        "below": y > _ALONG_AN_AXIS,
    }
    return {word for word, so in holds.items() if so}


def judge(request: Request, objects: Objects, name_colors: Namer) -> Verdict:
    """Whether the objects in a picture fulfil a prompt.

    Args:
        request: the prompt and its conditions.
        objects: what `keep` kept.
        name_colors: called for the objects whose colour matters, only where their number is right.
    """
    reasons: list[str] = []
    met: list[Sequence[Detection] | None] = []
    for clause in request.include:
        ones = objects.get(clause.name, ())[: clause.count]
        before = len(reasons)
        if len(ones) < clause.count:
            reasons.append(f"expected {clause.count} {clause.name}, found {len(ones)}")
        else:
            if clause.color is not None:
                colors = list(name_colors(clause.name, ones))
                if any(color != clause.color for color in colors):
                    reasons.append(f"expected {clause.count} {clause.color} {clause.name}, found {', '.join(colors)}")
            if clause.position is not None and len(reasons) == before:
                word, other = clause.position
                problem = _misplaced(word, ones, met[other])
                if problem is not None:
                    reasons.append(f"expected {clause.name} {word} {request.include[other].name}, {problem}")
        met.append(ones if len(reasons) == before else None)
    for clause in request.exclude:
        count = len(objects.get(clause.name, ()))
        if count >= clause.count:
            reasons.append(f"expected fewer than {clause.count} {clause.name}, found {count}")
    return Verdict(not reasons, "; ".join(reasons))


def _misplaced(word: str, ones: Sequence[Detection], targets: Sequence[Detection] | None) -> str | None:
    """What is wrong with the first pair that is not in the relation; None if every pair is."""
    if targets is None:
        return "which is not there as asked"
    for one in ones:
        for target in targets:
            found = relations(one, target)
            if word not in found:
                return f"found it {' and '.join(sorted(found)) or 'too near to tell'}"
    return None
