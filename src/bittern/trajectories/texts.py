"""Text encoders run once, before the denoiser comes: what a pipeline's `encode_prompt` gave is played back later.

Every diffusers pipeline of today asks its own `encode_prompt` for all that it knows of a text, guidance's second
branch included. So nothing needs to be known of its arguments or of what it returns: it is called as the pipeline
calls it, up to the first call of the denoiser, and what it returned is kept on the host.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bittern.errors import UserError
from bittern.threads import is_small, one_thread
from bittern.trajectories.calling import defaults
from bittern.trajectories.states import to_device

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Texts = Mapping[int, list[Any]]
"""By prompt, what `encode_prompt` returned, call after call; tensors on the CPU."""


class _Reached(Exception):
    """The denoiser was called."""


@torch.no_grad()
def encode_texts(pipe: DiffusionPipeline, denoiser: nn.Module, prompts: Mapping[int, str]) -> Texts:
    """What a pipeline's text encoders make of prompts.

    Args:
        pipe: With its text encoders where they are to run. The denoiser may be on meta.
        denoiser: The one of its components that denoises; it is not run.
        prompts: Texts by their index.

    Raises:
        UserError: for a pipeline that has no `encode_prompt`.
    """
    texts: dict[int, list[Any]] = {}
    own: Any = getattr(pipe, "encode_prompt", None)
    if own is None:
        raise UserError(
            f"{type(pipe).__name__} has no encode_prompt, and its texts cannot be encoded beforehand: load it and call "
            "bittern.quantize(pipe, ...)"
        )
    index = 0

    def encode(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        texts[index].append(to_device(result, "cpu"))
        return result

    def reached(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        raise _Reached

    pipe.encode_prompt = encode
    handle = denoiser.register_forward_pre_hook(reached)
    try:
        with quiet(pipe), one_thread(is_small(denoiser)):
            for index, prompt in prompts.items():
                texts[index] = []
                try:
                    pipe(prompt=prompt, output_type="latent", **defaults(pipe).options())
                except _Reached:
                    continue
    finally:
        handle.remove()
        del pipe.encode_prompt
    return texts


@contextmanager
def playing(pipe: DiffusionPipeline, results: Iterable[Any], device: torch.device) -> Generator[None]:
    """A pipeline whose `encode_prompt` returns these, in turn, on a device; its text encoders are not asked."""
    turn = iter(results)
    pipe.encode_prompt = lambda *_args, **_kwargs: to_device(next(turn), device)
    try:
        yield
    finally:
        del pipe.encode_prompt


@contextmanager
def quiet(pipe: DiffusionPipeline) -> Generator[None]:
    """A pipeline without a progress bar of its own."""
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**({"disable": False} | bar))


def run_on(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Has a pipeline make its tensors on a device, wherever its components are.

    A pipeline takes the device of its first component; one whose denoiser is on meta or in pieces must be told.
    """
    there = property(lambda _pipe: device)
    own = type(pipe)
    pipe.__class__ = type(own.__name__, (own,), {"_execution_device": there, "device": there})
