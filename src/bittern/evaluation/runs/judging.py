"""Every picture is judged once, by any number of processes, and the judgement is kept beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bittern.errors import UserError
from bittern.evaluation import hosted
from bittern.evaluation.generate import read_metadata
from bittern.evaluation.runs import folder
from bittern.evaluation.runs.folder import Picture
from bittern.evaluation.shards import Shard
from bittern.evaluation.stats import Estimator, proportion
from bittern.evaluation.suites import Score
from bittern.quantization import Progress

_TOGETHER = 8  # pictures that are judged at once; batches are the same for any number of processes


@dataclass(frozen=True)
class Outcome:
    """What became of one picture: its prompt's task and text, and how well it shows it, 1 at most."""

    task: str
    prompt: str
    value: float


@dataclass(frozen=True)
class Judged:
    """A model's pictures and what became of them.

    Attributes:
        model: what drew them, if that is known.
        outcomes: of every picture, by the prompt's number and the sample's.
        made: how the first picture was made, as its file says.
        size: of the first picture, as "1024x1024"; None where it is not known.
        tasks: the suite's tasks in their order.
        estimate: the mean of a task's prompts and its error.
    """

    model: str | None
    outcomes: dict[tuple[int, int], Outcome]
    made: dict[str, str]
    size: str | None
    tasks: tuple[str, ...]
    estimate: Estimator = proportion

    @property
    def score(self) -> Score:
        """The mean over the pictures of every prompt, by task in the suite's order."""
        by_prompt: dict[int, list[Outcome]] = {}
        for (index, _), outcome in sorted(self.outcomes.items(), key=lambda item: item[0]):
            by_prompt.setdefault(index, []).append(outcome)
        tasks: dict[str, list[float]] = {task: [] for task in self.tasks}
        for each in by_prompt.values():
            tasks[each[0].task].append(sum(one.value for one in each) / len(each))
        return Score({task: values for task, values in tasks.items() if values}, self.estimate)


class Judge(ABC):
    """Finds out what pictures are worth, and remembers it beside them.

    Args:
        shard: this process's place among several that do the same.
        progress: called as pictures are judged.
        tasks: the suite's tasks in their order.
        estimate: the mean of a task's prompts and its error.
    """

    def __init__(
        self, shard: Shard, progress: Progress | None, tasks: tuple[str, ...], estimate: Estimator = proportion
    ) -> None:
        self._shard, self._progress = shard, progress
        self._tasks, self._estimate = tasks, estimate

    @property
    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Who judges, as JSON values: the version of the "rules", and a hash of each model by its option's name."""

    @abstractmethod
    def identity(self, request: Any) -> str:
        """A hash that changes with the models and rules that judge the pictures of a prompt."""

    @abstractmethod
    def judge(self, batch: Sequence[Picture[Any]], wanted: Sequence[bool]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Of the pictures of a batch that are wanted, size, as "1024x1024", and what to note about it, as JSON values.

        Low bits may depend on what goes through a network together: batches never change, whatever is known of them.
        """

    @abstractmethod
    def value(self, note: Mapping[str, Any]) -> float:
        """What a picture is worth, 1 at most, by what was noted."""

    @abstractmethod
    def tell(self, out: Path, told: Sequence[tuple[Picture[Any], Mapping[str, Any]]]) -> None:
        """Write the results of all pictures, in their order, into the run's folder."""

    def __call__(self, model: str | None, out: Path, pictures: Sequence[Picture[Any]]) -> Judged:
        """Judge what nothing is known of; the first process writes the results of all."""
        known = self._known(out)
        mine = self._shard.share([pictures[at : at + _TOGETHER] for at in range(0, len(pictures), _TOGETHER)])
        total, done = sum(map(len, mine)), 0
        notes = folder.Notes(out, self._shard.rank)
        try:
            for batch in mine:
                names = [self._name(picture) for picture in batch]
                new = [name for name in names if name not in known]
                judged = self.judge(batch, [name not in known for name in names]) if new else ()
                for (prompt, sample, digest, identity), (size, note) in zip(new, judged, strict=True):
                    about = {"prompt": prompt, "sample": sample, "picture": digest, "judge": identity, "size": size}
                    notes.add(about | note)
                done += len(batch)
                if self._progress and self._shard.first:
                    self._progress("judging", done, total)
        finally:
            notes.close()
        self._shard.wait()
        known = self._known(out)
        told = [(picture, known[self._name(picture)]) for picture in pictures]
        if self._shard.first:
            # A kill leaves results without a judge, which nobody compares, and never those of another one.
            folder.tell_judge(out, None)
            self.tell(out, told)
            folder.tell_judge(out, self.about)
        outcomes = {
            picture.key: Outcome(picture.request.tag, picture.request.prompt, self.value(note))
            for picture, note in told
        }
        made = read_metadata(pictures[0].file)
        return Judged(model, outcomes, made, told[0][1]["size"], self._tasks, self._estimate)

    def finished(
        self, folder_name: str, known: Mapping[tuple[int, int], Outcome], found: Judged, first: Picture[Any]
    ) -> Judged:
        """What a finished run says of the pictures that were judged now.

        Args:
            folder_name: the finished run's folder.
            known: what became of its pictures.
            found: what was judged now.
            first: the first picture that was judged now.

        Raises:
            UserError: if it lacks one of them, or drew another prompt.
        """
        outcomes: dict[tuple[int, int], Outcome] = {}
        for key, outcome in found.outcomes.items():
            if key not in known:
                raise UserError(
                    f"--reference {folder_name} has no verdict on sample {key[1]} of prompt {key[0]}: finish that run"
                )
            before = known[key]
            if before.prompt != outcome.prompt:
                raise UserError(
                    f"--reference {folder_name} drew {before.prompt!r} as prompt {key[0]} and not {outcome.prompt!r}: "
                    "give a run of it"
                )
            outcomes[key] = replace(outcome, value=before.value)
        place = finished_picture(folder_name, first)
        size, made = (size_of(place), read_metadata(place)) if place.is_file() else (None, {})
        return Judged(folder_name, outcomes, made, size, self._tasks, self._estimate)

    def _name(self, picture: Picture[Any]) -> tuple[int, int, str, str]:
        return (*picture.key, folder.picture_hash(picture.file), self.identity(picture.request))

    def _known(self, out: Path) -> dict[tuple[int, int, str, str], dict[str, Any]]:
        return {(n["prompt"], n["sample"], n["picture"], n["judge"]): n for n in folder.read_notes(out)}


def finished_picture(folder_name: str, picture: Picture[Any]) -> Path:
    """Where a finished run has a picture, if it still has it."""
    return Path(folder_name).expanduser() / picture.name


def size_of(picture: Path) -> str:
    """A picture's size, as "1024x1024"."""
    image = hosted.open_rgb(picture)
    return f"{image.width}x{image.height}"
