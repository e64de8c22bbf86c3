"""Several models, the same prompts, the same noise: what the report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.errors import UserError
from bittern.evaluation import results as runs_of
from bittern.evaluation import scenes
from bittern.evaluation.drawing import Drawing, Settings, artist, check_models, draw, versions
from bittern.evaluation.fidelity import Fidelity, fidelity
from bittern.evaluation.stats import Difference, paired_difference
from bittern.evaluation.suites import (
    Score,
    check_sizes,
    choose_prompts,
    difference_dict,
    fidelity_dict,
    score_dict,
    score_scenes,
)
from bittern.quantization import Progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEFAULT_LIMIT = 24


@dataclass(frozen=True)
class Entry:
    """One model in a comparison; what is measured against the reference is None for the reference itself.

    Attributes:
        drawing: its pictures.
        score: of the scenes, where all tasks were drawn.
        fidelity: of the pictures to the reference's.
        difference: its scenes score minus the reference's, paired.
        geneval: its GenEval run, if one was given.
        geneval_difference: its GenEval score minus the reference's, paired, where both have a run.
    """

    drawing: Drawing
    score: Score | None
    fidelity: Fidelity | None = None
    difference: Difference | None = None
    geneval: runs_of.Finished | None = None
    geneval_difference: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON values."""
        drawing = self.drawing
        return {
            "model": drawing.model,
            "bytes": drawing.inspection.file_bytes,
            "bits_per_weight": drawing.inspection.bits_per_weight,
            **score_dict(self.score),
            "fidelity": fidelity_dict(self.fidelity),
            "difference": self.difference and difference_dict(self.difference),
            "geneval": self.geneval and self._geneval(self.geneval),
            "path": drawing.path,
            "paths": drawing.paths,
            "attention": drawing.attention,
            "seconds": round(drawing.seconds, 2),
        }

    def _geneval(self, run: runs_of.Finished) -> dict[str, Any]:
        gap = self.geneval_difference
        return {
            **score_dict(run.judged.score),
            "difference": gap and difference_dict(gap),
            "images": len(run.judged.outcomes),
            "results": str(run.folder),
        }


@dataclass(frozen=True)
class Comparison:
    """A reference, the models that are held against it, and the prompts that all of them drew."""

    reference: Entry
    others: list[Entry]
    world: list[scenes.ScenePrompt] | None

    @property
    def entries(self) -> list[Entry]:
        """Every model, the reference first."""
        return [self.reference, *self.others]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        drawing = self.reference.drawing
        return {
            "reference": drawing.model,
            "models": [entry.to_dict() for entry in self.entries],
            "images": len(drawing.prompts),
            "seed": drawing.seed,
            "steps": drawing.steps,
            "device": drawing.device,
            "versions": versions(),
        }


def compare(
    reference: str | DiffusionPipeline,
    others: Sequence[str | DiffusionPipeline],
    *,
    prompts: Sequence[str] | None = None,
    limit: int | None = None,
    settings: Settings | None = None,
    results: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Draw the same prompts from the same noise with every model, and measure the others against the first.

    Args:
        reference: a folder, a hub id, "tiny-flux", or a loaded pipeline.
        others: one or more of the same.
        prompts: what to draw; by default 24 held-out prompts of the scenes world, which are also judged.
        limit: how many prompts.
        settings: seed, steps and the rest, the same for all.
        results: folders of finished GenEval runs of these models, to show beside the rest.
        progress: called as the pictures advance.

    Raises:
        UserError: if nothing is to be compared, the models draw pictures of different sizes, or the runs are of other
            models or cannot be compared.
    """
    if not others:
        raise UserError("one model is no comparison: expected two or more; name another model after the reference")
    world, texts = choose_prompts(prompts, limit, DEFAULT_LIMIT)
    check_models(reference, *others)
    base_run, *runs = runs_of.gather([Path(each) for each in results], [reference, *others])
    # The detector's tasks are only comparable when every one of them was drawn.
    judged = world if world and len({p.tag for p in world}) == len(scenes.TASKS) else None
    base = draw(reference, texts, settings, progress=progress)
    base_score = score_scenes(base.images, judged) if judged else None
    entries: list[Entry] = []
    for model, run in zip(others, runs, strict=True):
        with artist(model, settings) as one:
            check_sizes(one, base)
            drawing = one.draw(texts, progress=progress)
        score = score_scenes(drawing.images, judged) if judged else None
        gap = paired_difference(score.outcomes, base_score.outcomes) if score and base_score else None
        near = fidelity(drawing.images, base.images)
        entries.append(Entry(drawing, score, near, gap, run, _run_difference(run, base_run)))
    return Comparison(Entry(base, base_score, geneval=base_run), entries, judged)


def _run_difference(run: runs_of.Finished | None, base: runs_of.Finished | None) -> Difference | None:
    if run is None or base is None:
        return None
    return paired_difference(run.judged.score.outcomes, base.judged.score.outcomes)
