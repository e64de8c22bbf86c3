"""Every rule of GenEval's scorer, and its edges, on detections made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from bittern.evaluation.geneval import rules
from bittern.evaluation.geneval.metadata import Clause, Request, read_metadata
from bittern.evaluation.geneval.rules import Detection, judge, keep, relations

ABOVE_3 = float(np.nextafter(np.float32(0.3), np.float32(1)))
ABOVE_9 = float(np.nextafter(np.float32(0.9), np.float32(1)))


def found(name: str, score: float = 0.95, box: Sequence[float] = (0, 0, 10, 10)) -> Detection:
    return Detection(name, tuple(map(float, box)), score)


def asked(*include: Clause, tag: str = "single_object", exclude: Sequence[Clause] = ()) -> Request:
    return Request(0, tag, "a photo", tuple(include), tuple(exclude), "{}")


def verdict(request: Request, detections: Sequence[Detection], colors: dict[float, str] | None = None) -> bool:
    """The verdict; an object's colour is found by its score."""

    def name_colors(_: str, ones: Sequence[Detection]) -> list[str]:
        assert colors is not None, "nobody asked for colours"
        return [colors[one.score] for one in ones]

    told = judge(request, keep(detections, request.tag), name_colors)
    assert told.correct == (told.reason == "")
    return told.correct


@pytest.mark.parametrize(
    ("tag", "score", "counts"),
    [
        ("single_object", 0.3, False), ("single_object", ABOVE_3, True), ("position", 0.3, False),
        ("counting", 0.9, False), ("counting", ABOVE_9, True), ("counting", 0.5, False), ("colors", 0.5, True),
    ],
)  # fmt: skip
def test_a_score_counts_above_the_threshold_and_not_at_it(tag: str, score: float, counts: bool) -> None:
    assert bool(keep([found("dog", score)], tag)) == counts
    assert verdict(asked(Clause("dog", 1), tag=tag), [found("dog", score)]) == counts


def test_sixteen_of_a_class_are_kept_and_they_are_the_most_certain() -> None:
    scores = np.random.default_rng(0).permutation(np.linspace(0.4, 0.99, 20))
    kept = keep([*(found("dog", float(s)) for s in scores), found("cat")], "two_object")
    assert [one.score for one in kept["dog"]] == sorted(scores, reverse=True)[:16]
    assert len(kept["cat"]) == 1
    many = [found("dog", 0.91 + 0.001 * i) for i in range(20)]
    assert verdict(asked(Clause("dog", 16), tag="counting"), many)
    assert not verdict(asked(Clause("dog", 17), tag="counting"), many)
    assert verdict(asked(Clause("dog", 3), tag="counting", exclude=[Clause("dog", 17)]), many)


def test_boxes_that_overlap_wholly_are_two_objects() -> None:
    assert verdict(asked(Clause("dog", 2)), [found("dog", 0.9), found("dog", 0.8)])


def test_a_missing_class_and_one_too_few() -> None:
    assert not verdict(asked(Clause("dog", 1)), [])
    assert not verdict(asked(Clause("dog", 1)), [found("cat")])
    assert not verdict(asked(Clause("dog", 2)), [found("dog")])
    assert not verdict(asked(Clause("dog", 1), Clause("cat", 1), tag="two_object"), [found("dog")])
    assert verdict(asked(Clause("dog", 1), Clause("cat", 1), tag="two_object"), [found("dog"), found("cat")])


def test_surplus_is_a_fault_only_where_it_is_excluded() -> None:
    three = [found("dog", s) for s in (0.99, 0.98, 0.97)]
    assert verdict(asked(Clause("dog", 2)), three)
    assert not verdict(asked(Clause("dog", 2), tag="counting", exclude=[Clause("dog", 3)]), three)
    assert verdict(asked(Clause("dog", 2), tag="counting", exclude=[Clause("dog", 3)]), three[:2])
    # What counting's threshold leaves out is no surplus.
    unsure = [*three[:2], found("dog", 0.89)]
    assert verdict(asked(Clause("dog", 2), tag="counting", exclude=[Clause("dog", 3)]), unsure)


