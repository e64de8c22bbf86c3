"""The suites: what is drawn, what is measured, and what may be said about it.

`scenes` draws held-out prompts of the scenes world and asks the detector whether each picture shows what its prompt
says, by GenEval's six tasks. `fidelity` draws any prompts and measures how far the pictures stray from the
reference's, drawn from the same noise, and where on the way they do. With a reference `scenes` measures the pictures,
too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import UInt8
from torch import Tensor

from bittern.errors import UserError, did_you_mean
from bittern.evaluation import clip, scenes
from bittern.evaluation.drawing import Artist, Drawing, Settings, artist, check_models, versions
from bittern.evaluation.fidelity import Fidelity, fidelity
from bittern.evaluation.generate import check_request, to_pil
from bittern.evaluation.published import weights as published_weights
from bittern.evaluation.published.measure import Published, measure
from bittern.evaluation.stats import (
    Difference,
    Estimate,
    Estimator,
    mean_estimate,
    paired_difference,
    proportion,
    unweighted_mean,
)
from bittern.evaluation.walk import MOST_PROMPTS, Departure, departure, kind_of, walk
from bittern.quantization import Progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SUITES = ("scenes", "fidelity")
_DEFAULT_LIMIT = {"cpu": 120, "cuda": 2048}
_LARGEST_LIMIT = 1_000_000


@dataclass(frozen=True)
class Score:
    """A model's score.

    Attributes:
        outcomes: by task, in the order of the prompts, whether the picture is right, or what share of several, or what
            they are worth.
        estimate: the mean of a task and its error.
    """

    outcomes: Mapping[str, Sequence[float]]
    estimate: Estimator = proportion

    @property
    def tasks(self) -> dict[str, Estimate]:
        """Share of right pictures in each task, or what they are worth in the mean."""
        return {task: self.estimate(outcomes) for task, outcomes in self.outcomes.items()}

    @property
    def overall(self) -> Estimate:
        """Unweighted mean of the tasks."""
        return unweighted_mean(self.tasks)


@dataclass(frozen=True)
class Evaluation:
    """What a suite found.

    Attributes:
        suite: its name.
        drawing: the model's pictures.
        reference: the reference's pictures of the same prompts from the same noise, if there is one.
        score: the model's scenes score, if the suite scores.
        reference_score: the reference's.
        difference: score minus reference score, paired.
        fidelity: of the pictures to the reference's.
        departure: of the trajectory from the reference's, if the suite walks and both denoisers are of one kind.
        clip: the model's CLIP score and the reference's, if a CLIP was given.
        published: measures whose weights are published as torch files, if the suite takes them.
        training: the model's scenes score on prompts of the training side, if it was asked for.
        reference_training: the reference's.
    """

    suite: str
    drawing: Drawing
    reference: Drawing | None
    score: Score | None
    reference_score: Score | None
    difference: Difference | None
    fidelity: Fidelity | None
    departure: Departure | None = None
    clip: tuple[Estimate, Estimate] | None = None
    published: Published | None = None
    training: Score | None = None
    reference_training: Score | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values. Keys are never renamed; a suite that does not measure one leaves it None."""
        drawing, reference = self.drawing, self.reference
        return {
            "suite": self.suite,
            "model": drawing.model,
            "reference": reference and reference.model,
            **score_dict(self.score),
            "reference_scores": self.reference_score and score_dict(self.reference_score),
            "difference": self.difference and difference_dict(self.difference),
            "training_scores": self.training and score_dict(self.training),
            "reference_training_scores": self.reference_training and score_dict(self.reference_training),
            "fidelity": {
                **fidelity_dict(self.fidelity),
                **(self.departure.to_dict() if self.departure else {}),
                **(_clip_dict(*self.clip) if self.clip else {}),
                **(self.published.to_dict() if self.published else {}),
            },
            "images": len(drawing.prompts),
            "seed": drawing.seed,
            "steps": drawing.steps,
            "path": drawing.path,
            "paths": drawing.paths,
            "reference_path": reference and reference.path,
            "attention": drawing.attention,
            "device": drawing.device,
            "seconds": round(drawing.seconds, 2),
            "versions": versions(),
        }


