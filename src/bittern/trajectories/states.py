"""The denoiser's calls that were chosen, kept on the host, and replayed.

A state is what the denoiser was called with and nothing else, so it is small: of FLUX.1 at 1024 x 1024 half a megabyte
of latents, and 4 MB of text states that all states of one prompt share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Moved = dict[int, tuple[Tensor, Tensor]]
"""By the `id` of a tensor: itself, so that the `id` stays its own, and its copy on another device."""


@dataclass(frozen=True)
class State:
    """One call of the denoiser.

    Attributes:
        prompt: Index of the prompt.
        step: Index of the denoising step.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    prompt: int
    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors; those that do not change with the step are shared by a prompt's states."""
        return states_bytes([self])

    def to(self, device: str | torch.device, moved: Moved | None = None) -> State:
        """The state with its tensors on a device.

        Args:
            device: Where to.
            moved: What is there already, and gets what comes; with it tensors that states share stay shared.
        """
        moved = {} if moved is None else moved
        return replace(self, args=to_device(self.args, device, moved), kwargs=to_device(self.kwargs, device, moved))

    def replay(self, model: nn.Module) -> Any:
        """Calls a model with the state, on the model's device."""
        here = self.to(device_of(model))
        return model(*here.args, **here.kwargs)


def to_device(value: Any, device: str | torch.device, moved: Moved | None = None) -> Any:
    """A tensor, or lists, tuples and mappings of whatever with tensors in them, with the tensors on a device."""
    moved = {} if moved is None else moved
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value, value.to(device)
        return moved[id(value)][1]
    if type(value) in (list, tuple):
        return type(value)(to_device(part, device, moved) for part in value)
    if type(value) is dict:
        return {key: to_device(part, device, moved) for key, part in value.items()}
    return value


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: the device of its first parameter that is anywhere."""
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)


def states_bytes(states: Sequence[State]) -> int:
    """Bytes of the tensors of states, each counted once."""
    return sum(tensor.nbytes for tensor in pack(states)[0].values())


def most_tokens(states: Sequence[State]) -> int:
    """Tokens that any layer can meet in states, at most: a token is a place in what the denoiser is called with.

    Latents [b, c, h, w] or [b, c, f, h, w] have one for each pixel, sequences [b, t, c] one for each step, of images
    and texts together; a model patches and pools, and makes no more of them.
    """

    def tokens(tensor: Tensor) -> int:
        if tensor.dim() < 3:
            return len(tensor) if tensor.dim() else 1
        return tensor.numel() // max(1, tensor.shape[1 if tensor.dim() > 3 else -1])

    return sum(tokens(tensor) for state in states for tensor in pack([state])[0].values())


def pack(states: Sequence[State]) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors by name, and JSON values that say where they belong. Tensors that states share are there once.

    Raises:
        TypeError: for an argument that JSON does not know.
    """
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = names.setdefault(id(value), str(len(names)))
            tensors[name] = value
            return {"tensor": name}
        if type(value) in (list, tuple):
            return {type(value).__name__: [described(part) for part in value]}
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {"dict": {key: described(part) for key, part in value.items()}}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} cannot be kept")

    tree = [[state.prompt, state.step, described(state.args), described(state.kwargs)] for state in states]
    return tensors, tree


def unpack(tensors: Mapping[str, Tensor], tree: Sequence[Any]) -> list[State]:
    """The states of which `pack` gave the tensors and the tree."""

    def made(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: made(part) for key, part in content.items()}
        parts = [made(part) for part in content]
        return tuple(parts) if kind == "tuple" else parts

    return [State(prompt, step, made(args), made(kwargs)) for prompt, step, args, kwargs in tree]
