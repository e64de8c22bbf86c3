"""Prompts to calibrate with and to draw: the bundled ones, and files.

Files are plain text with one prompt a line, or JSON lines with a `prompt` key (GenEval's metadata fits).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from bittern.errors import UserError

OWN_PROMPTS = "calibration_prompts.txt"
"""A file in a pipeline's folder with the prompts it is best calibrated with."""

_HALF = "holds half of a surrogate pair, which is no character: expected whole ones; mend the escapes"


def default_prompts(folder: str | Path | None = None) -> list[str]:
    """The prompts to calibrate with where the user names none.

    A pipeline's own, if its folder has the file `calibration_prompts.txt`: a model of a small world knows few words,
    and must not be calibrated with what it is evaluated on. Otherwise 256 of ours, half of them in the forms of
    GenEval's tasks and half long descriptions; they are taken from no published set.

    Args:
        folder: Where the pipeline came from, if it came from a folder.
    """
    own = Path(folder) / OWN_PROMPTS if folder else None
    if own is not None and own.is_file():
        return read_prompts(own)
    text = resources.files("bittern.trajectories").joinpath("prompts.txt").read_text(encoding="utf-8")
    return text.splitlines()


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list, if they are usable.

    Raises:
        UserError: if there is none, if one is blank, no text or holds half a character, or a single text was given in
            place of a list.
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts {prompts[:40]!r} is one text: expected a list of them; put it in brackets")
    if not prompts:
        raise UserError("no prompts: expected at least one; leave them out for the bundled ones")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"prompt {index + 1} is {prompt!r}: expected a text to draw; fill it in or leave it out")
        if not _is_text(prompt):
            raise UserError(f"prompt {index + 1} {prompt!r} {_HALF}")
    return list(prompts)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a `.txt` or `.jsonl` file; blank lines are skipped.

    Raises:
        UserError: if the file is missing, not text, empty, or a JSON line has no prompt or half a character.
    """
    path = Path(path)
    try:
        # Only line feeds end a line: JSON allows other separators inside a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(
            f"prompts file {path}: {(error.strerror or str(error)).lower()}; expected a .txt or .jsonl file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompts file {path} is not UTF-8 text; save it as .txt or .jsonl in UTF-8") from error
    parse = _json_line if path.suffix == ".jsonl" else _plain_line
    prompts = [parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UserError(f"prompts file {path} is empty: expected one prompt a line; add some")
    return prompts


def _plain_line(line: str, where: str) -> str:
    return line.strip()


def _json_line(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f'{where} is not JSON ({error.msg}); expected a line such as {{"prompt": "a red star"}}'
        ) from error
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{where} has no prompt; expected a line such as {{"prompt": "a red star"}}')
    if not _is_text(prompt):
        raise UserError(f"{where}: prompt {prompt!r} {_HALF}")
    return prompt.strip()


def _is_text(prompt: str) -> bool:
    """Whether UTF-8 has it: JSON can spell half of a character that takes two."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True
