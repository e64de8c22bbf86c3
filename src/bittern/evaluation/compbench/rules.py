"""T2I-CompBench's rules [Huang et al. 2023, arXiv:2307.06350]: from what was found to a score. No model is needed here.

The numbers are those of the published scorer (github.com/Karine-Huang/T2I-CompBench, MIT: 2D_spatial_eval.py,
numeracy_eval.py, BLIP_vqa.py, CLIP_similarity.py, 3_in_1.py); for depth those of its 3D_spatial_eval.py, which has
a licence of its own and of which nothing but the rule's numbers is here. What is easily done otherwise:

- Two objects are worth a quarter of each certainty and half of how well they are placed. One of them alone is worth a
  quarter of its certainty. In two dimensions, and in complex prompts, whatever is below a half becomes 0.
- Of several objects of a name the most certain counts. A boy and a man are both a person, and so one and the same.
- "next to", "near" and "on side of" hold if the centres are less than 150 pixels apart in *one* of the two
  directions, however far in the other; further away they are worth 150 over the larger distance. These are pixels of
  the picture, whatever its size.
- The sides ask for the centre on the side, further along the asked direction than across it (as far is not enough),
  and an overlap (intersection over union) below .1; where more overlaps, .1 over the overlap.
- "on top of", which complex prompts say, is no "on the top of": no place fulfils it.
- An object that is counted is worth half its share of the prompt if it is there at all, and the other half if there
  are exactly as many. Two boxes of a name are one object if they overlap by more than .9, or one lies in the other by
  more than that.
- "in front of" asks for an object that is nearer than the other, "behind" and "hidden by" for one that is further
  off, on the average of its box; then it is worth the overlap of the boxes over .5, at most 1. The published code
  reads the depth with rows and columns exchanged and gives nothing at an overlap of exactly .5; this does neither.
- 3-in-1 is the mean of BLIP-VQA, the spatial score and CLIP's cosine, of the first two where a complex prompt tells
  of a place only, and of the first and the last where it tells of an action only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bittern.evaluation.geneval.rules import Detection

NEAR = 150.0
OVERLAP = 0.1
OVERLAP_IN_DEPTH = 0.5
SAME_OBJECT = 0.9
LEAST = 0.5
MOST_PHRASES = 8

# In the order in which the published scorer looks for them: the first that a prompt contains is meant.
PLACES = (
    "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
    "on top of",
)  # fmt: skip
DEPTHS = ("in front of", "behind", "hidden by")
_NEARBY = PLACES[:3]
# Axis, and the sign of the way from the first centre to the second.
_SIDES = {"on the left of": (0, 1), "on the right of": (0, -1), "on the top of": (1, 1), "on the bottom of": (1, -1)}
_PEOPLE = ("boy", "girl", "man", "woman")
_ALSO = {"ship": "boat", "goldfish": "fish", "painting": "picture"}  # in counting only
_PLAIN = re.compile(rf"an? (.+?) ({'|'.join((*PLACES, *DEPTHS))}) an? (.+?)\.?", re.IGNORECASE)
_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_PREPOSITIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
_NO_QUESTION = ("top", "the side", "the left", "the right")

# What the benchmark counts.
_COUNTED = (
    "airplane", "apple", "backpack", "bag", "balloon", "banana", "bear", "bee", "bicycle", "bird", "boat", "book",
    "bottle", "bowl", "boy", "bread", "butterfly", "cake", "camel", "camera", "candle", "car", "cat", "chair",
    "chicken", "clock", "computer", "couch", "cow", "cup", "deer", "desk", "dog", "drum", "duck", "egg", "fish",
    "flag", "frog", "giraffe", "girl", "goldfish", "guitar", "hamburger", "helicopter", "helmet", "horse", "key",
    "kite", "knife", "lamp", "lemon", "man", "microphone", "microwave", "mouse", "paddle", "painting", "peach",
    "pear", "pen", "person", "phone", "pig", "pillow", "plate", "printer", "rabbit", "refrigerator", "sheep",
    "ship", "shrimp", "sink", "sofa", "stool", "strawberry", "suitcase", "swan", "table", "television", "tent",
    "tomato", "toy", "train", "truck", "turtle", "vase", "woman",
)  # fmt: skip
_PLURALS = {
    "deer": "deer", "fish": "fish", "goldfish": "goldfish", "knife": "knives", "man": "men", "mouse": "mice",
    "person": "people", "sheep": "sheep", "shrimp": "shrimp", "tomato": "tomatoes", "woman": "women",
}  # fmt: skip


@dataclass(frozen=True)
class Relation:
    """Where one object is asked for, as seen from another.

    Attributes:
        word: one of `PLACES` or `DEPTHS`; None where a complex prompt names objects and no place that is known.
        first: the object that is placed, by the name that is looked for.
        second: the one that it is placed by.
    """

    word: str | None
    first: str
    second: str


def person_or(name: str) -> str:
    """The name by which an object is looked for."""
    return "person" if name in _PEOPLE else name


def plain_relation(prompt: str, words: Sequence[str]) -> Relation | None:
    """The relation in a prompt of the form "a giraffe next to a lamp"; None for any other.

    Args:
        prompt: the prompt.
        words: the relations that may be meant, `PLACES` or `DEPTHS`.
    """
    match = _PLAIN.fullmatch(prompt)
    if match is None or match[2].lower() not in words:
        return None
    return Relation(match[2].lower(), person_or(match[1].lower()), person_or(match[3].lower()))


def complex_relation(prompt: str, words: Sequence[tuple[str, str]]) -> Relation | None:
    """The relation in a complex prompt: the nouns before and behind a preposition, if these are two.

    Args:
        prompt: the prompt.
        words: its words with their parts of speech, such as ("mirror", "NOUN").
    """
    objects: list[str] = []
    for start in range(len(words)):
        long = next((n for n in (3, 2, 1) if " ".join(w for w, _ in words[start : start + n]) in _PREPOSITIONS), None)
        if long is not None:
            before = [word for word, part in words[:start] if part in ("NOUN", "PROPN")]
            objects += before[-1:]
            objects += _noun_behind(words[start + long :])
    if len(objects) != 2:
        return None
    word = next((each for each in PLACES if each in prompt), None)
    return Relation(word, person_or(objects[0]), person_or(objects[1]))


def _noun_behind(words: Sequence[tuple[str, str]]) -> list[str]:
    """The first noun; without one the end of the first name that something follows."""
    nouns = [word for word, part in words if part == "NOUN"]
    names = [word for (word, part), (_, following) in pairwise(words) if part == "PROPN" and following != "PROPN"]
    return (nouns or names)[:1]


def counts(prompt: str) -> list[tuple[str, int]]:
    """What a prompt asks to be counted, by singular, in its order: [("bird", 2), ("cup", 1)]."""
    words = re.findall(r"[a-z]+", prompt.lower())
    found: list[tuple[str, int]] = []
    for number, name in pairwise(words):
        many = _NUMBERS.get(number)
        if many == 1 and name in _COUNTED:
            found.append((name, 1))
        elif many is not None and number not in ("a", "an") and name in _SINGULARS:
            found.append((_SINGULARS[name], many))
    return found


def counted_name(name: str) -> str:
    """The name by which an object that is counted is looked for."""
    return _ALSO.get(name, person_or(name))


def _plural(name: str) -> str:
    if name in _PLURALS:
        return _PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "ch", "sh", "x")) else "s")


_SINGULARS = {_plural(name): name for name in _COUNTED}


def question_phrases(phrases: Iterable[str]) -> list[str]:
    """The noun phrases that are asked about: the first eight, without those that are parts of a place."""
    return [phrase for phrase in phrases if phrase not in _NO_QUESTION][:MOST_PHRASES]


def question(phrase: str) -> str:
    """What BLIP is asked about a noun phrase, cleaned as its authors clean questions (data/utils.py, BSD-3)."""
    cleaned = re.sub(r"[.!\"()*#:;~]", "", f"{phrase}?".lower()).rstrip(" ")
    return " ".join(cleaned.split(" ")[:50])


def blip_score(shares: Iterable[float]) -> float:
    """BLIP-VQA: the product of the shares of "yes", each and the product to four places; 1 for no question."""
    product = 1.0
    for share in shares:
        product *= round(share, 4)
    return round(product, 4)


def without_adjectives(words: Iterable[tuple[str, str]]) -> str:
    """A complex prompt as CLIP reads it."""
    return " ".join(word for word, part in words if part != "ADJ")


def overlap(one: Detection, other: Detection) -> float:
    """Intersection over union of two boxes; 0 where neither has an area."""
    shared = _area(_shared(one, other))
    union = _area(one.box) + _area(other.box) - shared
    return shared / union if union > 0 else 0.0


def _shared(one: Detection, other: Detection) -> tuple[float, float, float, float]:
    a, b = one.box, other.box
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _area(box: tuple[float, float, float, float], more: float = 0.0) -> float:
    return max(0.0, box[2] - box[0] + more) * max(0.0, box[3] - box[1] + more)


def place(word: str | None, one: Detection, other: Detection) -> float:
    """How well one object is placed as seen from another, 0 to 1."""
    way = [(other.box[axis] + other.box[axis + 2] - one.box[axis] - one.box[axis + 2]) / 2 for axis in (0, 1)]
    if word in _NEARBY:
        apart = [abs(each) for each in way]
        return 1.0 if min(apart) < NEAR else NEAR / max(apart)
    if word not in _SIDES:
        return 0.0
    axis, sign = _SIDES[word]
    if way[axis] * sign <= abs(way[1 - axis]):
        return 0.0
    shared = overlap(one, other)
    return 1.0 if shared < OVERLAP else OVERLAP / shared


def place_in_depth(word: str | None, one: Detection, other: Detection, nearness: np.ndarray) -> float:
    """How well one object is placed in depth as seen from another, 0 to 1.

    Args:
        word: one of `DEPTHS`.
        one: the object that is placed.
        other: the one that it is placed by.
        nearness: [height, width] of the picture, larger where nearer.
    """
    ahead = _mean_inside(nearness, one) - _mean_inside(nearness, other)
    if word not in DEPTHS or not (ahead > 0 if word == "in front of" else ahead < 0):
        return 0.0
    return min(1.0, overlap(one, other) / OVERLAP_IN_DEPTH)


def _mean_inside(values: np.ndarray, one: Detection) -> float:
    left, top = (min(max(int(edge), 0), size - 1) for edge, size in zip(one.box[:2], values.shape[::-1], strict=True))
    right, bottom = (max(int(edge), low + 1) for edge, low in zip(one.box[2:], (left, top), strict=True))
    return float(values[top:bottom, left:right].mean(dtype=np.float64))


def spatial(
    asked: Relation | None, found: Iterable[Detection], nearness: Callable[[], np.ndarray] | None = None
) -> float:
    """What the places of the objects in a picture are worth, 0 to 1.

    Args:
        asked: the relation; None is worth nothing.
        found: what was detected.
        nearness: gives [height, width], larger where nearer, for a relation in depth; asked where both are there.
    """
    if asked is None:
        return 0.0
    best = best_of(found)
    pair = [best.get(name) for name in (asked.first, asked.second)]
    score = sum(0.25 * one.score for one in pair if one is not None)
    one, other = pair
    if one is not None and other is not None:
        word = asked.word
        score += (place(word, one, other) if nearness is None else place_in_depth(word, one, other, nearness())) / 2
    return score if nearness is not None or score >= LEAST else 0.0


def best_of(found: Iterable[Detection]) -> Mapping[str, Detection]:
    """The most certain detection of every name, the first of equals."""
    best: dict[str, Detection] = {}
    for one in found:
        if one.name not in best or one.score > best[one.name].score:
            best[one.name] = one
    return best


def numeracy(asked: Sequence[tuple[str, int]], found: Iterable[Detection]) -> float:
    """What the numbers of the objects in a picture are worth, 0 to 1.

    Args:
        asked: what `counts` gave.
        found: what was detected.
    """
    kept: list[Detection] = []
    for one in sorted(found, key=lambda each: -each.score):
        if not any(one.name == other.name and _same_object(one, other) for other in kept):
            kept.append(one)
    score = 0.0
    for name, many in asked:
        there = sum(one.name == counted_name(name) for one in kept)
        score += (0.5 * (there > 0) + 0.5 * (there == many)) / len(asked)
    return score


def _same_object(one: Detection, other: Detection) -> bool:
    # Boxes are counted with their last pixels here, as the published scorer does in this rule alone.
    shared, areas = _area(_shared(one, other), 1.0), [_area(each.box, 1.0) for each in (one, other)]
    return any(shared > SAME_OBJECT * whole for whole in (sum(areas) - shared, *areas))


def three_in_one(kind: str | None, blip: float, places: float, clip: float) -> float:
    """The score of a complex prompt.

    Args:
        kind: "spatial" or "action" for a prompt that tells of a place or an action only.
        blip: BLIP-VQA's.
        places: the spatial score.
        clip: CLIP's cosine.
    """
    parts = {"spatial": (blip, places), "action": (blip, clip)}.get(kind or "", (blip, places, clip))
    return sum(parts) / len(parts)
