"""Block after block: each learns to answer as the teacher's does, at what the teacher's is given.

No block knows of the others, so that one at a time is on the device, with its optimizer, and the errors of its
predecessors are not its own. That is the start of a training of the whole model, or all of it where the whole does not
fit. The error of a block is relative to its answers, each tensor of them by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bittern.distillation.block_bank import BlockBank, Walk
from bittern.distillation.course import rate_at
from bittern.distillation.student import Student
from bittern.distillation.trainer import Trainer, compile_block
from bittern.errors import UserError
from bittern.quantization.calibration import Progress
from bittern.quantization.workspace import Workspace
from bittern.recipes import Distillation

Notes = Mapping[str, Any]

IN_HAND = "block"
"""The name under which the block is kept that is learning."""


@dataclass(frozen=True)
class Learned:
    """How a block has learned.

    Attributes:
        path: Of the block.
        steps: That it took.
        before: Relative error of its answers in watched states, before the first step.
        after: The least of them, which is what is kept.
        errors: Of the weights of its layers, relative, by path.
    """

    path: str
    steps: int
    before: float
    after: float
    errors: dict[str, float] = field(default_factory=dict[str, float])


class BlockWise:
    """Blocks that learn in turn.

    Args:
        walk: The teacher, as it is replayed.
        teacher: Has its weights.
        student_of: Gives the student of a block, by its path, where it learns.
        home_of: Gives the module that holds what a block has learned, by its path, for runs that go on.
        settings: Of the training.
        steps: Of each block.
        seed: Of the batches.
        workspace: Keeps finished blocks and the one in hand.
        progress: Called as the work goes on.
        seconds: What there is for all blocks; None for no limit.
    """

    def __init__(
        self,
        walk: Walk,
        teacher: nn.Module,
        student_of: Callable[[str], Student],
        home_of: Callable[[str], nn.Module],
        settings: Distillation,
        *,
        steps: int,
        seed: int,
        workspace: Workspace | None = None,
        progress: Progress | None = None,
        seconds: float | None = None,
    ) -> None:
        self.walk, self.teacher, self.student_of, self.home_of = walk, teacher, student_of, home_of
        # A block is small enough to keep what it computes, and is alone.
        self.settings = settings.model_copy(update={"steps": steps, "checkpointing": False})
        self.seed, self.workspace, self.progress = seed, workspace, progress
        self.seconds = seconds

    def learn(self, begin: Callable[[], Notes], done: Callable[[Learned, Notes], Notes]) -> tuple[list[Learned], Notes]:
        """All blocks.

        Notes are JSON values that are handed on from block to block, by a run that goes on as well; `seconds` among
        them is what has been spent.

        Args:
            begin: Gives the first ones, if no block is finished.
            done: Called after each block with those of the one before, gives its own.

        Returns:
            How each has learned, and the last notes.
        """
        found: list[Learned] = []
        notes: Notes | None = None
        order = self.walk.order
        for turn, path in enumerate(order):
            name = f"{IN_HAND}-{turn:04d}"
            if self.workspace is not None and self.workspace.has(name):
                tensors, kept = self.workspace.load(name)
                self.home_of(path).load_state_dict(tensors)
                found.append(Learned(**kept["learned"]))
                notes = kept["notes"]
                continue
            if self.progress:
                self.progress(f"distilling {path}", turn, len(order))
            notes = begin() if notes is None else notes
            found.append(self._learn(turn, float(notes["seconds"])))
            notes = done(found[-1], notes)
            if self.workspace is not None:
                state = {key: t for key, t in self.home_of(path).state_dict().items() if type(t) is Tensor}
                self.workspace.save(name, state, {"learned": vars(found[-1]), "notes": notes})
        if self.progress:
            self.progress("distilled", len(order), len(order))
        return found, notes or begin()

    def _learn(self, turn: int, spent: float) -> Learned:
        path = self.walk.order[turn]
        learned, watched = self.walk.record(turn)
        trainer = Trainer(self.student_of(path), learned, self.settings, seed=self.seed, dtype=self.walk.dtype)
        if self.settings.compile and trainer.device.type == "cuda":
            compile_block(trainer.student.model)
        course = self._resume(trainer, turn) or _Course(self._error(trainer, watched), trainer)
        begun = saved = time.monotonic()
        left = None if self.seconds is None else max(self.seconds - spent, 1.0) / (len(self.walk.order) - turn)
        while course.missed < self.settings.patience:
            share = trainer.steps / self.settings.steps
            if left is not None:
                share = max(share, (time.monotonic() - begun) / left)
            if share >= 1:
                break
            trainer.advance(rate_at(trainer.steps, share, self.settings))
            if trainer.steps % self.settings.validate_every == 0:
                course.note(self._error(trainer, watched), trainer)
            if self.workspace is not None and time.monotonic() - saved > 60 * self.settings.save_minutes:
                self._keep(trainer, course, turn)
                saved = time.monotonic()
        if course.seen != trainer.steps:
            course.note(self._error(trainer, watched), trainer)
        with torch.no_grad():
            for parameter, best in zip(trainer.params, course.average, strict=True):
                parameter.copy_(best)
        trainer.student.export()
        block = self.teacher.get_submodule(path)
        errors = {f"{path}.{name}": error for name, error in trainer.student.errors(block).items()}
        return Learned(path, trainer.steps, course.before, math.sqrt(course.best), errors)

    def _error(self, trainer: Trainer, watched: BlockBank) -> float:
        """The mean of the averaged block in watched states."""
        with trainer.averaged():
            rows = torch.arange(len(watched), device=trainer.device)
            errors = torch.cat([trainer.errors(part, watched) for part in rows.split(self.settings.batch)])
        error = float(errors.mean())
        if not math.isfinite(error):
            raise UserError(f"a block gives NaN or infinity after {trainer.steps} steps: lower its learning rates")
        return error

    def _keep(self, trainer: Trainer, course: _Course, turn: int) -> None:
        assert self.workspace is not None
        best = {f"best.{index}": tensor for index, tensor in enumerate(course.average)}
        notes = {"turn": turn, "steps": trainer.steps, "before": course.before, "best": course.best,
                 "missed": course.missed, "seen": course.seen}  # fmt: skip
        self.workspace.save(IN_HAND, {**trainer.tensors(), **best}, notes)

    def _resume(self, trainer: Trainer, turn: int) -> _Course | None:
        if self.workspace is None or not self.workspace.has(IN_HAND):
            return None
        tensors, notes = self.workspace.load(IN_HAND)
        if notes["turn"] != turn:
            return None
        best = {name: tensor for name, tensor in tensors.items() if name.startswith("best.")}
        trainer.load({name: tensor for name, tensor in tensors.items() if name not in best}, int(notes["steps"]))
        course = _Course(float(notes["best"]), trainer)
        course.before, course.missed, course.seen = float(notes["before"]), int(notes["missed"]), int(notes["seen"])
        course.average = [best[f"best.{index}"] for index in range(len(best))]
        return course


class _Course:
    """How a block is learning: its least error so far, the averages of that time, and validations since then."""

    def __init__(self, error: float, trainer: Trainer) -> None:
        self.before, self.best, self.missed, self.seen = math.sqrt(error), error, 0, trainer.steps
        self.average = _copies(trainer.average)

    def note(self, error: float, trainer: Trainer) -> None:
        """Of a validation."""
        self.seen = trainer.steps
        if error < self.best:
            self.best, self.missed, self.average = error, 0, _copies(trainer.average)
        else:
            self.missed += 1


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """On the host."""
    return [tensor.to("cpu", copy=True) for tensor in tensors]
