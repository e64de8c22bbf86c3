"""Blocks in turn as a warm start of the whole model, and as a training of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern.architectures import plan
from bittern.distillation.bank import Bank, output_of
from bittern.distillation.block_bank import Walk
from bittern.distillation.blocks import BlockWise, Learned, Notes
from bittern.distillation.course import Course
from bittern.distillation.fidelity import Watched, fidelity, fidelity_of
from bittern.distillation.foresight import foreseen
from bittern.distillation.memory import Memory, check
from bittern.distillation.student import Student, learner
from bittern.distillation.trainer import Trainer
from bittern.layers import set_path
from bittern.quantization import Report
from bittern.quantization.calibration import Progress
from bittern.quantization.jobs import finish
from bittern.quantization.report import inspect
from bittern.quantization.workspace import Workspace
from bittern.recipes import Distillation, Recipe
from bittern.trajectories import State

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Say = Callable[[str], object]


def warm_start(
    trainer: Trainer,
    course: Course,
    pipe: DiffusionPipeline,
    teacher: nn.Module,
    blocks: Sequence[str],
    banks: tuple[Bank, Bank],
    watched: Watched,
    workspace: Workspace | None,
    progress: Progress | None,
    say: Say,
) -> None:
    """Has each block of the student learn by itself before the whole does. The first record is of the time before."""
    settings, student = trainer.settings, trainer.student
    clock = time.monotonic()

    def begin() -> Notes:
        found = {"step": 0, "seconds": 0.0, "loss": 0.0, **fidelity(trainer, pipe, teacher, watched)}
        say(_line(found))
        return {"log": [found], "seconds": time.monotonic() - clock}

    def done(learned: Learned, notes: Notes) -> Notes:
        nonlocal clock
        before, clock = clock, time.monotonic()
        say(_told(learned))
        return {**notes, "seconds": notes["seconds"] + clock - before}

    walk = walk_of(teacher, blocks, banks, settings, trainer.dtype, trainer.device, trainer.seed)
    in_turn = BlockWise(
        walk, teacher, student.block, student.model.get_submodule, settings, steps=settings.warm_start,
        seed=trainer.seed, workspace=workspace, progress=progress,
    )  # fmt: skip
    _, notes = in_turn.learn(begin, done)
    course.log, course.seconds = list(notes["log"]), float(notes["seconds"])
    with torch.no_grad():
        for parameter, average in zip(trainer.params, trainer.average, strict=True):
            average.copy_(parameter)


def distill_blocks(
    pipe: DiffusionPipeline,
    drawing: nn.Module,
    teacher: nn.Module,
    deployed: nn.Module,
    blocks: Sequence[str],
    recipe: Recipe,
    settings: Distillation,
    banks: tuple[Bank, Bank],
    watched: Watched,
    device: torch.device,
    seed: int,
    workspace: Workspace | None,
    progress: Progress | None,
    say: Say,
) -> tuple[Report, list[dict[str, Any]], Memory]:
    """Trains the blocks of a few-bit model one by one, each on a device for its time.

    Args:
        pipe: Draws with `drawing` on the device.
        drawing: The teacher, its weights on the device when they are called.
        teacher: The teacher, where its weights are.
        deployed: What the recipe's solver made of it; becomes what was learned.
        blocks: Paths.
        recipe: Of the whole.
        settings: Of the training.
        banks: States to learn, and to watch.
        watched: What fidelity is watched with.
        device: Where blocks learn.
        seed: Of the states and the batches.
        workspace: Keeps finished blocks and the one in hand.
        progress: Called as the work goes on.
        say: Called with lines for people.

    Returns:
        Every target, the records of the validations, and the memory that was foretold.
    """
    dtype, home = next(teacher.parameters()).dtype, next(teacher.parameters()).device
    clock = time.monotonic()
    walk = walk_of(drawing, blocks, banks, settings, dtype, device, seed)
    say(f"{len(walk.order)} blocks learn from {walk.learned} states each")
    most = largest(teacher, walk.shapes)
    bank = walk.shapes[most].bank(walk.learned, walk.banks[0].steps, device)
    others = [*drawing.parameters(), *drawing.buffers(), *banks[0].everything(), *banks[1].everything()]
    told = foreseen(
        teacher.get_submodule(most), deployed.get_submodule(most), bank, settings,
        dtype, others,
    )  # fmt: skip
    say(f"{told} ({most}, the largest block)")
    check(told, device, told.models)

    def errors_of(rows: Tensor) -> Tensor:
        answer = State(0, 0, *watched.bank.call(rows, dtype)).replay(deployed)
        return watched.bank.missed(output_of(answer).to(home), rows)

    def validation(notes: Notes, **record: object) -> Notes:
        nonlocal clock
        nn.Module.to(deployed, device)
        set_path(deployed, "a16")
        found = fidelity_of(deployed, errors_of, pipe, drawing, watched, settings.batch)
        set_path(deployed, "auto")
        nn.Module.to(deployed, home)
        before, clock = clock, time.monotonic()
        seconds = notes["seconds"] + clock - before
        record = {**record, "seconds": round(seconds, 1), **found}
        say(_line(record))
        return {**notes, "log": [*notes["log"], record], "seconds": seconds}

    def begin() -> Notes:
        return validation({"log": [], "seconds": 0.0, "steps": 0, "blocks": 0}, step=0)

    def done(learned: Learned, notes: Notes) -> Notes:
        nonlocal clock
        before, clock = clock, time.monotonic()
        say(_told(learned))
        steps, count = notes["steps"] + learned.steps, notes["blocks"] + 1
        notes = {**notes, "seconds": notes["seconds"] + clock - before, "steps": steps, "blocks": count}
        due = steps // settings.validate_every > notes["log"][-1]["step"] // settings.validate_every
        return validation(notes, step=steps) if due or count == len(walk.order) else notes

    def student_of(path: str) -> Student:
        return learner(teacher.get_submodule(path), deployed.get_submodule(path), settings, device)

    seconds = None if settings.minutes is None else 60 * settings.minutes
    in_turn = BlockWise(
        walk, teacher, student_of, deployed.get_submodule, settings, steps=settings.steps, seed=seed,
        workspace=workspace, progress=progress, seconds=seconds,
    )  # fmt: skip
    learned, notes = in_turn.learn(begin, done)
    errors = {path: error for block in learned for path, error in block.errors.items()}
    finish(deployed, plan(teacher, recipe), recipe, seed, errors)
    return inspect(deployed), list(notes["log"]), told


def walk_of(
    teacher: nn.Module,
    blocks: Sequence[str],
    banks: tuple[Bank, Bank],
    settings: Distillation,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Walk:
    """The teacher block by block, with as many states as the settings have room for."""
    room = int(settings.bank_gib * 2**30)
    return Walk(teacher, blocks, banks, room=room, batch=settings.batch, dtype=dtype, device=device, seed=seed)


def largest(teacher: nn.Module, blocks: Iterable[str]) -> str:
    """The block with the most weights; of several the first."""
    return max(blocks, key=lambda path: sum(p.numel() for p in teacher.get_submodule(path).parameters()))


def _told(learned: Learned) -> str:
    return f"{learned.path}: relative error {learned.before:.4f} -> {learned.after:.4f} in {learned.steps} steps"


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({key: round(value, 5) for key, value in record.items()})
