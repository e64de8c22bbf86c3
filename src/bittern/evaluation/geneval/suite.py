"""The suite: pictures are drawn or given, objects found, verdicts reached and told with their errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.errors import UserError
from bittern.evaluation import clip
from bittern.evaluation.drawing import Settings
from bittern.evaluation.geneval import detector, layout
from bittern.evaluation.geneval import metadata as lines
from bittern.evaluation.geneval.verdicts import GenEvalJudge
from bittern.evaluation.runs.course import Found, Run, carry_out, choose, finished_run
from bittern.evaluation.runs.folder import hash_of
from bittern.evaluation.shards import Shard
from bittern.evaluation.stats import paired_difference
from bittern.quantization import Progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PER_PROMPT = 4


@dataclass(frozen=True)
class GenEval(Found):
    """What the suite found.

    Attributes:
        detector: the detector's folder or id.
        clip: the colour namer's; None where no prompt names a colour.
        unknown: classes that the detector does not know.
    """

    detector: str
    clip: str | None
    unknown: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values, in the form of the other suites."""
        right = {key for key, outcome in self.judged.outcomes.items() if outcome.value}
        return {
            **super().to_dict(),
            "correct_images": len(right),
            "correct_prompts": len({index for index, _ in right}),
            "detector": self.detector,
            "clip": self.clip,
            "unknown_classes": self.unknown,
        }


def evaluate(
    model: str | DiffusionPipeline | None,
    metadata: str | Path | None,
    out: str | Path,
    *,
    images: str | Path | None = None,
    images_per_prompt: int | None = None,
    limit: int | None = None,
    reference: str | None = None,
    detector_model: str = detector.DEFAULT,
    clip_model: str = clip.DEFAULT,
    settings: Settings | None = None,
    force: bool = False,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> GenEval:
    """GenEval [Ghosh et al. 2023, arXiv:2310.11513] of a model, or of pictures that are there.

    A run that was killed goes on where it stood when it is asked for again: no picture is drawn twice, and none is
    judged twice by the same detector.

    Args:
        model: a folder, a hub id, "tiny-flux", or a loaded pipeline. With `images` it is only a name.
        metadata: the prompts, GenEval's evaluation_metadata.jsonl. With `images` each folder's own are taken if None.
        out: where pictures, in the official layout, and results go.
        images: a folder of the official layout to judge in place of drawing.
        images_per_prompt: how many pictures are drawn of each prompt, by default 4; with `images`, how many there
            must be.
        limit: how many prompts, taken task by task in turn; by default all.
        reference: a model to draw and judge alike, or the folder of a run that is finished.
        detector_model: a Mask2Former's folder or hub id.
        clip_model: a CLIP's folder or hub id.
        settings: seed, steps and the rest. Sample k of the i-th prompt drawn has the noise of
            seed + i * images_per_prompt + k.
        force: whether to replace another run in `out`.
        shard: this process's place among several that do the same.
        progress: called as pictures are drawn and judged.

    Raises:
        UserError: for what the caller can mend, before time is spent where it can be told beforehand.
    """
    out, place = Path(out).expanduser(), None if images is None else Path(images).expanduser()
    run = Run(
        "geneval", model, out, place, images_per_prompt, limit, reference, settings or Settings(), force,
        shard or Shard(), progress,
    )  # fmt: skip
    run.check(PER_PROMPT, {"--metadata": metadata, "--detector": detector_model, "--clip": clip_model})
    if metadata is None and place is None:
        raise UserError("suite geneval needs its prompts: add --metadata evaluation_metadata.jsonl, as GenEval has it")
    requests = None if metadata is None else choose(lines.read_metadata(Path(metadata).expanduser()), limit)
    per_prompt = images_per_prompt or PER_PROMPT
    if place is None:
        assert requests is not None
        pictures = layout.pictures_of(out, requests, per_prompt)
        run.check_drawing(pictures)
    else:
        given = layout.read_pictures(place, requests, images_per_prompt)
        requests = choose(list({each.request.index: each.request for each in given}.values()), limit)
        wanted = {request.index for request in requests}
        pictures = [each for each in given if each.request.index in wanted]
    finished = finished_run(reference, layout.read_results)
    run.check_reference(finished)
    judge = GenEvalJudge(detector_model, clip_model, requests, run.shard, run.settings.device, progress)
    found, base = carry_out(
        run,
        {"metadata": hash_of(request.line for request in requests), "prompts": len(requests)},
        pictures,
        per_prompt,
        judge,
        pictures_in=lambda other: layout.pictures_of(other, requests, per_prompt),
        lay_out=lambda other: layout.lay_out(other, requests),
        finished=finished,
    )
    return GenEval(
        run=run,
        judge=judge.about,
        judged=found,
        reference=base,
        difference=paired_difference(found.score.outcomes, base.score.outcomes) if base else None,
        detector=detector_model,
        clip=clip_model if judge.needs_colors else None,
        unknown=judge.unknown,
    )
