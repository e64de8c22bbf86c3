"""T2I-CompBench's prompt files: `color_val.txt` and so on, one prompt a line.

A picture's file is named after its prompt, and scorers read the prompt from there up to the first "_": so prompts
must be able to name a file. What the plain forms ask for is read here, so that a line that nobody can score is told
by its number before anything is drawn.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bittern.errors import UserError
from bittern.evaluation.compbench import rules

CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
SPLIT = "val"
_PER_FILE = 1_000_000  # prompt numbers of a category; no file is as long
_LONGEST = 220  # bytes of a prompt: names of files end at 255, and a name has more to it


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        index: its number among the prompts of all categories.
        tag: its category, one of `CATEGORIES`.
        prompt: what to draw.
        relation: what places ask for; None in other categories.
        counts: what numbers ask for, by singular; empty in other categories.
        kind: "spatial" or "action" for a complex prompt that tells of a place or an action only; None if of both, or
            if nobody said.
    """

    index: int
    tag: str
    prompt: str
    relation: rules.Relation | None = None
    counts: tuple[tuple[str, int], ...] = ()
    kind: str | None = None

    @property
    def number(self) -> int:
        """Its place in its file, from zero."""
        return self.index % _PER_FILE


def read_prompts(path: Path) -> list[Request]:
    """The prompts of a folder with the official files, or of one of them.

    Args:
        path: a folder with `color_val.txt` and so on, of which some may be missing; or a file whose name begins with
            its category. Beside `complex_val.txt` may lie `complex_val_spatial.txt` and `complex_val_action.txt`,
            which tell the prompts of places only and of actions only.

    Raises:
        UserError: if nothing can be read, a file is empty, or a line, named by its number, cannot be scored.
    """
    if path.is_dir():
        files = {category: path / f"{category}_{SPLIT}.txt" for category in CATEGORIES}
        files = {category: file for category, file in files.items() if file.exists()}
        if not files:
            raise UserError(
                f"--prompts {path} holds no file of T2I-CompBench's: expected color_{SPLIT}.txt and so on, of "
                f"{', '.join(CATEGORIES)}"
            )
    else:
        files = {_category(path): path}
    return [request for category, file in files.items() for request in _read_file(file, category)]


def _category(file: Path) -> str:
    fits = [each for each in CATEGORIES if file.stem == each or file.stem.startswith(f"{each}_")]
    if not fits:
        raise UserError(
            f"--prompts {file}: its name tells no category; expected one such as color_{SPLIT}.txt, of "
            f"{', '.join(CATEGORIES)}"
        )
    return fits[0]


def _read_file(file: Path, category: str) -> list[Request]:
    lines = _lines(file)
    if not lines:
        raise UserError(f"prompt file {file} is empty: expected a prompt a line, such as 'a green bench'")
    kinds = _kinds(file) if category == "complex" else {}
    return [
        request_of(line, category, index_of(category, index), f"{file}:{number}", kinds.get(_bare(line)))
        for index, (number, line) in enumerate(lines)
    ]


def _lines(file: Path) -> list[tuple[int, str]]:
    """The prompts of a file and their lines' numbers; what follows a tab is not meant to be drawn."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"prompt file {file}: {reason}; expected a file of T2I-CompBench's prompts") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {file} is not UTF-8 text: expected a prompt a line; fetch it again") from error
    lines = ((number, line.partition("\t")[0].strip()) for number, line in enumerate(text.split("\n"), start=1))
    return [(number, unicodedata.normalize("NFC", line)) for number, line in lines if line]


def _kinds(file: Path) -> dict[str, str]:
    """Which complex prompts tell of one thing only, by the files that lie beside theirs."""
    files = {kind: file.with_name(f"{file.stem}_{kind}.txt") for kind in ("action", "spatial")}
    if not any(each.exists() for each in files.values()):
        return {}
    return {_bare(line): kind for kind, each in files.items() for _, line in _lines(each)}


def _bare(prompt: str) -> str:
    return prompt.partition(".")[0].lower()


def request_of(prompt: str, category: str, index: int, where: str, kind: str | None = None) -> Request:
    """A prompt with what it asks for.

    Args:
        prompt: the text.
        category: one of `CATEGORIES`.
        index: the request's.
        where: what a message calls the prompt's line.
        kind: the request's.

    Raises:
        UserError: if it cannot name a file, or asks for nothing that its category scores.
    """
    wrong = next((sign for sign in "_/\\\0" if sign in prompt), None)
    if wrong is not None:
        raise UserError(f"{where} has {wrong!r} in it: pictures are named after their prompts; write it without")
    if len(prompt.encode()) > _LONGEST:
        raise UserError(f"{where} is longer than {_LONGEST} bytes: pictures are named after their prompts; shorten it")
    relation, counts = None, []
    if category in ("spatial", "3d_spatial"):
        words = rules.PLACES if category == "spatial" else rules.DEPTHS
        relation = rules.plain_relation(prompt, words)
        if relation is None:
            raise UserError(
                f"{where} is {prompt!r}: expected 'a dog {words[-2]} a cat', with one of {', '.join(words)}"
            )
    elif category == "numeracy":
        counts = rules.counts(prompt)
        if not counts:
            raise UserError(f"{where} is {prompt!r}: expected numbers up to eight of things, such as 'two birds'")
    return Request(index, category, prompt, relation, tuple(counts), kind)


def index_of(category: str, number: int) -> int:
    """The number of a category's prompt among those of all categories."""
    return CATEGORIES.index(category) * _PER_FILE + number


def told_kinds(requests: Sequence[Request]) -> bool:
    """Whether it is known which complex prompts tell of one thing only."""
    return any(request.kind for request in requests)