def test_clauses_of_one_class_are_met_by_the_same_object() -> None:
    assert verdict(asked(Clause("dog", 1), Clause("dog", 1)), [found("dog")])
    red, blue = Clause("dog", 1, "red"), Clause("dog", 1, "blue")
    dogs = [found("dog", 0.9), found("dog", 0.8)]
    assert not verdict(asked(red, blue, tag="color_attr"), dogs, {0.9: "red", 0.8: "blue"})


def test_the_most_certain_objects_must_have_the_colour() -> None:
    dogs = [found("dog", 0.8), found("dog", 0.9)]
    white = asked(Clause("dog", 1, "white"), tag="colors")
    assert verdict(white, dogs, {0.9: "white", 0.8: "black"})
    assert not verdict(white, dogs, {0.9: "black", 0.8: "white"})
    two = asked(Clause("dog", 2, "white"), tag="colors")
    assert verdict(two, dogs, {0.9: "white", 0.8: "white"})
    assert not verdict(two, dogs, {0.9: "white", 0.8: "black"})


def test_colours_are_asked_for_only_where_the_number_is_right() -> None:
    assert not verdict(asked(Clause("dog", 2, "white")), [found("dog")], None)


def test_equal_scores_are_one_object_each() -> None:
    dogs = [found("dog", 0.5, (i, 0, i + 1, 1)) for i in range(3)]
    kept = keep(dogs, "single_object")["dog"]
    assert sorted(one.box for one in kept) == sorted(one.box for one in dogs)


SIDE = (0, 0, 20, 20)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-100, 0, -80, 20), {"left of"}),
        ((100, 0, 120, 20), {"right of"}),
        ((0, -100, 20, -80), {"above"}),
        ((0, 100, 20, 120), {"below"}),
        ((100, 100, 120, 120), {"right of", "below"}),
        ((-100, 100, -80, 120), {"left of", "below"}),
        (SIDE, set()),  # one place
        ((4, 0, 24, 20), set()),  # centres apart by exactly the margin, a tenth of 40
        ((7, 0, 27, 20), set()),  # 7 - 4 = 3 of 7 is less than half: the whole offset divides
        ((8, 0, 28, 20), set()),  # 4 of 8 is exactly half
        ((8.5, 0, 28.5, 20), {"right of"}),  # 4.5 of 8.5
        ((100, 50, 120, 70), {"right of"}),  # 46 of 112 below is less than half
        ((100, 66, 120, 86), {"right of", "below"}),  # 62 of 119.8
    ],
)
def test_relations(box: Sequence[float], expected: set[str]) -> None:
    assert relations(found("dog", box=box), found("cat", box=SIDE)) == expected


def test_larger_boxes_need_a_wider_gap() -> None:
    target = found("cat", box=(0, 0, 10, 10))
    assert relations(found("dog", box=(-35, 0, -25, 10)), target) == {"left of"}
    wide = found("dog", box=(-130, 0, 70, 10))
    assert relations(wide, target) == set()


LEFT, RIGHT = (0, 0, 10, 10), (90, 0, 100, 10)
PLACED = asked(Clause("cat", 1), Clause("dog", 1, position=("left of", 0)), tag="position")


def test_a_relation_holds_from_the_placed_object_to_the_other() -> None:
    assert verdict(PLACED, [found("cat", box=RIGHT), found("dog", box=LEFT)])
    assert not verdict(PLACED, [found("cat", box=LEFT), found("dog", box=RIGHT)])
    assert not verdict(PLACED, [found("dog", box=LEFT)])


def test_only_the_most_certain_are_placed() -> None:
    dogs = [found("dog", 0.9, (180, 0, 190, 10)), found("dog", 0.8, LEFT)]
    assert not verdict(PLACED, [found("cat", box=RIGHT), *dogs])


def test_every_pair_must_be_in_the_relation() -> None:
    pair = asked(Clause("cat", 2), Clause("dog", 2, position=("left of", 0)))
    cats = [found("cat", 0.9, (200, 0, 210, 10)), found("cat", 0.8, RIGHT)]
    dogs = [found("dog", 0.9, LEFT), found("dog", 0.8, (150, 0, 160, 10))]
    assert not verdict(pair, [*cats, *dogs])
    assert verdict(pair, [*cats, dogs[0], found("dog", 0.8, (20, 0, 30, 10))])


