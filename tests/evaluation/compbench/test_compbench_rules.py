"""The rules on hand-made detections: every relation, its edges and ties, counts, duplicates, questions, 3-in-1."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bittern.errors import UserError
from bittern.evaluation.compbench import rules
from bittern.evaluation.compbench.prompts import CATEGORIES, read_prompts
from bittern.evaluation.compbench.rules import Relation
from bittern.evaluation.geneval.rules import Detection

LEFT, RIGHT, TOP, BOTTOM = "on the left of", "on the right of", "on the top of", "on the bottom of"


def box(x: float, y: float, *, wide: float = 20, high: float = 20, name: str = "bee", score: float = 0.8) -> Detection:
    """An object by its centre."""
    return Detection(name, (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2), score)


@pytest.mark.parametrize(
    ("word", "at", "expected"),
    [
        # The other object stands at (200, 200); all boxes are 20 x 20, so that centres 20 apart do not overlap.
        (LEFT, (100, 200), 1), (RIGHT, (300, 200), 1), (TOP, (200, 100), 1), (BOTTOM, (200, 300), 1),
        (LEFT, (300, 200), 0), (RIGHT, (100, 200), 0), (TOP, (200, 300), 0), (BOTTOM, (200, 100), 0),
        (LEFT, (200, 200), 0), (TOP, (200, 200), 0),
        # A diagonal is neither; one pixel off it is.
        (LEFT, (100, 100), 0), (LEFT, (99, 100), 1), (TOP, (100, 100), 0), (TOP, (100, 99), 1), (RIGHT, (300, 101), 1),
        # 4 pixels apart 16 of 24 columns are shared: .1 over two thirds; 17 apart it is 3 of 37, and 16 apart 1 / 9.
        (LEFT, (196, 200), 0.15), (BOTTOM, (200, 204), 0.15), (LEFT, (183, 200), 1), (LEFT, (184, 200), 0.9),
        # Near in one direction is near, however far in the other; 150 is no longer near.
        ("near", (200, 900), 1), ("next to", (900, 349.9), 1), ("on side of", (50.1, 900), 1),
        ("near", (350, 500), 0.5), ("next to", (350, 350), 1), ("on side of", (50, 800), 0.25),
        # What complex prompts say is not among the places that can be fulfilled, nor is nothing.
        ("on top of", (200, 100), 0), (None, (100, 200), 0),
    ],
)  # fmt: skip
def test_places(word: str | None, at: tuple[float, float], expected: float) -> None:
    assert rules.place(word, box(*at), box(200, 200, name="cup")) == pytest.approx(expected)


def test_an_overlap_of_exactly_a_tenth_is_worth_all() -> None:
    # 2 of 20 columns: 40 / 400, and from there on .1 over the overlap.
    one, other = Detection("a", (0, 0, 11, 20), 1), Detection("b", (9, 0, 20, 20), 1)
    assert rules.overlap(one, other) == pytest.approx(0.1) and rules.place(LEFT, one, other) == pytest.approx(1)


def test_boxes_without_an_area_overlap_nothing() -> None:
    line = Detection("a", (5, 0, 5, 20), 1)
    assert rules.overlap(line, line) == 0.0 and rules.overlap(line, box(5, 5)) == 0.0


@pytest.mark.parametrize("word", rules.DEPTHS)
def test_places_in_depth(word: str) -> None:
    near = np.zeros((40, 60))
    near[:, :30] = 1.0
    left, right = Detection("a", (0, 0, 40, 40), 1), Detection("b", (20, 0, 60, 40), 1)
    front, back = (left, right) if word == "in front of" else (right, left)
    # 20 of 60 columns are shared: a third over a half.
    assert rules.place_in_depth(word, front, back, near) == pytest.approx(2 / 3)
    assert rules.place_in_depth(word, back, front, near) == 0
    # As near as the other is neither before nor behind it.
    assert rules.place_in_depth(word, left, right, np.ones((40, 60))) == 0
    # Half an overlap and more is worth all, none is worth nothing.
    narrow = Detection("b", (0, 0, 60, 40), 1)
    wide = Detection("a", (0, 0, 30, 40), 1)
    front, back = (wide, narrow) if word == "in front of" else (narrow, wide)
    assert rules.overlap(wide, narrow) == 0.5 and rules.place_in_depth(word, front, back, near) == 1
    apart = [Detection("a", (0, 0, 20, 40), 1), Detection("b", (40, 0, 60, 40), 1)]
    assert rules.place_in_depth(word, *apart, near) == rules.place_in_depth(word, *apart[::-1], near) == 0


def test_depth_is_averaged_over_rows_and_columns_of_the_box() -> None:
    near = np.arange(12.0).reshape(3, 4)
    assert rules._mean_inside(near, Detection("a", (1.9, 1.2, 3.9, 3.0), 1)) == np.mean([5, 6, 9, 10])
    # A box of no width at the picture's edge still lies on a pixel.
    assert rules._mean_inside(near, Detection("a", (4, 3, 4, 3), 1)) == 11
    assert rules.place_in_depth("near", box(1, 1), box(2, 2), near) == 0


def test_two_objects_are_worth_their_certainties_and_their_place() -> None:
    asked = Relation(LEFT, "bee", "cup")
    bee, cup = box(10, 10, score=0.8), box(100, 10, name="cup", score=0.4)
    assert rules.spatial(asked, [cup, bee]) == pytest.approx(0.25 * 1.2 + 0.5)
    # In the wrong place what is left is below a half, and so nothing.
    assert rules.spatial(Relation(RIGHT, "bee", "cup"), [cup, bee]) == 0
    sure = [box(10, 10, score=1.0), box(100, 10, name="cup", score=1.0)]
    assert rules.spatial(Relation(RIGHT, "bee", "cup"), sure) == 0.5
    assert rules.spatial(asked, [bee]) == rules.spatial(asked, [cup]) == rules.spatial(asked, []) == 0
    assert rules.spatial(None, [bee, cup]) == 0


def test_in_depth_nothing_is_cut_off_and_depth_is_asked_for_two_objects_only() -> None:
    asked, near = Relation("behind", "bee", "cup"), np.zeros((40, 200))
    near[:, 15:] = 1.0
    bee, cup = box(10, 10, score=0.8), box(20, 10, name="cup", score=0.4)
    third = rules.overlap(bee, cup)
    assert rules.spatial(asked, [cup, bee], lambda: near) == pytest.approx(0.3 + third / 0.5 / 2)

    def never() -> np.ndarray:
        raise AssertionError

    assert rules.spatial(asked, [bee], never) == pytest.approx(0.2)
    assert rules.spatial(asked, [cup], never) == pytest.approx(0.1)
    assert rules.spatial(asked, [], never) == 0


def test_the_most_certain_of_a_name_counts_and_people_are_one_name() -> None:
    asked = Relation(LEFT, "bee", "cup")
    wrong, right = box(150, 10, score=0.9), box(10, 10, score=0.3)
    cup = box(100, 10, name="cup", score=1.0)
    assert rules.spatial(asked, [right, wrong, cup]) == 0
    assert rules.spatial(asked, [right, cup, box(5, 5, score=0.3)]) == pytest.approx(0.825)
    first, second = box(10, 10, score=0.5), box(90, 10, score=0.5)
    assert rules.best_of([first, second])["bee"] is first
    people = rules.plain_relation("a boy near a man", rules.PLACES)
    assert people == Relation("near", "person", "person")
    # Both are the same person, who is near and beside nobody.
    assert rules.spatial(people, [box(10, 10, name="person", score=0.6)]) == pytest.approx(0.8)
    assert rules.spatial(Relation(LEFT, "person", "person"), [box(10, 10, name="person", score=0.6)]) == 0


@pytest.mark.parametrize(
    ("prompt", "words", "expected"),
    [
        ("a giraffe next to a lamp", rules.PLACES, Relation("next to", "giraffe", "lamp")),
        ("a airplane on the top of a woman", rules.PLACES, Relation(TOP, "airplane", "person")),
        ("A cup on top of an egg.", rules.PLACES, Relation("on top of", "cup", "egg")),
        ("a bee on side of a key", rules.PLACES, Relation("on side of", "bee", "key")),
        ("a dog hidden by a cat", rules.DEPTHS, Relation("hidden by", "dog", "cat")),
        ("a dog in front of a cat", rules.PLACES, None),
        ("a dog near a cat", rules.DEPTHS, None),
        ("dogs near a cat", rules.PLACES, None),
        ("a dog nearby a cat", rules.PLACES, None),
        ("a dog", rules.PLACES, None),
    ],
)
def test_plain_relations(prompt: str, words: tuple[str, ...], expected: Relation | None) -> None:
    assert rules.plain_relation(prompt, words) == expected


def tagged(text: str) -> list[tuple[str, str]]:
    """Words such as "hat/NOUN"; others are marked with X."""
    return [(word, part or "X") for word, _, part in (each.partition("/") for each in text.split())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red/ADJ hat/NOUN was next to the old box/NOUN .", ("next to", "hat", "box")),
        ("The coat/NOUN rack/NOUN was on the left of the man/NOUN", (LEFT, "rack", "person")),
        ("The Eiffel/PROPN near the Big/PROPN Ben/PROPN .", ("near", "Eiffel", "Ben")),
        # A name at the very end is not taken, and so only one object is left.
        ("The hat/NOUN near Ben/PROPN", None),
        ("The hat/NOUN was on top of the box/NOUN", ("on top of", "hat", "box")),
        # Two prepositions give four objects.
        ("A hat/NOUN near a box/NOUN next to a cup/NOUN", None),
        ("The dog/NOUN ran on", None),
        ("on the left the cup/NOUN", None),
        # A place that is asked for without "of" is found, but is none that can be fulfilled.
        ("A hat/NOUN on the right a box/NOUN", (None, "hat", "box")),
    ],
)
def test_complex_relations(text: str, expected: tuple[str | None, str, str] | None) -> None:
    words = tagged(text)
    found = rules.complex_relation(" ".join(word for word, _ in words), words)
    assert found == (Relation(*expected) if expected else None)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("two birds", [("bird", 2)]),
        ("one mouse and seven women", [("mouse", 1), ("woman", 7)]),
        ("a cup, an egg, three knives, two deer and one deer", [
            ("cup", 1), ("egg", 1), ("knife", 3), ("deer", 2), ("deer", 1)]),
        ("four butterflies, five peaches, six tomatoes, eight keys", [
            ("butterfly", 4), ("peach", 5), ("tomato", 6), ("key", 8)]),
        ("three camels shared a burger", [("camel", 3)]),
        ("Five dogs happily wagged their tails", [("dog", 5)]),
        # Neither "two bird", "a birds" nor "nine birds" is asked for by the benchmark.
        ("two bird and a birds and nine birds", []),
        ("a red cup", []),
    ],
)  # fmt: skip
def test_counts(prompt: str, expected: list[tuple[str, int]]) -> None:
    assert rules.counts(prompt) == expected


def test_numbers_are_worth_half_for_being_there_and_half_for_being_right() -> None:
    apart = [box(100 * i, 10, score=0.9 - i / 10) for i in range(3)]
    assert rules.numeracy([("bee", 3)], apart) == 1
    assert rules.numeracy([("bee", 2)], apart) == rules.numeracy([("bee", 4)], apart) == 0.5
    assert rules.numeracy([("cup", 1)], apart) == 0
    cup = box(500, 10, name="cup")
    assert rules.numeracy([("bee", 3), ("cup", 2)], [*apart, cup]) == pytest.approx(0.75)
    assert rules.numeracy([("bee", 3), ("cup", 1), ("key", 1)], [*apart, cup]) == pytest.approx(2 / 3)


def test_names_that_are_counted_as_another() -> None:
    people = [box(100 * i, 10, name="person") for i in range(2)]
    assert rules.numeracy([("boy", 2)], people) == 1
    # Two boys and a woman are three people for either.
    three = [*people, box(500, 10, name="person")]
    assert rules.numeracy([("boy", 2), ("woman", 1)], three) == 0.5
    assert [rules.counted_name(n) for n in ("ship", "goldfish", "painting", "cup")] == [
        "boat",
        "fish",
        "picture",
        "cup",
    ]
    assert rules.person_or("ship") == "ship"


def test_boxes_that_are_the_same_object_are_counted_once() -> None:
    # Sides are counted with their last pixel: 101 x 101 holds 101 x 91 = .9009, and 101 x 90 = .891 of itself.
    whole, most = Detection("bee", (0, 0, 100, 100), 0.9), Detection("bee", (0, 0, 100, 90), 0.8)
    inside = Detection("bee", (40, 40, 50, 50), 0.7)
    out = Detection("bee", (90, 40, 190, 140), 0.6)
    assert rules.numeracy([("bee", 1)], [inside, most, whole]) == 1
    assert rules.numeracy([("bee", 2)], [inside, most, whole, out]) == 1
    # What lies in another thing, and what lies in something that was dropped but in nothing that was kept, counts.
    assert rules.numeracy([("bee", 1)], [Detection("cup", (0, 0, 100, 100), 0.9), inside]) == 1
    # 9 of 10 pixels in common is not more than .9.
    assert rules.numeracy([("bee", 2)], [Detection("bee", (0, 0, 0, 9), 1), Detection("bee", (0, 1, 0, 10), 1)]) == 1
    assert rules.numeracy([("bee", 1)], [Detection("bee", (0, 0, 0, 10), 1), Detection("bee", (0, 1, 0, 11), 1)]) == 1


def test_questions() -> None:
    assert rules.question("The Red bee (big); no. 1!") == "the red bee big no 1?"
    assert rules.question(" ".join(["bee"] * 60)).count("bee") == 50
    asked = ["a bee", "top", "the side", "the left", "the right", "the top", *"abcdefg"]
    assert rules.question_phrases(asked) == ["a bee", "the top", *"abcdef"]


def test_blip_scores_are_products_to_four_places() -> None:
    assert rules.blip_score([]) == 1 and rules.blip_score([0.5, 0.25]) == 0.125
    assert rules.blip_score([0.69004, 1.0]) == 0.69 and rules.blip_score([0.00004, 1.0]) == 0
    assert rules.blip_score([0.3333, 0.3333, 0.3333]) == 0.0370


def test_adjectives_are_left_out_for_clip() -> None:
    assert rules.without_adjectives(tagged("The red/ADJ hat/NOUN , old/ADJ .")) == "The hat , ."


def test_three_in_one() -> None:
    assert rules.three_in_one(None, 0.9, 0.6, 0.3) == pytest.approx(0.6)
    assert rules.three_in_one("spatial", 0.9, 0.6, 0.3) == pytest.approx(0.75)
    assert rules.three_in_one("action", 0.9, 0.6, 0.3) == pytest.approx(0.6)
    assert rules.three_in_one("action", 0.9, 0.0, 0.3) == pytest.approx(0.6)


def official_folder() -> Path | None:
    """The official files that a developer may have beside the repository."""
    places = (parent / "shared" / "data" / "t2i-compbench" for parent in Path(__file__).resolve().parents)
    return next((place for place in places if place.is_dir()), None)


def test_all_official_files_are_read(prompt_files: Path) -> None:
    folder = official_folder() or prompt_files
    requests, per_file = read_prompts(folder), 300 if folder != prompt_files else 2
    assert Counter(request.tag for request in requests) == dict.fromkeys(CATEGORIES, per_file)
    assert len({request.index for request in requests}) == len(requests)
    for file in folder.glob("*_train.txt"):
        assert len(read_prompts(file)) == 700, file
    # All relations and numbers of the split are met, each with its objects.
    words = Counter(request.relation.word for request in requests if request.relation)
    if folder != prompt_files:
        assert set(words) == {*rules.PLACES[:-1], *rules.DEPTHS} and sum(words.values()) == 600
        numbers = Counter(many for request in requests for _, many in request.counts)
        assert set(numbers) == set(range(1, 9))


def test_prompt_files_of_every_form(prompt_files: Path, tmp_path: Path) -> None:
    requests = read_prompts(prompt_files)
    assert [r.prompt for r in requests if r.tag == "color"] == ["a red bee and a blue key", "a tan cup"]
    assert [r.number for r in requests] == [0, 1] * 8
    (tmp_path / "3d_spatial_train.txt").write_text("\ufeffa dog behind a cat\tignored\n\n  a bee behind a cup \n")
    found = read_prompts(tmp_path / "3d_spatial_train.txt")
    assert [(r.tag, r.prompt) for r in found] == [
        ("3d_spatial", "a dog behind a cat"),
        ("3d_spatial", "a bee behind a cup"),
    ]
    complexes = tmp_path / "complex_val.txt"
    complexes.write_text("The hat was near the box.\nThe dog ran.\nBoth, near.\n")
    assert [r.kind for r in read_prompts(complexes)] == [None] * 3
    (tmp_path / "complex_val_spatial.txt").write_text("the HAT was near the box. \n")
    (tmp_path / "complex_val_action.txt").write_text("The dog ran\n")
    assert [r.kind for r in read_prompts(complexes)] == ["spatial", "action", None]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("color_val.txt", "", "color_val.txt is empty"),
        ("color_val.txt", " \n\t\n", "color_val.txt is empty"),
        ("color_val.txt", "a bee\n\na_bee", r"color_val.txt:3 has '_' in it: pictures are named"),
        ("color_val.txt", "a bee\na bee/cup", r"color_val.txt:2 has '/' in it"),
        ("color_val.txt", "a bee\n" + "é" * 111, r"color_val.txt:2 is longer than 220 bytes"),
        (
            "spatial_val.txt",
            "a bee near a cup\na bee above a cup",
            r"val.txt:2 is 'a bee above a cup': expected",
        ),
        ("3d_spatial_val.txt", "a bee near a cup", r"3d_spatial_val.txt:1 is .* in front of, behind, hidden by"),
        ("numeracy_val.txt", "two cups\nmany cups", r"numeracy_val.txt:2 is 'many cups': expected numbers"),
        ("colour_val.txt", "a bee", "its name tells no category"),
        ("color_val.txt", b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_lines_that_nobody_can_score(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_folders_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no file of T2I-CompBench's: expected color_val\.txt"):
        read_prompts(tmp_path)
    with pytest.raises(UserError, match=r"color_val\.txt: no such file or directory"):
        read_prompts(tmp_path / "color_val.txt")
