"""What a picture is worth in its category: the models that look, brought together with the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.evaluation import clip, hosted
from bittern.evaluation.compbench import blip, depth, detector, layout, phrases, rules
from bittern.evaluation.compbench.prompts import CATEGORIES, Request
from bittern.evaluation.geneval.rules import Detection
from bittern.evaluation.runs.folder import Picture, hash_of
from bittern.evaluation.runs.judging import Judge
from bittern.evaluation.shards import Shard
from bittern.evaluation.stats import mean_estimate
from bittern.quantization import Progress

if TYPE_CHECKING:
    from PIL import Image

_RULES = 1  # counts changes of what a score means; older ones are reached again
_NEEDS = {
    "color": ("blip", "parser"),
    "shape": ("blip", "parser"),
    "texture": ("blip", "parser"),
    "spatial": ("detector",),
    "3d_spatial": ("detector", "depth"),
    "numeracy": ("detector",),
    "non_spatial": ("clip",),
    "complex": ("blip", "parser", "detector", "clip"),
}
NOT_COMPARABLE = tuple(category for category, needs in _NEEDS.items() if "detector" in needs)
"""Categories whose scores rest on another detector than the published ones, and compare among themselves only."""


@dataclass(frozen=True)
class Models:
    """Folders or hub ids of the models that look at pictures; the CLIP is that of the published scorer."""

    blip: str = blip.DEFAULT
    clip: str = "openai/clip-vit-base-patch32"
    detector: str = detector.DEFAULT
    depth: str = depth.DEFAULT


_KINDS = {"blip": "blip", "clip": "clip", "detector": "owlv2"}


class CompBenchJudge(Judge):
    """Finds out what pictures are worth by T2I-CompBench's rules.

    Args:
        models: what looks at pictures.
        requests: the prompts; what none of them needs is not asked for.
        shard: this process's place among several that do the same.
        device: where the models run.
        progress: called as pictures are judged.
        parser: parses prompts; spaCy by default, where a prompt needs parsing.

    Raises:
        UserError: for a model or parser that is not here, or of another kind.
    """

    def __init__(
        self,
        models: Models,
        requests: Sequence[Request],
        shard: Shard,
        device: str,
        progress: Progress | None,
        parser: phrases.Parser | None = None,
    ) -> None:
        super().__init__(shard, progress, CATEGORIES, mean_estimate)
        needed = {need for request in requests for need in _NEEDS[request.tag]}
        self.models = {f.name: str(getattr(models, f.name)) for f in fields(models) if f.name in needed}
        self._folders: dict[str, Path] = {}
        for name, model in self.models.items():
            self._folders[name] = hosted.locate(model, f"--{name}")
            if name in _KINDS:
                hosted.check_kind(self._folders[name], f"--{name}", (_KINDS[name],), getattr(Models(), name))
            else:
                depth.check_kind(self._folders[name])
        self._parser = (parser or phrases.load()) if "parser" in needed else None
        self._device = shard.device(device)
        identities = {name: hosted.identity(folder) for name, folder in self._folders.items()}
        if self._parser is not None:
            identities["parser"] = self._parser.identity
        self._about: dict[str, Any] = {"rules": _RULES, **identities}
        self._identities = {
            tag: hash_of([str(_RULES), *(identities[need] for need in _NEEDS[tag])])
            for tag in dict.fromkeys(request.tag for request in requests)
        }
        self._parsed: dict[str, phrases.Parsed] = {}

    @property
    def parser(self) -> str | None:
        """What parses prompts, if something does."""
        return self._parser and self._parser.identity

    @property
    def about(self) -> dict[str, Any]:
        """The rules, the models that some prompt needs, and the parser."""
        return self._about

    def identity(self, request: Request) -> str:
        """A hash of what scores the prompt's category, and of how a complex prompt is scored."""
        return self._identities[request.tag] + (f"-{request.kind}" if request.kind else "")

    def judge(self, batch: Sequence[Picture[Request]], wanted: Sequence[bool]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The scores of pictures, their parts, and what was seen; each is looked at by itself."""
        for picture in compress(batch, wanted):
            image = hosted.open_rgb(picture.file)
            yield f"{image.width}x{image.height}", self._note(image, picture.request)

    def _note(self, image: Image.Image, request: Request) -> dict[str, Any]:
        looks: dict[str, Callable[[Image.Image, Request, dict[str, Any]], dict[str, float]]] = {
            "spatial": self._spatial,
            "3d_spatial": self._in_depth,
            "numeracy": self._numeracy,
            "non_spatial": self._cosine,
            "complex": self._complex,
        }
        details: dict[str, Any] = {}
        scores = looks.get(request.tag, self._answers)(image, request, details)
        score = list(scores.values())[-1]
        return {"score": score, "scores": scores, "details": details}

    def value(self, note: Mapping[str, Any]) -> float:
        """A picture's score."""
        return float(note["score"])

    def tell(self, out: Path, told: Sequence[tuple[Picture[Request], Mapping[str, Any]]]) -> None:
        """Write the official results files, and one of all."""
        layout.write_results(out, told)

    def _parse(self, prompt: str) -> phrases.Parsed:
        if prompt not in self._parsed:
            assert self._parser is not None
            self._parsed[prompt] = self._parser(prompt)
        return self._parsed[prompt]

    def _answers(self, image: Image.Image, request: Request, details: dict[str, Any]) -> dict[str, float]:
        asked = rules.question_phrases(self._parse(request.prompt).phrases)
        shares = self._blip.yes(image, [rules.question(phrase) for phrase in asked])
        details["questions"] = [[rules.question(phrase), share] for phrase, share in zip(asked, shares, strict=True)]
        return {"blip": rules.blip_score(shares)}

    def _spatial(self, image: Image.Image, request: Request, details: dict[str, Any]) -> dict[str, float]:
        relation = request.relation
        found = [] if relation is None else self._look(image, (relation.first, relation.second), details)
        return {"spatial": rules.spatial(relation, found)}

    def _in_depth(self, image: Image.Image, request: Request, details: dict[str, Any]) -> dict[str, float]:
        relation = request.relation
        assert relation is not None
        found = self._look(image, (relation.first, relation.second), details)
        return {"3d_spatial": rules.spatial(relation, found, lambda: self._depth(image))}

    def _numeracy(self, image: Image.Image, request: Request, details: dict[str, Any]) -> dict[str, float]:
        found = self._look(image, [rules.counted_name(name) for name, _ in request.counts], details)
        return {"numeracy": rules.numeracy(request.counts, found)}

    def _cosine(self, image: Image.Image, request: Request, _: dict[str, Any]) -> dict[str, float]:
        return {"clip": self._similarity(image, request.prompt)}

    def _complex(self, image: Image.Image, request: Request, details: dict[str, Any]) -> dict[str, float]:
        parsed = self._parse(request.prompt)
        scores = self._answers(image, request, details)
        relation = rules.complex_relation(request.prompt, parsed.words)
        found = [] if relation is None else self._look(image, (relation.first, relation.second), details)
        scores["spatial"] = rules.spatial(relation, found)
        scores["clip"] = self._similarity(image, rules.without_adjectives(parsed.words))
        scores["3_in_1"] = rules.three_in_one(request.kind, scores["blip"], scores["spatial"], scores["clip"])
        return scores

    def _look(self, image: Image.Image, names: Iterable[str], details: dict[str, Any]) -> list[Detection]:
        found = self._detector(image, list(names))
        details["objects"] = [[one.name, *one.box, one.score] for one in found]
        return found

    def _similarity(self, image: Image.Image, text: str) -> float:
        return float((self._clip.see([image]) * self._clip.read([text])).sum())

    @cached_property
    def _blip(self) -> blip.Blip:
        return blip.Blip.load(self._folders["blip"], self._device)

    @cached_property
    def _clip(self) -> clip.Clip:
        return clip.Clip.load(self._folders["clip"], self._device)

    @cached_property
    def _detector(self) -> detector.NamedDetector:
        return detector.NamedDetector.load(self._folders["detector"], self._device)

    @cached_property
    def _depth(self) -> depth.Depth:
        return depth.Depth.load(self._folders["depth"], self._device)
