"""Verdicts: reached once a picture, kept beside it, told as GenEval's own scorer tells them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.evaluation import clip, hosted
from bittern.evaluation.geneval import colors, detector, rules
from bittern.evaluation.geneval.metadata import OBJECTS, Request
from bittern.evaluation.runs.folder import RESULTS, Picture, hash_of
from bittern.evaluation.runs.judging import Judge
from bittern.evaluation.scenes import TASKS
from bittern.evaluation.shards import Shard
from bittern.outputs import write_text
from bittern.quantization import Progress

if TYPE_CHECKING:
    from PIL import Image

_RULES = 1  # counts changes of what a verdict means; older verdicts are reached again


class GenEvalJudge(Judge):
    """Finds out which pictures are right by GenEval's rules.

    Raises:
        UserError: for a detector or CLIP that is not here, or a model of another kind.
    """

    def __init__(
        self,
        detector_model: str,
        clip_model: str,
        requests: Sequence[Request],
        shard: Shard,
        device: str,
        progress: Progress | None,
    ) -> None:
        super().__init__(shard, progress, tuple(TASKS))
        self.needs_colors = any(clause.color for request in requests for clause in request.include)
        self._detector_folder = hosted.locate(detector_model, "--detector")
        self._clip_folder = clip.locate(clip_model) if self.needs_colors else None
        self._detector: detector.Detector | None = None
        self._namer: colors.ColorNamer | None = None
        self._device = shard.device(device)
        self._models = {
            name: hosted.identity(each)
            for name, each in (("detector", self._detector_folder), ("clip", self._clip_folder))
            if each
        }
        self._identity = hash_of([str(_RULES), *self._models.values()])
        known = detector.known_labels(self._detector_folder).values()
        self.unknown = [name for name in OBJECTS if name not in known]

    @property
    def about(self) -> dict[str, Any]:
        """The rules, the detector and, where a prompt names a colour, the colour namer."""
        return {"rules": _RULES, **self._models}

    def identity(self, request: Request) -> str:
        """One hash for all prompts: of the rules, the detector and the colour namer."""
        return self._identity

    def judge(self, batch: Sequence[Picture[Request]], wanted: Sequence[bool]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Whether pictures are right, why not, and the objects in them; the detector sees a batch as a whole."""
        if self._detector is None:
            self._detector = detector.Detector.load(self._detector_folder, self._device)
        images = [hosted.open_rgb(picture.file) for picture in batch]
        found = self._detector.find(images)
        for picture, image, seen, want in zip(batch, images, found, wanted, strict=True):
            if want:
                note = self._note(picture.request, image, rules.keep(seen, picture.request.tag))
                yield f"{image.width}x{image.height}", note

    def _note(self, request: Request, image: Image.Image, objects: rules.Objects) -> dict[str, Any]:
        def name_colors(name: str, found: Sequence[rules.Detection]) -> list[str]:
            if self._namer is None:
                assert self._clip_folder is not None
                self._namer = colors.ColorNamer(clip.Clip.load(self._clip_folder, self._device))
            return self._namer(image, name, found)

        verdict = rules.judge(request, objects, name_colors)
        return {
            "correct": verdict.correct,
            "reason": verdict.reason,
            "details": {name: [[*one.box, one.score] for one in ones] for name, ones in objects.items()},
        }

    def value(self, note: Mapping[str, Any]) -> float:
        """1 for a picture that is right."""
        return float(note["correct"])

    def tell(self, out: Path, told: Sequence[tuple[Picture[Request], Mapping[str, Any]]]) -> None:
        """Write the results file that GenEval's own summary reads."""
        rows = [json.dumps(_official(picture, note)) for picture, note in told]
        write_text("".join(row + "\n" for row in rows), out / RESULTS, "results")


def _official(picture: Picture[Request], note: Mapping[str, Any]) -> dict[str, Any]:
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
