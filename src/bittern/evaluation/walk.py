"""Where few bits leave the path of 16: latents along both trajectories, and the velocity on the reference's.

A model that draws by itself leaves the reference's path a little more with every step; the latents tell how far. The
velocity (or the noise, whatever the denoiser predicts) is asked at the reference's own states: what a step adds, apart
from what earlier steps did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import pipelines
from bittern.quantization import component
from bittern.threads import is_small, one_thread
from bittern.trajectories.states import State

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MOST_PROMPTS = 4
"""Prompts that are walked with, in one batch: what a state keeps of the text is megabytes for a large model."""


@dataclass(frozen=True)
class Walk:
    """One batch's way from noise to picture, on the host.

    Attributes:
        kind: the denoiser's class.
        dtype: what the denoiser computes in.
        latents: after each step, float32.
        calls: what the denoiser was called with, if that was kept.
        velocities: what it gave, float32.
    """

    kind: str
    dtype: torch.dtype
    latents: list[Tensor] = field(default_factory=list[Tensor])
    calls: list[State] = field(default_factory=list[State])
    velocities: list[Tensor] = field(default_factory=list[Tensor])


@dataclass(frozen=True)
class Departure:
    """How far a model is from the reference; errors are root mean squares over that of the reference.

    Attributes:
        velocity: over all calls along the reference's path.
        latents: after each step, each model on its own path.
        prompts: how many were walked with.
    """

    velocity: float
    latents: list[float]
    prompts: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "velocity_error": self.velocity,
            "latent_error": self.latents[-1],
            "latent_error_by_step": self.latents,
            "trajectory_prompts": self.prompts,
        }


def kind_of(pipe: DiffusionPipeline) -> str:
    """The class of a pipeline's denoiser: only two of one class can be asked the same."""
    return type(component(pipe)).__name__


@torch.no_grad()
def walk(pipe: DiffusionPipeline, prompts: Sequence[str], *, seed: int, steps: int | None, keep_calls: bool) -> Walk:
    """Denoise a batch without decoding it.

    Args:
        pipe: the pipeline.
        prompts: one batch.
        seed: of the first prompt's noise; the next has the next.
        steps: denoising steps; None for the pipeline's own.
        keep_calls: whether to keep the denoiser's calls and what it gave.
    """
    denoiser = component(pipe)
    found = Walk(kind_of(pipe), denoiser.dtype)

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.calls.append(State(0, len(found.calls), args, kwargs).to("cpu"))
        found.velocities.append(_flat(output))

    def note(_pipe: object, _step: int, _time: object, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found.latents.append(state["latents"].float().cpu())
        return state

    handle = denoiser.register_forward_hook(keep, with_kwargs=True) if keep_calls else None
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed + index) for index in range(len(prompts))]
    options = pipelines.defaults(pipe).options(steps) | {"output_type": "latent", "callback_on_step_end": note}
    try:
        with one_thread(is_small(denoiser) and pipe.device.type == "cpu"):
            pipe(prompt=list(prompts), generator=generators, **options)
    finally:
        if handle is not None:
            handle.remove()
        pipe.set_progress_bar_config(**({"disable": False} | bar))
    return found


@torch.no_grad()
def departure(
    pipe: DiffusionPipeline, reference: Walk, prompts: Sequence[str], *, seed: int, steps: int | None
) -> Departure:
    """Walk with a model, and ask it for its velocity along the reference's way.

    Args:
        pipe: the model's pipeline.
        reference: the reference's walk with the same prompts, seed and steps, with its calls.
        prompts: one batch.
        seed: of the first prompt's noise.
        steps: denoising steps.
    """
    own = walk(pipe, prompts, seed=seed, steps=steps, keep_calls=False)
    denoiser = component(pipe)
    wrong = right = 0.0
    with one_thread(is_small(denoiser) and pipe.device.type == "cpu"):
        for call, velocity in zip(reference.calls, reference.velocities, strict=True):
            if denoiser.dtype != reference.dtype:
                cast = partial(_cast, before=reference.dtype, after=denoiser.dtype)
                call = replace(call, args=cast(call.args), kwargs=cast(call.kwargs))
            wrong += float((_flat(call.replay(denoiser)) - velocity).double().square().sum())
            right += float(velocity.double().square().sum())
    return Departure(
        velocity=(wrong / right) ** 0.5,
        latents=[_error(a, b) for a, b in zip(own.latents, reference.latents, strict=True)],
        prompts=len(prompts),
    )


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """What one model was called with, for a model that computes in another dtype."""
    if isinstance(value, Tensor):
        return value.to(after) if value.dtype == before else value
    if type(value) in (list, tuple):
        return type(value)(_cast(part, before, after) for part in value)
    if type(value) is dict:
        return {key: _cast(part, before, after) for key, part in value.items()}
    return value


def _error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).double().norm() / reference.double().norm())


def _flat(output: Any) -> Tensor:
    """What a denoiser gives, whatever it is wrapped in, as one row of float32 on the host."""
    if not isinstance(output, Tensor | list | tuple):
        output = output.sample
    elif isinstance(output, tuple):
        output = output[0]
    parts = output if isinstance(output, list) else [output]
    return torch.cat([part.float().flatten().cpu() for part in parts])
