"""Denoising from noise in full precision, and keeping the calls of the denoiser that were chosen beforehand.

A *sample* is one (prompt, step) pair. The pairs are drawn first; a prompt's trajectory then ends after the last of
its steps, and nothing is decoded. Prompts run one by one, so that guidance needs no special case: whatever the
pipeline gives its denoiser in a step (both branches in one batch, or two calls) is what is kept.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern.errors import UserError
from bittern.threads import is_small, one_thread
from bittern.trajectories.calling import defaults
from bittern.trajectories.states import Moved, State, device_of
from bittern.trajectories.texts import Texts, playing, quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STEPS_PER_PROMPT = 8
"""Steps kept of one trajectory: fewer would waste the steps before them, more would see too few prompts."""


def choose(prompts: int, steps: int, samples: int, seed: int) -> dict[int, tuple[int, ...]]:
    """The steps to keep of each prompt that is used.

    As many prompts as `STEPS_PER_PROMPT` steps each ask for, drawn without repetition; more steps of each where
    prompts are few. A prompt's steps are drawn one from each of as many equal stretches of the trajectory, so that
    early and late steps are met equally often.

    Args:
        prompts: How many there are.
        steps: Denoising steps of a trajectory.
        samples: Pairs wanted; at most prompts x steps are given.
        seed: The same seed gives the same pairs.
    """
    rng = random.Random(f"samples:{seed}")
    samples = min(samples, prompts * steps)
    used = min(prompts, -(-samples // min(STEPS_PER_PROMPT, steps)))
    chosen: dict[int, tuple[int, ...]] = {}
    for turn, prompt in enumerate(sorted(rng.sample(range(prompts), used))):
        count = samples * (turn + 1) // used - samples * turn // used
        starts = [steps * i // count for i in range(count + 1)]
        chosen[prompt] = tuple(rng.randrange(a, b) for a, b in itertools.pairwise(starts))
    return chosen


class _Enough(Exception):
    """The last step of a trajectory that somebody wants is done."""


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline,
    denoiser: nn.Module,
    prompts: Sequence[str],
    samples: int,
    *,
    seed: int = 0,
    texts: Texts | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> list[State]:
    """The denoiser's calls at seeded (prompt, step) pairs; see `choose`.

    A prompt's noise comes from a generator of its own, so that a state depends on nothing but its prompt, step and
    seed. The states go to the host and take their `nbytes` each. A small model runs in one thread.

    Args:
        pipe: In full precision.
        denoiser: The one of its components that is to be quantized.
        prompts: Texts.
        samples: (prompt, step) pairs.
        seed: Of the pairs and of the noise.
        texts: What `encode_texts` gave for the prompts that `choose` takes; None asks the pipeline's encoders.
        progress: Called with trajectories done and their number.

    Raises:
        UserError: if a trajectory stops being finite.
    """
    call = defaults(pipe)
    chosen = choose(len(prompts), call.steps, samples, seed)
    states: list[State] = []
    position = [0, 0]
    last: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    moved: Moved = {}

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prompt, step = position
        last[:] = [(args, kwargs)]
        if step in chosen[prompt]:
            states.append(State(prompt, step, args, kwargs).to("cpu", moved))

    step_of_scheduler: Any = pipe.scheduler.step

    @functools.wraps(step_of_scheduler)
    def advance(*args: Any, **kwargs: Any) -> Any:
        result = step_of_scheduler(*args, **kwargs)
        prompt, step = position
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        if not torch.isfinite(latents).all():
            layer = first_overflow(denoiser, *last[0])
            raise UserError(
                f"the model gives NaN or infinity at step {step + 1} of {prompts[prompt]!r}"
                f"{layer and f', first in {layer}'}: try another dtype"
            )
        if step >= chosen[prompt][-1]:
            raise _Enough
        position[1] = step + 1
        return result

    pipe.scheduler.step = advance
    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    if progress:
        progress(0, len(chosen))
    try:
        with quiet(pipe), one_thread(is_small(denoiser)):
            for done, prompt in enumerate(chosen):
                position[:] = prompt, 0
                moved.clear()
                generator = torch.Generator("cpu").manual_seed((seed << 20) + prompt)
                played = playing(pipe, texts[prompt], device_of(denoiser)) if texts is not None else nullcontext()
                with played, suppress(_Enough):
                    pipe(prompt=prompts[prompt], generator=generator, output_type="latent", **call.options())
                if progress:
                    progress(done + 1, len(chosen))
    finally:
        handle.remove()
        del pipe.scheduler.step
    return states


def first_overflow(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The first layer of a model whose output is not finite in a call; empty if none is."""
    found: list[str] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(path)

        return hook

    leaves = [(path, module) for path, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(watch(path)) for path, module in leaves]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""
