"""From a pipeline to its distilled few-bit model: teacher's bank, training, validation, checkpoints, report."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern.architectures import plan
from bittern.distillation import memory, on_policy, sharding
from bittern.distillation.bank import Bank, Pattern, draw_bank, join, pattern_of, together
from bittern.distillation.course import Course, rate_at
from bittern.distillation.fidelity import Watched, fidelity, watch
from bittern.distillation.foresight import foreseen
from bittern.distillation.hosted import hosted
from bittern.distillation.in_turn import distill_blocks, warm_start
from bittern.distillation.student import learner, solve
from bittern.distillation.texts import draw_texts, groups_of, split
from bittern.distillation.trainer import Trainer
from bittern.errors import UserError, memory_size
from bittern.quantization import Report, component
from bittern.quantization.calibration import Limits, Progress
from bittern.quantization.conductor import with_samples
from bittern.quantization.jobs import check_seed
from bittern.quantization.stored import blocks_of
from bittern.quantization.workspace import Workspace
from bittern.recipes import Distillation, Recipe
from bittern.trajectories import check_prompts, default_prompts, device_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TRAINING = "training"
"""The name under which a training is kept."""

_GLANCE = 20
"""Steps of a GPU between two looks at the clock, for which it has to come to rest."""


@dataclass(frozen=True)
class Distilled:
    """What became of a pipeline.

    Attributes:
        model: The few-bit denoiser.
        report: Every target.
        log: A record for each validation: step, seconds, loss, error, relative error, psnr.
        memory: What the training took, as it was told beforehand.
    """

    model: nn.Module
    report: Report
    log: list[dict[str, Any]]
    memory: memory.Memory


def distill(
    pipe: DiffusionPipeline,
    recipe: str | Path | Recipe,
    *,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    workspace: Workspace | None = None,
    start: Mapping[str, Tensor] | None = None,
    device: str | torch.device | None = None,
    solved: nn.Module | None = None,
    deadline: float | None = None,
    on_validation: Callable[[Trainer, Course], None] | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
    say: Callable[[str], object] | None = None,
) -> Distilled:
    """Makes a few-bit model of a pipeline's denoiser that answers as the denoiser does. The pipeline stays as it is.

    The student starts where the recipe's solver ends, and learns the teacher's answers at the states of the teacher's
    own trajectories: no picture is ever asked for. On a CPU the same arguments give the same bytes, however often the
    training was interrupted; on a GPU sums in the backward pass of attention come in any order.

    Args:
        pipe: In full precision, where it is to compute.
        recipe: With `distillation`.
        prompts: To draw trajectories of; None takes the pipeline's own, and for the scenes world its training side.
        seed: Of prompts, noise, batches and the solver.
        workspace: Keeps the bank and the training, so that a run that was killed goes on.
        start: What `latents` gave of an earlier training, to go on from with a fresh optimizer.
        device: Where blocks learn one by one, and the pipeline draws meanwhile, while its weights wait on the CPU; None
            for where the pipeline is. For mode "blocks" alone.
        solved: What the recipe's solver made of the denoiser; None has it solved here. It becomes the result.
        deadline: When training ends, by `time.monotonic`, in place of the recipe's minutes.
        on_validation: Called after each validation.
        limits: Of the memory that a calibrated solver may take.
        progress: Called as the work goes on.
        say: Called with lines for people.

    Raises:
        UserError: for a recipe that trains nothing, prompts that are held out for evaluation, a model that is
            quantized or cannot be called as is needed, a device for another mode, and too little memory.
    """
    recipe = with_samples(recipe, prompts, None)
    settings = recipe.distillation
    if settings is None:
        raise UserError(f"recipe {recipe.name} trains nothing: expected one with `distillation`, or bittern.quantize")
    check_seed(seed)
    teacher = component(pipe).eval().requires_grad_(False)
    given = default_prompts(pipe.config.get("_name_or_path")) if prompts is None else check_prompts(prompts)
    learned, watched_groups = split(groups_of(given))
    if say is None or sharding.rank():
        say = _silent
    progress = None if sharding.rank() else progress
    refuse_shared(settings, start)
    blocks = blocks_of(teacher, plan(teacher, recipe))
    home = device_of(teacher)
    device = home if device is None else torch.device(device)
    elsewhere = device.type != home.type or device.index not in (None, home.index)
    if settings.mode != "blocks" and elsewhere:
        raise UserError(f"device {device} and a model on {home}: mode {settings.mode!r} trains a model where it is")
    if settings.mode == "blocks" and start is not None:
        raise UserError("a start is for the whole model: mode 'blocks' begins with what the solver gives; leave it out")
    # "cuda" is "cuda:0" to tensors.
    device = torch.empty(0, device=device).device if elsewhere else home
    deployed = solved or solve(pipe, teacher, recipe, prompts=given, seed=seed, limits=limits, progress=progress)
    with ExitStack() as stack:
        drawing = stack.enter_context(hosted(pipe, teacher, blocks, device)) if elsewhere else teacher
        pattern = pattern_of(pipe, drawing, [group[0] for group in learned])
        watched = watch(pipe, drawing, draw_texts(watched_groups, settings.validation, seed=0), pattern, home)
        share = trajectories(settings, pattern)
        texts = draw_texts(learned, share * sharding.count(), seed)[sharding.rank() * share :][:share]
        bank = teacher_bank(pipe, drawing, texts, pattern, seed, home, workspace, progress)
        say(f"{sharding.told()}bank: {share} trajectories, {len(bank)} states, "
            f"{bank.nbytes / 2**30:.2f} GiB")  # fmt: skip
        if settings.mode == "blocks":
            report, log, told = distill_blocks(
                pipe, drawing, teacher, deployed, blocks, recipe, until(settings, deadline, 0.0), (bank, watched.bank),
                watched, device, seed, workspace, progress, say,
            )  # fmt: skip
            return Distilled(deployed, report, log, told)
    student = learner(teacher, deployed, settings)
    if sharding.count() > 1:
        sharding.shard(student.model, blocks, device)
    trainer = Trainer(student, bank, settings, seed=seed, dtype=next(teacher.parameters()).dtype)
    course = Course()
    if start is not None:
        load_latents(trainer, start)
    if settings.mode == "scales" and sharding.count() == 1:
        others = [*teacher.parameters(), *deployed.parameters(), *deployed.buffers(), *watched.bank.everything()]
        memory_needed = foreseen(teacher, deployed, bank, settings, trainer.dtype, others)
    else:
        models = teacher, student.deployed
        others = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        memory_needed = memory.needed(trainer, others, bank.nbytes + watched.bank.nbytes)
    say(str(memory_needed))
    memory.check(memory_needed, trainer.device, memory_needed.models + memory_needed.bank)
    kept = None if workspace is None else checkpoint(workspace)
    if settings.warm_start and kept is None:
        warm_start(trainer, course, pipe, teacher, blocks, (bank, watched.bank), watched, workspace, progress, say)
    before = time.monotonic()
    trainer.prepare()
    say(f"step ready after {time.monotonic() - before:.0f} s")
    if workspace is not None and kept is not None:
        resume(trainer, course, workspace, kept)
    trainer.settings = until(settings, deadline, course.seconds)
    train(trainer, course, pipe, teacher, texts, watched, workspace, on_validation, progress, say)
    report = finish(trainer, course, teacher, recipe, seed)
    return Distilled(student.deployed, report, course.log, memory_needed)


def until(settings: Distillation, deadline: float | None, spent: float) -> Distillation:
    """The settings of a training that ends at a time, by `time.monotonic`, and has taken so many seconds."""
    if deadline is None:
        return settings
    minutes = (deadline - time.monotonic() + spent) / 60
    return settings.model_copy(update={"minutes": max(minutes, 1e-3), "steps": 2**62})


def refuse_shared(settings: Distillation, start: Mapping[str, Tensor] | None) -> None:
    """Refuses what several processes cannot do together.

    Raises:
        UserError: naming it.
    """
    if sharding.count() == 1:
        return
    sharding.check_batch(settings.batch)
    if settings.mode == "blocks" or settings.warm_start:
        raise UserError("blocks that learn by themselves do so in one process: start without torchrun")
    if start is not None:
        raise UserError("a start is for one process: leave it out, or start without torchrun")


def trajectories(settings: Distillation, pattern: Pattern) -> int:
    """As many for each process as the settings want of all of them and their limit allows.

    Raises:
        UserError: if the limit allows none.
    """
    room = int(settings.bank_gib * 2**30) // pattern.trajectory_bytes
    if not room:
        raise UserError(
            f"bank_gib {settings.bank_gib:g}: one trajectory takes {pattern.trajectory_bytes / 2**30:.2g} GiB; "
            "expected room for one at least"
        )
    return min(max(1, settings.trajectories // sharding.count()), room)


def teacher_bank(
    pipe: DiffusionPipeline,
    teacher: nn.Module,
    texts: Sequence[str],
    pattern: Pattern,
    seed: int,
    home: torch.device,
    workspace: Workspace | None,
    progress: Progress | None,
) -> Bank:
    """The teacher's trajectories of these texts, drawn or read, on the device where they are to lie.

    Raises:
        UserError: if the disk has no room for them.
    """
    count, size = len(texts), together(pipe)
    first = sharding.rank() * count
    if workspace is not None:
        there = sum(file.stat().st_size for file in workspace.folder.glob("bank-*"))
        lacking = count * pattern.trajectory_bytes - there - shutil.disk_usage(workspace.folder).free
        if lacking > 0:
            raise UserError(
                f"the disk of {workspace.folder} lacks {memory_size(lacking)} for the teacher's trajectories: make "
                "room, or lower `bank_gib` in the recipe's distillation"
            )
    parts: list[Bank] = []
    for index, start in enumerate(range(0, count, size)):
        name = f"bank-{index:05d}"
        if progress:
            progress("drawing trajectories", start, count)
        if workspace is not None and workspace.has(name):
            parts.append(Bank.of(pattern, workspace.load(name)[0]).to(home))
            continue
        part = draw_bank(pipe, teacher, texts[start : start + size], pattern=pattern, seed=seed, start=first + start)
        parts.append(part.to(home))
        if workspace is not None:
            workspace.save(name, parts[-1].tensors(), {})
    if progress:
        progress("drawing trajectories", count, count)
    return join(parts)


def train(
    trainer: Trainer,
    course: Course,
    pipe: DiffusionPipeline,
    teacher: nn.Module,
    texts: Sequence[str],
    watched: Watched,
    workspace: Workspace | None,
    on_validation: Callable[[Trainer, Course], None] | None,
    progress: Progress | None,
    say: Callable[[str], object],
) -> None:
    """Steps until they are done, the time is up or nothing improves."""
    settings = trainer.settings
    before, begun = course.seconds, time.monotonic()
    saved = begun

    def agreed(values: Sequence[float]) -> list[float]:
        return sharding.agreed(values, trainer.device)

    def validate() -> None:
        found = fidelity(trainer, pipe, teacher, watched)
        elapsed = time.monotonic() - begun
        course.seconds, loss, *told = agreed([before + elapsed, float(trainer.loss), *found.values()])
        found = dict(zip(found, told, strict=True))
        course.log.append({"step": trainer.steps, "seconds": round(course.seconds, 1), "loss": loss, **found})
        say(json.dumps({key: round(value, 5) for key, value in course.log[-1].items()}))
        if not math.isfinite(found["error"]):
            raise UserError(f"the student gives NaN or infinity after {trainer.steps} steps: lower its learning rates")
        if found["error"] < course.best:
            course.best, course.missed = found["error"], 0
            course.best_average = [tensor.cpu().clone() for tensor in trainer.average]
        else:
            course.missed += 1
        if on_validation:
            on_validation(trainer, course)

    if not course.log or not course.best_average:
        validate()
    while True:
        if trainer.device.type != "cuda" or trainer.steps % _GLANCE == 0:
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            now = time.monotonic()
            course.seconds, unsaved = agreed([before + now - begun, now - saved])
            done = trainer.steps / settings.steps
            if settings.minutes is not None:
                done = max(done, course.seconds / (60 * settings.minutes))
            if progress:
                progress("distilling", min(done, 1.0), 1.0)
            if done >= 1 or course.missed >= settings.patience:
                break
            if workspace is not None and unsaved > 60 * settings.save_minutes:
                keep(trainer, course, workspace)
                saved = time.monotonic()
        trainer.advance(rate_at(trainer.steps, done, settings))
        if trainer.steps % settings.validate_every == 0:
            validate()
            own = on_policy.wanted(settings.student_share, len(texts), done)
            if own > course.replaced:
                on_policy.replace_states(trainer, pipe, teacher, texts, course.replaced, own, workspace)
                course.replaced = own
    if course.log[-1]["step"] != trainer.steps:
        validate()
    if workspace is not None:
        keep(trainer, course, workspace)


def finish(trainer: Trainer, course: Course, teacher: nn.Module, recipe: Recipe, seed: int) -> Report:
    """The deployed model of the best averages."""
    with torch.no_grad():
        for parameter, best in zip(trainer.params, course.best_average, strict=True):
            parameter.copy_(best)
    return trainer.student.finish(teacher, recipe, seed)


def keep(trainer: Trainer, course: Course, workspace: Workspace) -> None:
    """Writes all that the training is."""
    best = {f"best.{index}": tensor for index, tensor in enumerate(course.best_average)}
    notes = {"steps": trainer.steps, "log": course.log, "seconds": course.seconds, "best": course.best,
             "missed": course.missed, "replaced": course.replaced}  # fmt: skip
    name = TRAINING
    if sharding.count() > 1:
        # A process may be killed when another has saved: the checkpoint before is there still.
        name = f"{TRAINING}-{course.saves % 2}"
        course.saves += 1
    workspace.save(name, {**trainer.tensors(), **best}, notes)


def checkpoint(workspace: Workspace) -> str | None:
    """The name of the latest checkpoint that all processes have; None where there is none."""
    names = (TRAINING,) if sharding.count() == 1 else (f"{TRAINING}-0", f"{TRAINING}-1")
    own = {int(workspace.load(name, mapped=True)[1]["steps"]): name for name in names if workspace.has(name)}
    common = sharding.common(list(own))
    return own[max(common)] if common else None


def resume(trainer: Trainer, course: Course, workspace: Workspace, name: str) -> None:
    """Goes on where `keep` was."""
    tensors, notes = workspace.load(name)
    best = {name: tensor for name, tensor in tensors.items() if name.startswith("best.")}
    trainer.load({name: tensor for name, tensor in tensors.items() if name not in best}, int(notes["steps"]))
    course.best_average = [best[f"best.{index}"] for index in range(len(best))]
    course.log, course.seconds = list(notes["log"]), float(notes["seconds"])
    course.best, course.missed = float(notes["best"]), int(notes["missed"])
    course.replaced, course.saves = int(notes["replaced"]), int(name[-1] == "0")
    on_policy.restore(trainer, course.replaced, workspace)


def _silent(_line: str) -> None:
    """Says nothing."""


def latents(trainer: Trainer) -> dict[str, Tensor]:
    """The averaged parameters by their names in the student, in 16 bits: a tenth of what a whole training takes."""
    names = {id(parameter): name for name, parameter in trainer.student.model.named_parameters()}
    return {
        names[id(parameter)]: average.half().cpu()
        for parameter, average in zip(trainer.params, trainer.average, strict=True)
    }


@torch.no_grad()
def load_latents(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Starts from what `latents` gave.

    Raises:
        UserError: if it belongs to another model or recipe.
    """
    names = {id(parameter): name for name, parameter in trainer.student.model.named_parameters()}
    for parameter, average in zip(trainer.params, trainer.average, strict=True):
        value = tensors.get(names[id(parameter)])
        if value is None or value.shape != parameter.shape:
            raise UserError(f"the start has no {names[id(parameter)]} of shape {list(parameter.shape)}: take another")
        parameter.copy_(value)
        average.copy_(value)
