from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bittern.errors import UserError
from bittern.evaluation.geneval.metadata import COLORS, OBJECTS, Clause, read_metadata
from bittern.evaluation.runs.course import choose

GOOD = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}


def test_the_file_has_the_published_numbers_of_prompts(metadata_file: Path) -> None:
    requests = read_metadata(metadata_file)
    tags = [request.tag for request in requests]
    numbers = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert {tag: tags.count(tag) for tag in tags} == numbers
    assert [request.index for request in requests] == list(range(553))
    lines = metadata_file.read_text().splitlines()
    for request, line in zip(requests, lines, strict=True):
        assert json.loads(request.line) == json.loads(line)
        assert len(request.exclude) == (request.tag == "counting")
        assert sum(clause.position is not None for clause in request.include) == (request.tag == "position")
        named = sum(clause.color is not None for clause in request.include)
        assert named == {"colors": 1, "color_attr": 2}.get(request.tag, 0)


def test_names_and_colours() -> None:
    assert len(OBJECTS) == len(set(OBJECTS)) == 80 and len(set(COLORS)) == 10
    # Places in COCO's order of labels.
    assert [OBJECTS.index(name) for name in ("person", "bench", "computer mouse", "toothbrush")] == [0, 13, 64, 79]


def test_a_line_with_everything(tmp_path: Path) -> None:
    line = {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 2, "color": "red"},
            {"class": "dog", "count": 1, "position": ["above", 0]},
        ],
        "exclude": [{"class": "cat", "count": 3}],
        "prompt": "a dog above two red cats",
    }  # fmt: skip
    (tmp_path / "m.jsonl").write_text(f"\n{json.dumps(line)}\n\n")
    (request,) = read_metadata(tmp_path / "m.jsonl")
    assert request.include == (Clause("cat", 2, "red"), Clause("dog", 1, None, ("above", 0)))
    assert request.exclude == (Clause("cat", 3),) and request.index == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "single"}, "tag 'single': did you mean 'single_object'"),
        ({"tag": None}, "tag None"),
        ({"prompt": " "}, "prompt ' ': expected a text"),
        ({"include": []}, r"include []: expected a list"),
        ({"include": None}, "include None"),
        ({"include": ["dog"]}, "include 0 is 'dog'"),
        ({"includ": []}, "key 'includ': did you mean 'include'"),
        ({"include": [{"class": "banch", "count": 1}]}, "class 'banch': did you mean 'bench'"),
        ({"include": [{"class": "xyzzy", "count": 1}]}, "class 'xyzzy': expected one of COCO's 80"),
        ({"include": [{"class": "dog"}]}, "count None: expected a whole number"),
        ({"include": [{"class": "dog", "count": 0}]}, "count 0"),
        ({"include": [{"class": "dog", "count": True}]}, "count True"),
        ({"include": [{"class": "dog", "count": 1, "color": "grey"}]}, "color 'grey'"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left", 0]}]}, "position ['left', 0]"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "placed by object 0"),
        ({"include": [{"class": "dog", "count": 1, "colour": "red"}]}, "include 0 has the key 'colour': did you mean"),
        ({"exclude": [{"class": "dog", "counts": 2}]}, "exclude 0 has the key 'counts': did you mean 'count'"),
        ({"prompt": "a \ud800 dog"}, r"prompt 'a \ud800 dog', which no UTF-8 text holds"),
        ({"exclude": [{"class": "dog", "count": -1}]}, "exclude 0 has the count -1"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(change: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD | change)}\n")
    with pytest.raises(UserError, match=re.escape(f"{file}:3") + ".*" + re.escape(message)):
        read_metadata(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\n \n", "is empty"), (b"[1]\n", ":1 is no JSON object"), (b"{\n", ":1 is not JSON"),
     (b"\xff\xfe", "not UTF-8")],
)  # fmt: skip
def test_files_that_are_no_metadata(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_metadata(tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_metadata(tmp_path / "nowhere.jsonl")


def test_a_limit_takes_the_tasks_in_turn(metadata_file: Path) -> None:
    requests = read_metadata(metadata_file)
    assert choose(requests, None) == choose(requests, 1000) == requests
    few = choose(requests, 15)
    tags = [request.tag for request in few]
    assert sorted(tags.count(tag) for tag in set(tags)) == [2, 2, 2, 3, 3, 3]
    assert [request.index for request in few] == sorted(request.index for request in few)
    assert few[0].index == 0 and few[-1].tag == "color_attr"
    with pytest.raises(UserError, match="limit 5 leaves tasks"):
        choose(requests, 5)
