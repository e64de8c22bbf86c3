"""What a plan's calibrated jobs need to know, recorded in one go from a pipeline that fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from bittern.architectures import Job, Plan
from bittern.errors import UserError
from bittern.recipes import Recipe, needs_data
from bittern.trajectories import Statistics, default_prompts, record, record_bytes, sample, sensitivities

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Progress = Callable[[str, float, float], None]
"""Called with what is being done, how much of it is done and how much there is."""


@dataclass(frozen=True)
class Calibration:
    """Of each job that needs data.

    Attributes:
        statistics: Of its input, under its first path.
        sensitivity: Of each of its outputs, by path; for jobs that ask for it.
    """

    statistics: dict[str, Statistics]
    sensitivity: dict[str, Tensor]


def calibration_bytes(jobs: Sequence[Job], rows: int, itemsize: int) -> int:
    """Bytes that a `Calibration` of these jobs holds on the model's device.

    Over jobs with K inputs: rows K itemsize + 4 K^2 + 4 K; and over targets with N outputs whose sensitivity counts:
    4 N^2. Beside it live the sampled states, of the size of the denoiser's inputs, and, while sensitivities are taken,
    what one forward pass keeps for its backward pass.
    """
    widths = [job.shapes[0][1] for job in jobs]
    felt = sum(4 * n * n for job in jobs if job.solver["sensitivity"] for n, _ in job.shapes)
    return record_bytes(widths, rows, itemsize) + felt


def calibrate(
    target: DiffusionPipeline | nn.Module,
    model: nn.Module,
    plan: Plan,
    recipe: Recipe,
    prompts: Sequence[str] | None,
    seed: int,
    progress: Progress | None = None,
) -> Calibration:
    """Draws trajectories with a full-precision pipeline and records what its calibrated jobs need.

    Args:
        target: The pipeline.
        model: Its denoiser.
        plan: Which layers are solved how.
        recipe: Gives the numbers of samples and rows.
        prompts: Texts; None takes the pipeline's own or the bundled ones.
        seed: Of samples, noise and tokens.
        progress: Called as the work goes on.

    Raises:
        UserError: for a model without its pipeline, and for trajectories, inputs or gradients that are not finite.
    """
    if isinstance(target, nn.Module):
        raise UserError(
            f"recipe {recipe.name} is calibrated on trajectories: give the whole pipeline, not its "
            f"{type(target).__name__}; or take a data-free recipe"
        )
    if prompts is None:
        prompts = default_prompts(target.config.get("_name_or_path"))
    jobs = [job for job in plan.jobs if needs_data(job.solver)]
    itemsize = next(model.parameters()).element_size()
    size = f"{calibration_bytes(jobs, recipe.rows, itemsize) / 2**30:.2f} GiB"

    def said(what: str) -> Callable[[float, float], None] | None:
        return progress and (lambda done, total: progress(what, done, total))

    states = sample(target, model, prompts, recipe.samples, seed=seed, progress=said("drawing trajectories"))
    first = [job.paths[0] for job in jobs]
    statistics = record(
        model, first, states, rows=recipe.rows, seed=seed, progress=said(f"recording inputs, at most {size}")
    )
    felt = [path for job in jobs if job.solver["sensitivity"] for path in job.paths]
    sensitivity: dict[str, Tensor] = {}
    if felt:
        sensitivity = sensitivities(model, felt, states, seed=seed, progress=said("recording sensitivities"))
    return Calibration(statistics, sensitivity)
