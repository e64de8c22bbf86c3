"""Files of prompts: plain text with one prompt a line, or JSON lines with a `prompt` key (GenEval's metadata fits)."""

from __future__ import annotations

import json
from pathlib import Path

from bittern.errors import UserError


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a `.txt` or `.jsonl` file; blank lines are skipped.

    Raises:
        UserError: if the file is missing, not text, empty, or a JSON line has no prompt.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
    return prompt.strip()
