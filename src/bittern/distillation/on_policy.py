"""States of the student's own trajectories, with what the teacher answers there, in place of some of the teacher's.

A student that has only seen its teacher's states leaves them a little with every step, and is asked what it has never
learned. As in DAgger (Ross et al. 2011, arXiv:1011.0686) it therefore draws by itself, the teacher says what would
have been right, and that is learned like everything else. Trajectories keep their texts and get other noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bittern.distillation.bank import Bank, draw_bank, output_of, together
from bittern.distillation.sharding import rank
from bittern.distillation.student import in_place_of
from bittern.distillation.trainer import Trainer
from bittern.quantization.workspace import Workspace

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NAME = "student"
"""Of the noise."""


def wanted(share: float, trajectories: int, done: float) -> int:
    """Trajectories that are to be the student's own when so much of the training is done."""
    return round(share * trajectories * min(1.0, max(0.0, 2 * done - 1)))


def replace_states(
    trainer: Trainer,
    pipe: DiffusionPipeline,
    teacher: nn.Module,
    texts: Sequence[str],
    start: int,
    stop: int,
    workspace: Workspace | None,
) -> None:
    """Puts the averaged student's own states in the place of these trajectories of the bank.

    Args:
        trainer: Its bank is changed where it is.
        pipe: The pipeline.
        teacher: Its denoiser.
        texts: Of all trajectories of the bank; each process has as many.
        start: The first trajectory.
        stop: The one after the last.
        workspace: Keeps the states, for a run that goes on.
    """
    bank = trainer.bank
    for first in range(start, stop, together(pipe)):
        part_texts = texts[first : min(stop, first + together(pipe))]
        with trainer.averaged() as model, in_place_of(pipe, teacher, model):
            model.eval()
            part = draw_bank(
                pipe, model, part_texts, pattern=bank.pattern, seed=trainer.seed, name=NAME,
                start=rank() * len(texts) + first,
            )  # fmt: skip
            model.train()
        part = replace(part, targets=answers(part, teacher, trainer.dtype))
        if workspace is not None:
            workspace.save(_name(first), part.tensors(), {"trajectories": len(part_texts)})
        write(bank, part, first)


@torch.no_grad()
def answers(bank: Bank, teacher: nn.Module, dtype: torch.dtype, batch: int = 1024) -> Tensor:
    """The teacher's answers at all states of a bank, in the type of its targets."""
    rows = torch.arange(len(bank), device=bank.targets.device)
    found = [output_of(teacher(*args, **kwargs)) for args, kwargs in (bank.call(r, dtype) for r in rows.split(batch))]
    return torch.cat([part.to(bank.targets.dtype) for part in found])


def write(bank: Bank, part: Bank, start: int) -> None:
    """Writes a part's states and targets over those of a bank, from this trajectory on."""
    first = start * bank.pattern.steps * bank.pattern.branches
    for name, tensor in {**part.states, "targets": part.targets}.items():
        own = bank.targets if name == "targets" else bank.states[name]
        own[first : first + len(tensor)].copy_(tensor)


def restore(trainer: Trainer, count: int, workspace: Workspace) -> None:
    """Writes what `replace_states` kept of the first trajectories over those of the bank."""
    start = 0
    while start < count:
        tensors, notes = workspace.load(_name(start))
        write(trainer.bank, Bank.of(trainer.bank.pattern, tensors), start)
        start += int(notes["trajectories"])


def _name(start: int) -> str:
    return f"student-{start:07d}"
