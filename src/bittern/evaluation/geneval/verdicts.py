"""Verdicts: reached once a picture, kept beside it, told as GenEval's own scorer tells them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.errors import UserError
from bittern.evaluation import hosted
from bittern.evaluation.clip import OPTION, Clip
from bittern.evaluation.generate import read_metadata
from bittern.evaluation.geneval import colors, detector, folder, rules
from bittern.evaluation.geneval.folder import Picture
from bittern.evaluation.geneval.metadata import OBJECTS, Request
from bittern.evaluation.scenes import TASKS
from bittern.evaluation.shards import Shard
from bittern.evaluation.suites import Score
from bittern.outputs import write_text
from bittern.quantization import Progress

if TYPE_CHECKING:
    from PIL import Image

_RULES = 1  # counts changes of what a verdict means; older verdicts are reached again
_TOGETHER = 8  # pictures that the detector sees at once; batches are the same for any number of processes


@dataclass(frozen=True)
class Judged:
    """A model's pictures and their verdicts.

    Attributes:
        model: what drew them, if that is known.
        outcomes: of every picture, by the prompt's number and the sample's: the prompt's task and text, and whether
            the picture shows it.
        made: how the first picture was made, as its file says.
        size: of the first picture, as "1024x1024"; None where it is not known.
    """

    model: str | None
    outcomes: dict[tuple[int, int], tuple[str, str, bool]]
    made: dict[str, str]
    size: str | None

    @property
    def score(self) -> Score:
        """The share of right pictures of every prompt, by task in GenEval's order."""
        by_prompt: dict[int, list[bool]] = {}
        tags = {index: tag for (index, _), (tag, _, _) in self.outcomes.items()}
        for (index, _), (_, _, right) in sorted(self.outcomes.items()):
            by_prompt.setdefault(index, []).append(right)
        shares = {index: sum(each) / len(each) for index, each in by_prompt.items()}
        tasks = {task: [shares[index] for index in shares if tags[index] == task] for task in TASKS}
        return Score({task: values for task, values in tasks.items() if values})

    @property
    def right_pictures(self) -> int:
        """Number of pictures that show what was asked."""
        return sum(right for _, _, right in self.outcomes.values())

    @property
    def right_prompts(self) -> int:
        """Number of prompts of which at least one picture shows what was asked."""
        return len({index for (index, _), (_, _, right) in self.outcomes.items() if right})


