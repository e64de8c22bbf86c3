"""How near the student is to its teacher where it has not learned: watched prompts, from noise of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bittern.distillation.bank import Bank, Pattern, draw_bank, join, noise, together
from bittern.distillation.student import in_place_of
from bittern.distillation.trainer import Trainer
from bittern.threads import is_small, one_thread
from bittern.trajectories import defaults
from bittern.trajectories.texts import quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NAME = "watched"
"""Of the noise, whose seed is always 0: trainings are compared by it."""


@dataclass(frozen=True)
class Watched:
    """What the teacher makes of prompts that are not learned.

    Attributes:
        texts: The prompts.
        bank: Its trajectories.
        images: Its pictures from the same noise, [prompts, 3, h, w] from 0 to 1, on the CPU.
    """

    texts: list[str]
    bank: Bank
    images: Tensor


def watch(
    pipe: DiffusionPipeline, teacher: nn.Module, texts: Sequence[str], pattern: Pattern, home: torch.device
) -> Watched:
    """Draws with the teacher; its trajectories lie on a device then."""
    size, banks = together(pipe), []
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        banks.append(draw_bank(pipe, teacher, part, pattern=pattern, name=NAME, start=start).to(home))
    return Watched(list(texts), join(banks), draw_images(pipe, texts))


@torch.no_grad()
def draw_images(pipe: DiffusionPipeline, texts: Sequence[str]) -> Tensor:
    """Pictures of the texts, from the noise of their places."""
    size, images = together(pipe), []
    options = {**defaults(pipe).options(), "output_type": "pt"}
    small = pipe.device.type == "cpu" and all(
        is_small(part) for part in pipe.components.values() if isinstance(part, nn.Module)
    )
    with quiet(pipe), one_thread(small):
        for start in range(0, len(texts), size):
            part = list(texts[start : start + size])
            generators = [noise(0, NAME, start + index) for index in range(len(part))]
            images.append(pipe(prompt=part, generator=generators, **options).images.float().cpu())
    return torch.cat(images).clamp(0, 1)


def psnr(images: Tensor, reference: Tensor) -> float:
    """The mean over pictures of the peak signal to noise ratio, dB; 100 at most."""
    errors = (images - reference).square().flatten(1).mean(dim=1)
    return float((-10 * errors.clamp(min=1e-10).log10()).mean())


def fidelity(trainer: Trainer, pipe: DiffusionPipeline, teacher: nn.Module, watched: Watched) -> dict[str, float]:
    """Of the averaged student: squared error and relative error of its answers, and PSNR of its pictures, dB."""
    with trainer.averaged() as model:
        model.eval()
        found = fidelity_of(
            model, lambda rows: trainer.errors(rows, watched.bank), pipe, teacher, watched, trainer.settings.batch
        )
        model.train()
    return found


@torch.no_grad()
def fidelity_of(
    model: nn.Module,
    errors_of: Callable[[Tensor], Tensor],
    pipe: DiffusionPipeline,
    teacher: nn.Module,
    watched: Watched,
    batch: int,
) -> dict[str, float]:
    """The same of any model.

    Args:
        model: In place of the teacher.
        errors_of: Gives its mean squared error in each of some watched states.
        pipe: The pipeline.
        teacher: Its denoiser.
        watched: What the teacher makes of prompts that are not learned.
        batch: States that are looked at together.
    """
    bank = watched.bank
    rows = torch.arange(len(bank), device=bank.device)
    errors = torch.cat([errors_of(part) for part in rows.split(batch)])
    with in_place_of(pipe, teacher, model):
        images = draw_images(pipe, watched.texts)
    size = bank.targets.float().square().mean()
    return {
        "error": float(errors.mean()),
        "relative_error": float((errors.mean() / size).sqrt()),
        "psnr": psnr(images, watched.images),
    }
