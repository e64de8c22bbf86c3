"""From a model, or from pictures that are there, to scores and their paired difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import bittern
from bittern import pipelines
from bittern.errors import UserError
from bittern.evaluation.drawing import Settings, artist, check_models, device_name, dtype_name, versions
from bittern.evaluation.generate import check_request
from bittern.evaluation.runs import folder
from bittern.evaluation.runs.alike import check_alike, judge_of
from bittern.evaluation.runs.folder import Picture, Request
from bittern.evaluation.runs.judging import Judge, Judged, Outcome, finished_picture, size_of
from bittern.evaluation.shards import Shard
from bittern.evaluation.stats import Difference
from bittern.evaluation.suites import difference_dict, score_dict
from bittern.quantization import Progress
from bittern.quantization.workspace import fingerprint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

REFERENCE = "reference"  # the folder in a run's folder where a reference is drawn
R = TypeVar("R", bound=Request)
Finished = dict[tuple[int, int], Outcome]
"""What became of every picture of a finished run, by the prompt's number and the sample's."""


@dataclass(frozen=True)
class Run:
    """What a run is asked for.

    Attributes:
        suite: its name.
        model: a folder, a hub id, "tiny-flux", or a loaded pipeline. With `images` it is only a name.
        out: where pictures, in the official layout, and results go.
        images: a folder of the official layout to judge in place of drawing.
        images_per_prompt: how many pictures are drawn of each prompt; with `images`, how many there must be.
        limit: how many prompts, taken task by task in turn; by default all.
        reference: a model to draw and judge alike, or the folder of a run that is finished.
        settings: seed, steps and the rest. Sample k of the i-th prompt drawn has the noise of
            seed + i * images_per_prompt + k.
        force: whether to replace another run in `out`.
        shard: this process's place among several that do the same.
        progress: called as pictures are drawn and judged.
    """

    suite: str
    model: str | DiffusionPipeline | None
    out: Path
    images: Path | None = None
    images_per_prompt: int | None = None
    limit: int | None = None
    reference: str | None = None
    settings: Settings = field(default_factory=Settings)
    force: bool = False
    shard: Shard = field(default_factory=Shard)
    progress: Progress | None = None

    def check(self, default_per_prompt: int, inputs: Mapping[str, str | Path | None]) -> None:
        """Refuses what no suite can do.

        Args:
            default_per_prompt: how many pictures a prompt has unless told otherwise.
            inputs: by option, what the suite reads besides: a file, a folder or a hub id.

        Raises:
            UserError: for numbers that are out of range, neither a model nor pictures, or an `out` in which, or around
                which, lies what the run reads.
        """
        if self.images_per_prompt is not None and not 1 <= self.images_per_prompt <= 10_000:
            raise UserError(
                f"images per prompt is {self.images_per_prompt}: expected 1 to 10,000; leave it out for "
                f"{default_per_prompt}"
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}: expected at least 1; leave it out for every prompt")
        if self.model is None and self.images is None:
            raise UserError(f"suite {self.suite} needs a model that draws, or --images DIR with pictures; name a MODEL")
        drawn_by = self.model if self.images is None and isinstance(self.model, str) else None
        read = {"the model": drawn_by, "--images": self.images, "--reference": self.reference, **inputs}
        for option, given in read.items():
            self._check_apart(option, given)

    def _check_apart(self, option: str, given: str | Path | None) -> None:
        """Refuses an input and a folder of results that lie in one another: --force would delete the input."""
        place = None if given is None else Path(given).expanduser().resolve()
        if place is None or not place.exists():  # a hub id, or refused where it is read
            return
        out = self.out.resolve()
        if place.is_relative_to(out) or out.is_relative_to(place):
            how = "the same folder as" if place == out else "inside" if place.is_relative_to(out) else "around"
            raise UserError(
                f"{option} {given} is {how} --out {self.out}: what a run reads and what it writes must lie apart; "
                "choose another --out"
            )

    def check_drawing(self, pictures: Sequence[Picture[Any]]) -> None:
        """Refuses a drawing that would fail, before time is spent.

        Raises:
            UserError: for a blank prompt, settings out of range, or a model that is not there.
        """
        settings = self.settings
        check_request([each.request.prompt for each in pictures], settings.seed, settings.steps, settings.batch_size)
        check_models(self.model)

    def check_reference(self, finished: Finished | None) -> None:
        """Refuses a reference that cannot be drawn; `finished` is what a finished run found.

        Raises:
            UserError: for a model that is not there, or where pictures are given.
        """
        if self.reference is None or finished is not None:
            return
        if self.images is not None:
            raise UserError(
                f"--reference {self.reference} would draw other noise than --images: give a finished run's folder"
            )
        check_models(self.reference)


def finished_run(reference: str | None, read: Callable[[Path], Finished]) -> Finished | None:
    """The results of a reference that is a finished run's folder; None for a model."""
    place = None if reference is None else Path(reference).expanduser()
    if place is None or not (place / folder.RESULTS).is_file():
        return None
    return read(place)