class Judge:
    """Finds out which pictures are right, and remembers it beside them."""

    def __init__(
        self,
        detector_model: str,
        clip_model: str,
        requests: Sequence[Request],
        shard: Shard,
        device: str,
        progress: Progress | None,
    ) -> None:
        self.needs_colors = any(clause.color for request in requests for clause in request.include)
        self._detector_folder = hosted.locate(detector_model, "--detector")
        self._clip_folder = hosted.locate(clip_model, OPTION) if self.needs_colors else None
        self._detector: detector.Detector | None = None
        self._namer: colors.ColorNamer | None = None
        self._device = shard.device(device)
        self._shard, self._progress = shard, progress
        parts = [hosted.identity(each) for each in (self._detector_folder, self._clip_folder) if each]
        self._identity = hash_of([str(_RULES), *parts])
        known = detector.known_labels(self._detector_folder).values()
        self.unknown = [name for name in OBJECTS if name not in known]

    def __call__(self, model: str | None, out: Path, pictures: Sequence[Picture]) -> Judged:
        """Judge what no verdict is known of; the first process writes the results of all."""
        known = self._known(out)
        mine = self._shard.share([pictures[at : at + _TOGETHER] for at in range(0, len(pictures), _TOGETHER)])
        total, done = sum(map(len, mine)), 0
        notes = folder.Notes(out, self._shard.rank)
        try:
            for batch in mine:
                digests = [folder.picture_hash(picture.file) for picture in batch]
                new = [(*p.key, digest) not in known for p, digest in zip(batch, digests, strict=True)]
                if any(new):
                    for note in self._verdicts(batch, digests, new):
                        notes.add(note)
                done += len(batch)
                if self._progress and self._shard.first:
                    self._progress("judging", done, total)
        finally:
            notes.close()
        self._shard.wait()
        known = self._known(out)
        told = [known[(*picture.key, folder.picture_hash(picture.file))] for picture in pictures]
        if self._shard.first:
            rows = [json.dumps(_official(picture, note)) for picture, note in zip(pictures, told, strict=True)]
            write_text("".join(row + "\n" for row in rows), out / folder.RESULTS, "results")
        outcomes = {
            picture.key: (picture.request.tag, picture.request.prompt, bool(note["correct"]))
            for picture, note in zip(pictures, told, strict=True)
        }
        return Judged(model, outcomes, read_metadata(pictures[0].file), told[0]["size"])

    def _known(self, out: Path) -> dict[tuple[int, int, str], dict[str, Any]]:
        """The verdicts that were reached by the same models on the same files."""
        notes = folder.read_notes(out)
        return {(n["prompt"], n["sample"], n["picture"]): n for n in notes if n["judge"] == self._identity}

    def _verdicts(
        self, batch: Sequence[Picture], digests: Sequence[str], new: Sequence[bool]
    ) -> Iterator[dict[str, Any]]:
        """Notes on the new pictures of a batch, which the detector sees as a whole whatever is known of it."""
        if self._detector is None:
            self._detector = detector.Detector.load(self._detector_folder, self._device)
        images = [hosted.open_rgb(picture.file) for picture in batch]
        found = self._detector.find(images)
        for picture, digest, image, seen, wanted in zip(batch, digests, images, found, new, strict=True):
            if wanted:
                yield self._note(picture, digest, image, rules.keep(seen, picture.request.tag))

    def _note(self, picture: Picture, digest: str, image: Image.Image, objects: rules.Objects) -> dict[str, Any]:
        def name_colors(name: str, found: Sequence[rules.Detection]) -> list[str]:
            if self._namer is None:
                assert self._clip_folder is not None
                self._namer = colors.ColorNamer(Clip.load(self._clip_folder, self._device))
            return self._namer(image, name, found)

        verdict = rules.judge(picture.request, objects, name_colors)
        return {
            "prompt": picture.request.index,
            "sample": picture.sample,
            "picture": digest,
            "judge": self._identity,
            "size": f"{image.width}x{image.height}",
            "correct": verdict.correct,
            "reason": verdict.reason,
            "details": {name: [[*one.box, one.score] for one in ones] for name, ones in objects.items()},
        }


def _official(picture: Picture, note: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the results file that GenEval's own summary reads."""
    return {
        "filename": picture.name,
        "tag": picture.request.tag,
        "prompt": picture.request.prompt,
        "correct": note["correct"],
        "reason": note["reason"],
        "metadata": picture.request.line,
        "details": json.dumps(note["details"]),
    }


def finished_run(reference: str | None) -> dict[tuple[int, int], tuple[str, str, bool]] | None:
    """The verdicts of a reference that is a finished run's folder; None for a model."""
    place = None if reference is None else Path(reference).expanduser()
    if place is None or not (place / folder.RESULTS).is_file():
        return None
    return folder.read_results(place)


def of_finished_run(
    reference: str | None,
    finished: Mapping[tuple[int, int], tuple[str, str, bool]],
    requests: Sequence[Request],
    found: Judged,
) -> Judged:
    """A finished run's verdicts of the pictures that were judged now."""
    tags = {request.index: request.tag for request in requests}
    outcomes: dict[tuple[int, int], tuple[str, str, bool]] = {}
    for key, (_, prompt, _) in found.outcomes.items():
        if key not in finished:
            raise UserError(
                f"--reference {reference} has no verdict on sample {key[1]} of prompt {key[0]}: finish that run"
            )
        _, text, right = finished[key]
        if text != prompt:
            raise UserError(
                f"--reference {reference} drew {text!r} as prompt {key[0]} and not {prompt!r}: give a run of it"
            )
        outcomes[key] = (tags[key[0]], text, right)
    first = first_picture(reference, requests)
    known = first.is_file()
    return Judged(reference, outcomes, read_metadata(first) if known else {}, size_of(first) if known else None)


def first_picture(reference: str | None, requests: Sequence[Request]) -> Path:
    """Where a finished run has its first picture, if it still has it."""
    return Path(reference or "").expanduser() / f"{requests[0].index:05d}" / "samples" / "0000.png"


def size_of(picture: Path) -> str:
    """A picture's size, as "1024x1024"."""
    image = hosted.open_rgb(picture)
    return f"{image.width}x{image.height}"


def hash_of(texts: Iterable[str]) -> str:
    """A short hash of some texts in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
