"""The suite: pictures are drawn or given, looked at, and told with their errors by category."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.errors import UserError
from bittern.evaluation.compbench import detector, layout, phrases
from bittern.evaluation.compbench import prompts as files
from bittern.evaluation.compbench.judge import NOT_COMPARABLE, CompBenchJudge, Models
from bittern.evaluation.drawing import Settings
from bittern.evaluation.runs.course import Found, Run, carry_out, choose, finished_run
from bittern.evaluation.runs.folder import hash_of
from bittern.evaluation.shards import Shard
from bittern.evaluation.stats import Difference, paired_difference
from bittern.evaluation.suites import difference_dict
from bittern.quantization import Progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PER_PROMPT = 10


@dataclass(frozen=True)
class CompBench(Found):
    """What the suite found.

    Attributes:
        differences: the model's score minus the reference's, by category; empty without a reference.
        models: what looked at the pictures, by its option's name.
        parser: what parsed prompts; None where none had to be.
        kinds: whether it is known which complex prompts tell of a place or an action only; None without such prompts.
    """

    differences: dict[str, Difference]
    models: dict[str, str]
    parser: str | None
    kinds: bool | None

    @property
    def not_comparable(self) -> list[str]:
        """The categories whose scores compare with one another only, and not with published ones."""
        return [task for task in self.judged.score.tasks if task in NOT_COMPARABLE]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values, in the form of the other suites."""
        return {
            **super().to_dict(),
            "differences": {task: difference_dict(one) for task, one in self.differences.items()} or None,
            **{name: self.models.get(name) for name in ("blip", "clip", "detector", "depth")},
            "parser": self.parser,
            "detector_threshold": detector.THRESHOLD if "detector" in self.models else None,
            "not_comparable": self.not_comparable,
            "complex_kinds": self.kinds,
        }


def evaluate(
    model: str | DiffusionPipeline | None,
    prompts: str | Path | None,
    out: str | Path,
    *,
    images: str | Path | None = None,
    images_per_prompt: int | None = None,
    limit: int | None = None,
    reference: str | None = None,
    models: Models | None = None,
    parser: phrases.Parser | None = None,
    settings: Settings | None = None,
    force: bool = False,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> CompBench:
    """T2I-CompBench [Huang et al. 2023, arXiv:2307.06350] of a model, or of pictures that are there.

    A run that was killed goes on where it stood when it is asked for again: no picture is drawn twice, and none is
    judged twice by the same models.

    Args:
        model: a folder, a hub id, "tiny-flux", or a loaded pipeline. With `images` it is only a name.
        prompts: a folder with the official prompt files, or one of them. With `images` the pictures' names tell them
            if None.
        out: where pictures, in the official layout, and results go.
        images: a folder of the official layout to judge in place of drawing.
        images_per_prompt: how many pictures are drawn of each prompt, by default 10; with `images`, how many there
            must be.
        limit: how many prompts, taken category by category in turn; by default all.
        reference: a model to draw and judge alike, or the folder of a run that is finished.
        models: what looks at pictures.
        parser: parses prompts; spaCy by default, where a prompt needs parsing.
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
        "compbench", model, out, place, images_per_prompt, limit, reference, settings or Settings(), force,
        shard or Shard(), progress,
    )  # fmt: skip
    looking = models or Models()
    run.check(PER_PROMPT, {"--prompts": prompts, **{f"--{name}": each for name, each in vars(looking).items()}})
    if prompts is None and place is None:
        raise UserError(
            "suite compbench needs its prompts: add --prompts with the folder of T2I-CompBench's files, or one of them"
        )
    requests = None if prompts is None else choose(files.read_prompts(Path(prompts).expanduser()), limit)
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
    judge = CompBenchJudge(looking, requests, run.shard, run.settings.device, progress, parser)
    about = hash_of(f"{each.index} {each.kind} {each.prompt}" for each in requests)
    found, base = carry_out(
        run,
        {"prompts": about, "number_of_prompts": len(requests)},
        pictures,
        per_prompt,
        judge,
        pictures_in=lambda other: layout.pictures_of(other, requests, per_prompt),
        lay_out=lambda other: None,
        finished=finished,
    )
    ours, theirs = found.score.outcomes, base.score.outcomes if base else {}
    return CompBench(
        run=run,
        judge=judge.about,
        judged=found,
        reference=base,
        difference=paired_difference(ours, theirs, shares=False) if base else None,
        differences={
            task: paired_difference({task: ours[task]}, {task: theirs[task]}, shares=False) for task in theirs
        },
        models=judge.models,
        parser=judge.parser,
        kinds=files.told_kinds(requests) if any(each.tag == "complex" for each in requests) else None,
    )
