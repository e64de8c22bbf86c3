"""Which runs may be held against each other: the same prompts, the same noise, the same judge.

A paired difference takes both pictures of a pair to differ by their model alone. A run's folder says what it drew and
who judged it; whoever puts two runs beside each other asks here first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bittern.errors import UserError
from bittern.evaluation.runs import folder

_ASKED = {"suite": "suite", "metadata": "set of prompts", "prompts": "set of prompts"}
# What pictures that were given do not tell.
_NOISE = {"images_per_prompt": "number of pictures a prompt", "seed": "seed", "steps": "number of steps"}


def judge_of(place: Path, option: str) -> dict[str, Any]:
    """Who reached the results of a finished run.

    Raises:
        UserError: if its folder does not say, since it was killed while it wrote them, or an older version wrote them.
    """
    judge = folder.read_judge(place)
    if judge is None:
        raise UserError(
            f"{option} {place} does not say who judged its pictures: give its command again, which draws none again"
        )
    return judge


def check_alike(
    name: str,
    run: Mapping[str, Any],
    judge: Mapping[str, Any],
    other_name: str,
    other: Mapping[str, Any],
    other_judge: Mapping[str, Any],
) -> None:
    """Refuses two runs whose pictures differ by more than the model that drew them.

    Args:
        name: what a message calls the first run.
        run: what it is about, as its folder says.
        judge: who judged it.
        other_name: what a message calls the other.
        other: what that is about.
        other_judge: who judged that.

    Raises:
        UserError: for another suite, set of prompts, number of pictures a prompt, seed, number of steps, detector, or
            whatever else judges. Noise is compared where both were drawn.
    """
    drawn = "model" in run and "model" in other
    for key, what in (_ASKED | _NOISE if drawn else _ASKED).items():
        if run.get(key) != other.get(key):
            told = f" ({run.get(key)!r} and not {other.get(key)!r})" if key in _NOISE else ""
            raise UserError(
                f"{name} has another {what} than {other_name}{told}: expected runs of one command, but for the model"
            )
    for key in dict.fromkeys([*judge, *other_judge]):
        if judge.get(key) != other_judge.get(key):
            what = "other rules" if key == "rules" else f"another {key}"
            raise UserError(f"{name} was judged by {what} than {other_name}: judge one of them again")