def test_a_relation_to_a_clause_that_failed_fails() -> None:
    request = asked(Clause("cat", 1, "red"), Clause("dog", 1, position=("left of", 0)))
    cat, dog = found("cat", 0.9, RIGHT), found("dog", 0.8, LEFT)
    assert verdict(request, [cat, dog], {0.9: "red"})
    told = judge(request, keep([cat, dog], "position"), lambda *_: ["blue"])
    assert not told.correct and "found blue" in told.reason and "not there as asked" in told.reason


def test_a_wrong_colour_is_one_fault_and_the_place_no_second() -> None:
    request = asked(Clause("cat", 1), Clause("dog", 1, "red", ("left of", 0)))
    told = judge(request, keep([found("cat", box=LEFT), found("dog", box=RIGHT)], "position"), lambda *_: ["blue"])
    assert told.reason == "expected 1 red dog, found blue"


def oracle(request: Request, detections: Sequence[Detection], color_of: dict[Detection, str]) -> bool | None:
    """The rules as recursion over clauses, in fractions; None where a relation is within rounding of its edge."""
    least = 0.9 if request.tag == "counting" else 0.3
    objects: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda d: -d.score):
        if one.score > least + 1e-6 and len(objects.setdefault(one.name, [])) < 16:
            objects[one.name].append(one)
    near = False

    def relation(word: str, one: Detection, target: Detection) -> bool:
        nonlocal near
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[word]
        boxes = [[Fraction(v) for v in d.box] for d in (one, target)]
        centres = [[(b[k] + b[k + 2]) / 2 for k in (0, 1)] for b in boxes]
        margin = sum(b[axis + 2] - b[axis] for b in boxes) / 10
        offset = [centres[0][k] - centres[1][k] for k in (0, 1)]
        length = math.hypot(*map(float, offset))
        if not length:
            return False
        share = max(float(sign * offset[axis] - margin), 0.0) / length
        near |= abs(share - 0.5) < 1e-5
        return share > 0.5

    def holds(index: int) -> bool:
        clause = request.include[index]
        ones = objects.get(clause.name, [])[: clause.count]
        if len(ones) < clause.count or any(clause.color not in (None, color_of[one]) for one in ones):
            return False
        if clause.position is None:
            return True
        word, other = clause.position
        targets = objects.get(request.include[other].name, [])[: request.include[other].count]
        return holds(other) and all(relation(word, one, target) for one in ones for target in targets)

    right = all([holds(index) for index in range(len(request.include))])
    right &= all(len(objects.get(clause.name, [])) < clause.count for clause in request.exclude)
    return None if near else right


def test_all_prompts_are_judged_as_the_rules_say(metadata_file: Path) -> None:
    requests = read_metadata(metadata_file)
    assert len(requests) == 553
    rng = np.random.default_rng(5)
    told: dict[str, list[bool]] = {}
    left_out = 0
    for request in requests * 3:
        color_of: dict[Detection, str] = {}
        asked_colors = [clause.color for clause in request.include if clause.color] or ["red"]
        for name in {*(clause.name for clause in request.include), "toothbrush"}:
            number = int(rng.integers(0, 6)) if rng.random() < 0.9 else int(rng.integers(14, 20))
            for place, size, score in zip(
                rng.integers(0, 400, (number, 2)), rng.integers(1, 120, (number, 2)),
                1 - rng.permutation(800)[:number] / (900 if request.tag != "counting" else 6000),
                strict=True,
            ):  # fmt: skip
                one = Detection(name, (*map(float, place), *map(float, place + size)), float(score))
                color_of[one] = str(rng.choice([*asked_colors, *asked_colors, "black"]))
        expected = oracle(request, list(color_of), color_of)
        if expected is None:
            left_out += 1
            continue
        kept = keep(color_of, request.tag)
        found_now = judge(request, kept, lambda _, ones, colors=color_of: [colors[one] for one in ones])
        assert found_now.correct == expected, (request, found_now)
        told.setdefault(request.tag, []).append(expected)
    assert left_out < 5 and len(told) == 6
    # Both verdicts occur in every task, or the comparison would say nothing.
    assert all(0.02 < sum(verdicts) / len(verdicts) < 0.98 for verdicts in told.values()), told


def test_thresholds_are_the_published_ones() -> None:
    ours = (rules.THRESHOLD, rules.COUNTING_THRESHOLD, rules.MOST_OF_A_CLASS, rules.POSITION_MARGIN)
    assert ours == (0.3, 0.9, 16, 0.1)