def score_dict(score: Score | None) -> dict[str, Any]:
    """The JSON keys of a score."""
    if score is None:
        return {"overall": None, "overall_stderr": None, "tasks": None, "tasks_stderr": None}
    return {
        "overall": score.overall.mean,
        "overall_stderr": score.overall.stderr,
        "tasks": {task: e.mean for task, e in score.tasks.items()},
        "tasks_stderr": {task: e.stderr for task, e in score.tasks.items()},
    }


def difference_dict(difference: Difference) -> dict[str, Any]:
    """The JSON keys of a paired difference."""
    return {**asdict(difference), "p_value": difference.p_value, "claim": difference.claim}


def fidelity_dict(found: Fidelity | None) -> dict[str, Any]:
    """The JSON keys of a fidelity."""
    if found is None:
        return {"psnr": None, "ssim": None}
    psnr, ssim = found.mean_psnr, found.mean_ssim
    return {
        "psnr": psnr.mean,
        "psnr_stderr": psnr.stderr,
        "ssim": ssim.mean,
        "ssim_stderr": ssim.stderr,
        "ms_ssim": found.mean_ms_ssim and found.mean_ms_ssim.mean,
        "ms_ssim_stderr": found.mean_ms_ssim and found.mean_ms_ssim.stderr,
        "identical": found.identical,
    }


def _clip_dict(model: Estimate, reference: Estimate) -> dict[str, Any]:
    return {
        "clip_score": model.mean,
        "clip_score_stderr": model.stderr,
        "reference_clip_score": reference.mean,
        "reference_clip_score_stderr": reference.stderr,
    }


def score_scenes(images: UInt8[Tensor, "b 3 h w"], prompts: Sequence[scenes.ScenePrompt]) -> Score:
    """Judge every picture; tasks come in GenEval's order, those without a prompt are left out."""
    outcomes: dict[str, list[bool]] = {task: [] for task in scenes.TASKS}
    for prompt, right in zip(prompts, scenes.judge(images, prompts), strict=True):
        outcomes[prompt.tag].append(bool(right))
    return Score({task: verdicts for task, verdicts in outcomes.items() if verdicts})


def default_limit(device: str) -> int:
    """Prompts that a suite draws unless told otherwise: what two cores, or a GPU, do while one waits."""
    return _DEFAULT_LIMIT["cpu" if device.startswith("cpu") else "cuda"]


def choose_prompts(
    prompts: Sequence[str] | None, limit: int | None, default: int
) -> tuple[list[scenes.ScenePrompt] | None, list[str]]:
    """The first `limit` of the given prompts, or as many held-out ones of the scenes world, balanced over its tasks.

    Returns:
        The scenes prompts, which can be judged, or None where prompts were given; and the texts to draw.

    Raises:
        UserError: if the limit is not positive, or beyond reason.
    """
    if limit is not None and not 1 <= limit <= _LARGEST_LIMIT:
        raise UserError(f"limit is {limit}: expected 1 to {_LARGEST_LIMIT:,}; leave it out for the default")
    if prompts is not None:
        return None, list(prompts)[:limit]
    world = scenes.held_out(limit or default)
    return world, [p.prompt for p in world]