def carry_out(
    run: Run,
    about: dict[str, Any],
    pictures: Sequence[Picture[Any]],
    per_prompt: int,
    judge: Judge,
    *,
    pictures_in: Callable[[Path], list[Picture[Any]]],
    lay_out: Callable[[Path], None],
    finished: Finished | None,
) -> tuple[Judged, Judged | None]:
    """Draw what is missing, judge what nothing is known of, and the same for the reference.

    A run that was killed goes on where it stood when it is asked for again: no picture is drawn twice, and none is
    judged twice by the same models.

    Args:
        run: what is asked for.
        about: what tells the suite's run from another besides models and drawing, as JSON values.
        pictures: those of the model, in the order in which they are drawn.
        per_prompt: how many there are of each prompt, where they are drawn.
        judge: finds out what they are worth.
        pictures_in: the same pictures in another folder, for the reference.
        lay_out: puts into a run's folder what else the official layout has.
        finished: what a finished run that is the reference found.

    Returns:
        The model's pictures and the reference's, judged.

    Raises:
        UserError: for what the caller can mend.
    """
    out, shard = run.out, run.shard
    about = {"suite": run.suite, **about}
    if run.images is None:
        drawing = {"images_per_prompt": per_prompt, **_drawing_identity(run.settings, shard)}
        about |= {"model": model_identity(run.model), **drawing}
    else:
        about |= {"images": str(run.images.resolve())}
    if finished is not None:
        _check_finished(run, about, judge)
    others: list[Picture[Any]] = []
    with ExitStack() as held:
        _prepared(out, about, lay_out if run.images is None else None, shard, held, force=run.force)
        if run.reference is not None and finished is None:
            others = pictures_in(out / REFERENCE)
            told = about | {"model": model_identity(run.reference)}
            _prepared(out / REFERENCE, told, lay_out, shard, held, force=False)
        if run.images is None:
            assert run.model is not None
            beside = finished_picture(run.reference or "", pictures[0]) if finished is not None else None
            _draw(run.model, out, pictures, run.settings, shard, run.progress, beside=beside)
        if others:
            assert run.reference is not None
            _draw(run.reference, out / REFERENCE, others, run.settings, shard, run.progress, beside=pictures[0].file)
        name = run.model if isinstance(run.model, str) or run.model is None else type(run.model).__name__
        found = judge(name, out, pictures)
        base = judge.finished(run.reference or "", finished, found, pictures[0]) if finished is not None else None
        if others:
            base = judge(run.reference, out / REFERENCE, others)
    if base is not None and base.size is not None and found.size is not None:
        _check_size(str(found.model or "the model"), found.size, str(base.model), base.size)
    return found, base


def _check_finished(run: Run, about: dict[str, Any], judge: Judge) -> None:
    """Refuses a finished run that no paired difference may be taken to; the official scorer's results say nothing."""
    assert run.reference is not None
    place, option = Path(run.reference).expanduser(), "--reference"
    before = folder.read_run(place)
    if before is not None:
        check_alike(f"{option} {place}", before, judge_of(place, option), "this run", about, judge.about)


def _prepared(
    out: Path,
    about: dict[str, Any],
    lay_out: Callable[[Path], None] | None,
    shard: Shard,
    held: ExitStack,
    *,
    force: bool,
) -> None:
    """The run's folder as the first process makes it; every process holds it."""
    if shard.first:
        folder.prepare(out, about, held, force=force)
        if lay_out is not None:
            lay_out(out)
    shard.wait()
    if not shard.first:
        held.callback(folder.Claim(out, alone=False).release)


def _draw(
    model: str | DiffusionPipeline,
    out: Path,
    pictures: Sequence[Picture[Any]],
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


def choose(requests: Sequence[R], limit: int | None) -> list[R]:
    """At most `limit` prompts, task by task in turn, in the files' order; the others' numbers stay as they are.

    Raises:
        UserError: if the limit leaves a task without a prompt.
    """
    if limit is None or limit >= len(requests):
        return list(requests)
    queues = [[r for r in requests if r.tag == tag] for tag in dict.fromkeys(r.tag for r in requests)]
    if limit < len(queues):
        raise UserError(f"limit {limit} leaves tasks without a prompt: expected at least {len(queues)}")
    turns = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    return sorted(turns[:limit], key=lambda request: request.index)


@dataclass(frozen=True)
class Found:
    """What a suite found.

    Attributes:
        run: what was asked for.
        judge: the rules' version and hashes of the models that judged.
        judged: the model's pictures.
        reference: another model's or an earlier run's, of the same prompts.
        difference: the model's score minus the reference's, paired by prompts.
    """

    run: Run
    judge: dict[str, Any]
    judged: Judged
    reference: Judged | None
    difference: Difference | None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values, in the form of the other suites."""
        judged, reference, made = self.judged, self.reference, self.judged.made
        prompts = len({index for index, _ in judged.outcomes})
        steps = made.get("steps")
        return {
            "suite": self.run.suite,
            "model": judged.model,
            "reference": reference and reference.model,
            **score_dict(judged.score),
            "reference_scores": reference and score_dict(reference.score),
            "difference": self.difference and difference_dict(self.difference),
            "images": len(judged.outcomes),
            "prompts": prompts,
            "images_per_prompt": len(judged.outcomes) / prompts,
            "size": judged.size,
            "seed": self.run.settings.seed if self.run.images is None else None,
            "steps": int(steps) if steps and steps.isdigit() else None,
            "path": made.get("path"),
            "attention": made.get("attention"),
            "device": made.get("device"),
            "results": str(self.run.out / folder.RESULTS),
            "judge": self.judge,
            "versions": versions(),
        }
