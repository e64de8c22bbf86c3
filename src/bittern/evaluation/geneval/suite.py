"""The suite: pictures are drawn or given, objects found, verdicts reached and told with their errors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bittern
from bittern import pipelines
from bittern.errors import UserError
from bittern.evaluation import clip
from bittern.evaluation.drawing import Settings, artist, check_models, device_name, dtype_name, versions
from bittern.evaluation.generate import check_request
from bittern.evaluation.geneval import detector, folder
from bittern.evaluation.geneval import metadata as lines
from bittern.evaluation.geneval.folder import Picture
from bittern.evaluation.geneval.metadata import Request
from bittern.evaluation.geneval.verdicts import (
    Judge,
    Judged,
    finished_run,
    first_picture,
    hash_of,
    of_finished_run,
    size_of,
)
from bittern.evaluation.shards import Shard
from bittern.evaluation.stats import Difference, paired_difference
from bittern.evaluation.suites import difference_dict, score_dict
from bittern.quantization import Progress
from bittern.quantization.workspace import fingerprint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PER_PROMPT = 4
REFERENCE = "reference"


@dataclass(frozen=True)
class GenEval:
    """What the suite found.

    Attributes:
        judged: the model's pictures.
        reference: another model's or an earlier run's, of the same prompts.
        difference: the model's score minus the reference's, paired by prompts.
        detector: the detector's folder or id.
        clip: the colour namer's; None where no prompt names a colour.
        unknown: classes that the detector does not know.
        out: where pictures and results are.
        settings: how pictures were drawn; None where they were given.
    """

    judged: Judged
    reference: Judged | None
    difference: Difference | None
    detector: str
    clip: str | None
    unknown: list[str]
    out: Path
    settings: Settings | None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values, in the form of the other suites."""
        judged, reference, made = self.judged, self.reference, self.judged.made
        prompts = len({index for index, _ in judged.outcomes})
        steps = made.get("steps")
        return {
            "suite": "geneval",
            "model": judged.model,
            "reference": reference and reference.model,
            **score_dict(judged.score),
            "reference_scores": reference and score_dict(reference.score),
            "difference": self.difference and difference_dict(self.difference),
            "images": len(judged.outcomes),
            "prompts": prompts,
            "images_per_prompt": len(judged.outcomes) / prompts,
            "correct_images": judged.right_pictures,
            "correct_prompts": judged.right_prompts,
            "size": judged.size,
            "seed": self.settings and self.settings.seed,
            "steps": int(steps) if steps and steps.isdigit() else None,
            "path": made.get("path"),
            "attention": made.get("attention"),
            "device": made.get("device"),
            "detector": self.detector,
            "clip": self.clip,
            "unknown_classes": self.unknown,
            "results": str(self.out / folder.RESULTS),
            "versions": versions(),
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
    settings, shard, out = settings or Settings(), shard or Shard(), Path(out).expanduser()
    if images_per_prompt is not None and not 1 <= images_per_prompt <= 10_000:
        raise UserError(
            f"images per prompt is {images_per_prompt}: expected 1 to 10,000; leave it out for {PER_PROMPT}"
        )
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: expected at least 1; leave it out for every prompt")
    if model is None and images is None:
        raise UserError("suite geneval needs a model that draws, or --images DIR with pictures; name a MODEL")
    if metadata is None and images is None:
        raise UserError("suite geneval needs its prompts: add --metadata evaluation_metadata.jsonl, as GenEval has it")
    requests = None if metadata is None else lines.choose(lines.read_metadata(Path(metadata).expanduser()), limit)
    per_prompt = images_per_prompt or PER_PROMPT
    if images is None:
        assert requests is not None and model is not None
        pictures = folder.pictures_of(out, requests, per_prompt)
        check_request([each.request.prompt for each in pictures], settings.seed, settings.steps, settings.batch_size)
        check_models(model)
    else:
        given = folder.read_pictures(Path(images).expanduser(), requests, images_per_prompt)
        chosen = lines.choose(list({each.request.index: each.request for each in given}.values()), limit)
        pictures = [each for each in given if each.request in chosen]
        requests = chosen
    finished = finished_run(reference)
    if finished is None and reference is not None:
        if images is not None:
            raise UserError(
                f"--reference {reference} would draw other noise than --images: give a finished run's folder"
            )
        check_models(reference)
    judge = Judge(detector_model, clip_model, requests, shard, settings.device, progress)

    about = {"suite": "geneval", "metadata": hash_of(request.line for request in requests), "prompts": len(requests)}
    if images is None:
        about |= {
            "model": model_identity(model),
            "images_per_prompt": per_prompt,
            **_drawing_identity(settings, shard),
        }
    else:
        about |= {"images": str(Path(images).expanduser().resolve())}
    others: list[Picture] = []
    with ExitStack() as held:
        _prepared(out, about, requests if images is None else [], shard, held, force=force)
        if reference is not None and finished is None:
            others = folder.pictures_of(out / REFERENCE, requests, per_prompt)
            told = about | {"model": model_identity(reference)}
            _prepared(out / REFERENCE, told, requests, shard, held, force=False)
        if images is None:
            assert model is not None
            drawn = None if finished is None else first_picture(reference, requests)
            _draw(model, out, pictures, settings, shard, progress, beside=drawn)
        if others:
            assert reference is not None
            _draw(reference, out / REFERENCE, others, settings, shard, progress, beside=pictures[0].file)
        name = model if isinstance(model, str) or model is None else type(model).__name__
        found = judge(name, out, pictures)
        base = of_finished_run(reference, finished, requests, found) if finished else None
        if others:
            base = judge(reference, out / REFERENCE, others)
    if base is not None:
        _check_pair(found, base)
    return GenEval(
        judged=found,
        reference=base,
        difference=paired_difference(found.score.outcomes, base.score.outcomes) if base else None,
        detector=detector_model,
        clip=clip_model if judge.needs_colors else None,
        unknown=judge.unknown,
        out=out,
        settings=settings if images is None else None,
    )


def _prepared(
    out: Path, about: dict[str, Any], requests: Sequence[Request], shard: Shard, held: ExitStack, *, force: bool
) -> None:
    """The run's folder as the first process makes it; every process holds it."""
    if shard.first:
        folder.prepare(out, about, held, force=force)
        folder.lay_out(out, requests)
    shard.wait()
    if not shard.first:
        held.callback(folder.Claim(out, alone=False).release)


def _draw(
    model: str | DiffusionPipeline,
    out: Path,
    pictures: Sequence[Picture],
    settings: Settings,
    shard: Shard,
    progress: Progress | None,
    *,
    beside: Path | None = None,
) -> None:
    """Draw what is missing: whole batches, dealt to the processes in turn; of the size of a picture beside them."""
    missing = {each.key for each in pictures if not each.file.is_file()}
    if missing:
        here = replace(settings, device=shard.device(settings.device))
        with artist(model, here) as one:
            if beside is not None and beside.is_file():
                _check_size(one.name, "x".join(map(str, one.size)), str(beside), size_of(beside))
            size = one.batch_size
            mine = shard.share([(start, pictures[start : start + size]) for start in range(0, len(pictures), size)])
            total = sum(len(batch) for _, batch in mine)
            done = total - sum(each.key in missing for _, batch in mine for each in batch)
            for start, batch in mine:
                if not any(each.key in missing for each in batch):
                    continue
                drawing = one.draw([each.request.prompt for each in batch], seed=settings.seed + start)
                made = [drawing.metadata(index) for index in range(len(batch))]
                folder.deliver(out, start // size, batch, drawing.images, made)
                done += sum(each.key in missing for each in batch)
                if progress and shard.first:
                    progress(f"drawing with {one.name}", done, total)
    shard.wait()


def _check_pair(found: Judged, base: Judged) -> None:
    if base.size is not None and found.size is not None:
        _check_size(str(found.model or "the model"), found.size, str(base.model), base.size)


def _check_size(name: str, size: str, other: str, other_size: str) -> None:
    if size != other_size:
        raise UserError(
            f"{name} has pictures of {size} pixels and {other} of {other_size}: expected one size; compare a model "
            "with one made from it"
        )


def model_identity(model: str | DiffusionPipeline | None) -> str:
    """What tells a model from another, and from the same folder with other weights."""
    if not isinstance(model, str):
        return type(model).__name__
    place = pipelines.resolve(model)
    files = sorted(file for file in place.rglob("*") if file.is_file() and file.suffix in (".json", ".safetensors"))
    return f"{model} {fingerprint(files)[:16]}"


def _drawing_identity(settings: Settings, shard: Shard) -> dict[str, Any]:
    device = shard.device(settings.device)
    return {
        "seed": settings.seed,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "path": settings.path,
        "dtype": settings.dtype and dtype_name(settings.dtype),
        "attention": settings.attention,
        "device": device_name(device).partition(",")[0],
        "bittern": bittern.__version__,
    }