def evaluate(
    model: str | DiffusionPipeline,
    suite: str = "scenes",
    *,
    reference: str | DiffusionPipeline | None = None,
    prompts: Sequence[str] | None = None,
    limit: int | None = None,
    settings: Settings | None = None,
    clip_model: str | None = None,
    weights: Path | None = None,
    training_prompts: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a suite on a model.

    Args:
        model: a folder, a hub id, "tiny-flux", or a loaded pipeline.
        suite: "scenes" or "fidelity".
        reference: what to compare with, picture by picture from the same noise; `fidelity` needs one.
        prompts: of `fidelity`; the held-out prompts of the scenes world by default.
        limit: how many prompts; by default 120 on a CPU and 2,048 on a GPU, or the whole list that was given.
        settings: seed, steps and the rest, the same for both models.
        clip_model: of `fidelity`; a CLIP's folder or hub id, to tell how well pictures fit their prompts.
        weights: of `fidelity`; a folder with the published weights of LPIPS, FID and ImageReward. By default torch's
            own for downloads; what is not there is not measured.
        training_prompts: of `scenes`; score as many prompts of the training side as well. That is no result, but a
            gauge: a model that obeys there and not on held-out prompts has learned sentences by heart.
        progress: called as the pictures advance.

    Raises:
        UserError: for an unknown suite, a missing reference, prompts that the suite does not take, or a limit that
            leaves a task without a prompt.
    """
    settings = settings or Settings()
    if suite not in SUITES:
        raise UserError(f"unknown suite '{suite}': {did_you_mean(suite, (*SUITES, 'geneval', 'compbench', 'cost'))}")
    if suite == "fidelity" and reference is None:
        raise UserError("suite fidelity compares with another model: expected a reference; add --reference MODEL")
    if suite == "scenes" and prompts is not None:
        raise UserError("suite scenes draws its own held-out prompts; leave out --prompts, or take --suite fidelity")
    if suite == "scenes" and limit is not None and limit < len(scenes.TASKS):
        raise UserError(f"limit {limit} leaves tasks without a prompt: expected at least {len(scenes.TASKS)}")
    if suite == "scenes" and clip_model is not None:
        raise UserError("suite scenes has a detector of its own: leave out --clip, or take --suite fidelity")
    if suite == "scenes" and weights is not None:
        raise UserError("suite scenes measures no LPIPS: leave out --weights, or take --suite fidelity")
    if suite != "scenes" and training_prompts:
        raise UserError(f"suite {suite} scores no prompts: leave out --training-prompts, or take --suite scenes")
    place = published_weights.folder(weights)
    world, texts = choose_prompts(prompts, limit, default_limit(settings.device))
    check_models(model, reference)
    judge = None if clip_model is None else clip.locate(clip_model)
    check_request(texts, settings.seed, settings.steps, settings.batch_size)
    way = {"prompts": texts[:MOST_PROMPTS], "seed": settings.seed, "steps": settings.steps}
    seen = scenes.some_of_training(len(texts)) if training_prompts else []
    other = trail = left = training = other_training = None
    if reference is not None:
        with artist(reference, settings) as one:
            other = one.draw(texts, progress=progress)
            other_training = _score_of(one, seen, progress)
            trail = walk(one.pipe, **way, keep_calls=True) if suite == "fidelity" else None
    with artist(model, settings) as one:
        if other is not None:
            check_sizes(one, other)
        drawing = one.draw(texts, progress=progress)
        training = _score_of(one, seen, progress)
        # Another family's denoiser cannot be asked at the reference's states, nor is its noise the same.
        left = departure(one.pipe, trail, **way) if trail and trail.kind == kind_of(one.pipe) else None
    near = fidelity(drawing.images, other.images) if other else None
    score = score_scenes(drawing.images, world) if world and suite == "scenes" else None
    other_score = score_scenes(other.images, world) if other and world and score else None
    return Evaluation(
        suite=suite,
        drawing=drawing,
        reference=other,
        score=score,
        reference_score=other_score,
        difference=paired_difference(score.outcomes, other_score.outcomes) if score and other_score else None,
        fidelity=near,
        departure=left,
        clip=_clip_scores(judge, drawing, other, settings.device) if judge and other else None,
        published=measure(drawing, other, settings.device, place) if other and suite == "fidelity" else None,
        training=training,
        reference_training=other_training,
    )


def _score_of(one: Artist, prompts: Sequence[scenes.ScenePrompt], progress: Progress | None) -> Score | None:
    if not prompts:
        return None
    return score_scenes(one.draw([prompt.prompt for prompt in prompts], progress=progress).images, prompts)


def _clip_scores(folder: Path, drawing: Drawing, reference: Drawing, device: str) -> tuple[Estimate, Estimate]:
    eye = clip.Clip.load(folder, device)
    model, base = (
        mean_estimate(clip.scores(eye, [to_pil(image) for image in each.images], each.prompts))
        for each in (drawing, reference)
    )
    return model, base


def check_sizes(one: Artist, reference: Drawing) -> None:
    """Refuse to compare pictures of two sizes, before the second are drawn.

    Raises:
        UserError: naming both models and sizes.
    """
    width, height = reference.images.shape[-1], reference.images.shape[-2]
    if one.size != (width, height):
        raise UserError(
            f"{one.name} draws {one.size[0]}x{one.size[1]} pictures and {reference.model} draws {width}x{height}: "
            "expected one size; compare a model with one made from it"
        )
