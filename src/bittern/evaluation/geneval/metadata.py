"""GenEval's metadata: one JSON line a prompt, which says what a picture of it must show.

    {"tag": "colors", "include": [{"class": "apple", "count": 1, "color": "black"}], "prompt": "a photo of ..."}

`include` lists clauses that must all hold, `exclude` (in counting) clauses of which none may. A clause with a
`position` names a relation and the clause that it is relative to, counted from zero.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bittern.errors import UserError, did_you_mean
from bittern.evaluation.scenes import TASKS

# COCO's things in the order of their labels; some go by plainer names in GenEval's prompts.
OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

_KEYS = {"tag", "include", "exclude", "prompt"}
_CLAUSE_KEYS = {"class", "count", "color", "position"}
_EXAMPLE = '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}'


@dataclass(frozen=True)
class Clause:
    """So many objects of a class, of a colour and in a place where the prompt names them.

    Attributes:
        name: one of `OBJECTS`.
        count: how many.
        color: one of `COLORS`.
        position: one of `RELATIONS`, and the earlier clause that it is relative to.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Request:
    """One prompt and its conditions.

    Attributes:
        index: its line in the file, from zero; the number of its folder.
        tag: one of the six tasks.
        prompt: what to draw.
        include: what must be there.
        exclude: what must not be there so often.
        line: the JSON object as it was given, which goes beside the pictures.
    """

    index: int
    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    line: str


def read_metadata(path: str | Path) -> list[Request]:
    """The prompts of a metadata file; blank lines are skipped.

    Raises:
        UserError: if the file cannot be read or is empty, or a line, named by its number, is not in the official form.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"metadata file {path}: {reason}; expected GenEval's evaluation_metadata.jsonl") from error
    except UnicodeDecodeError as error:
        raise UserError(f"metadata file {path} is not UTF-8 text: expected JSON lines; fetch it again") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise UserError(f"metadata file {path} is empty: expected a line a prompt, such as {_EXAMPLE}")
    return [parse_line(line, f"{path}:{number}", index) for index, (number, line) in enumerate(filled)]


def parse_line(line: str, where: str, index: int) -> Request:
    """One line of metadata.

    Args:
        line: the JSON text.
        where: what a message calls it.
        index: the request's.

    Raises:
        UserError: if it is not in the official form.
    """
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): expected a line such as {_EXAMPLE}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object: expected a line such as {_EXAMPLE}")
    _check_keys(value, _KEYS, where)
    tag, prompt = value.get("tag"), value.get("prompt")
    if not isinstance(tag, str) or tag not in TASKS:
        raise UserError(f"{where} has the tag {tag!r}: {did_you_mean(str(tag), TASKS)}")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} has the prompt {prompt!r}: expected a text to draw; write one")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in prompt):  # JSON can write half of a letter
        raise UserError(f"{where} has the prompt {prompt!r}, which no UTF-8 text holds: mend its \\ud escapes")
    include = _clauses(value.get("include"), "include", where)
    exclude = _clauses(value["exclude"], "exclude", where) if "exclude" in value else ()
    return Request(index, tag, prompt, include, exclude, json.dumps(value))


def _check_keys(value: dict[str, Any], known: set[str], where: str) -> None:
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise UserError(f"{where} has the key {unknown!r}: {did_you_mean(unknown, known)}")


def _clauses(value: Any, key: str, where: str) -> tuple[Clause, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} has {key} {value!r}: expected a list of at least one object such as {_EXAMPLE}")
    return tuple(_clause(item, f"{where}, {key} {number}", number) for number, item in enumerate(value))


def _clause(value: Any, where: str, number: int) -> Clause:
    if not isinstance(value, dict):
        raise UserError(f'{where} is {value!r}: expected an object such as {{"class": "bench", "count": 1}}')
    _check_keys(value, _CLAUSE_KEYS, where)
    name, count, color = value.get("class"), value.get("count"), value.get("color")
    if not isinstance(name, str) or name not in OBJECTS:
        raise UserError(f"{where} has the class {name!r}: {_nearest(str(name))}")
    if type(count) is not int or count < 1:
        raise UserError(f"{where} has the count {count!r}: expected a whole number from 1 up")
    if color is not None and color not in COLORS:
        raise UserError(f"{where} has the color {color!r}: {did_you_mean(str(color), COLORS)}")
    return Clause(name, count, color, _position(value.get("position"), where, number))


def _position(value: Any, where: str, number: int) -> tuple[str, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or value[0] not in RELATIONS:
        raise UserError(f'{where} has the position {value!r}: expected one such as ["left of", 0], of {RELATIONS}')
    if type(value[1]) is not int or not 0 <= value[1] < number:
        raise UserError(f"{where} is placed by object {value[1]!r}: expected an earlier one, 0 to {number - 1}")
    return value[0], value[1]


def _nearest(name: str) -> str:
    hint = did_you_mean(name, OBJECTS)
    return hint.partition(" (known")[0] if "did you mean" in hint else "expected one of COCO's 80 as GenEval names them"
