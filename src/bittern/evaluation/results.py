"""What `bittern evaluate --suite geneval` left in folders, for a report that shows the same models.

A run says in its folder which weights drew: a model of the report is told by them, whatever its folder is called now.
Runs are only put beside each other where they drew the same prompts from the same noise and one detector judged them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bittern.errors import UserError
from bittern.evaluation.geneval.layout import read_results
from bittern.evaluation.runs import folder
from bittern.evaluation.runs.alike import check_alike, judge_of
from bittern.evaluation.runs.course import REFERENCE, model_identity
from bittern.evaluation.runs.judging import Judged
from bittern.evaluation.scenes import TASKS

OPTION = "--results"


@dataclass(frozen=True)
class Finished:
    """A finished run: where it lies, what it was about, its verdicts, and who reached them."""

    folder: Path
    run: dict[str, Any]
    judged: Judged
    judge: dict[str, Any]

    @property
    def weights(self) -> str:
        """What tells the weights that drew."""
        return str(self.run["model"]).rpartition(" ")[2]


def read(place: Path) -> Finished:
    """A finished run from its folder.

    Raises:
        UserError: if it is none, has not finished, or judged pictures that no model of ours drew.
    """
    run = folder.read_run(place)
    if run is None or run["suite"] != "geneval":
        raise UserError(f"{OPTION} {place} holds no GenEval run: expected the --out of `bittern evaluate`")
    if "model" not in run:
        raise UserError(f"{OPTION} {place} judged pictures of an unknown model: expected a run that drew its own")
    if not (place / folder.RESULTS).is_file():
        raise UserError(f"{OPTION} {place} has not finished: give its command again, it goes on where it stood")
    name = str(run["model"]).rpartition(" ")[0]
    judge = judge_of(place, OPTION)
    return Finished(place, run, Judged(name, read_results(place), {}, None, tuple(TASKS)), judge)


def gather(places: Sequence[Path], models: Sequence[Any]) -> list[Finished | None]:
    """The run of each model, None where there is none; a run's own reference is found beside it.

    Args:
        places: folders of finished runs.
        models: names, folders, hub ids; a pipeline that is already loaded has no runs.

    Raises:
        UserError: for a folder that is no finished run, a run of a model that is not among these, two runs of one, or
            runs that cannot be compared.
    """
    if not places:
        return [None] * len(models)
    places = [place.expanduser() for place in places]
    known = [model_identity(model).rpartition(" ")[2] if isinstance(model, str) else None for model in models]
    found: dict[str, Finished] = {}
    for run in map(read, places):
        if run.weights not in known:
            raise UserError(
                f"{OPTION} {run.folder} is a run of {run.judged.model}, with weights that no compared model has: "
                "compare that model, too, or leave the folder out"
            )
        before = found.setdefault(run.weights, run)
        if before is not run:
            raise UserError(f"{OPTION} {before.folder} and {run.folder} are runs of one model: leave one out")
    for place in places:
        if (place / REFERENCE / folder.RESULTS).is_file():
            beside = read(place / REFERENCE)
            if beside.weights in known:
                found.setdefault(beside.weights, beside)
    first, *others = found.values()
    for run in others:
        check_alike(f"{OPTION} {run.folder}", run.run, run.judge, str(first.folder), first.run, first.judge)
        if run.judged.outcomes.keys() != first.judged.outcomes.keys():
            raise UserError(
                f"{OPTION} {run.folder} has verdicts on other pictures than {first.folder}: give its command again"
            )
    return [found.get(weights or "") for weights in known]
