"""CUDA graphs without CUDA: operations on the tensors of one call, and nothing of Python's, run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def storages(tree: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, Tensor)}


class Tape(TorchDispatchMode):
    """Writes operations down. Aliases of their arguments stay where they were, whatever becomes of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        here = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs or {}))
        # Views follow what they are views of.
        if not storages(out) <= storages(here) or func._schema.is_mutable:
            self.steps.append((func, *here, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            again = func(*args, **kwargs)
            for was, now in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(was, Tensor) and not func._schema.is_mutable:
                    was.copy_(now)


class Recorder:
    """As `bittern.graphs.Recorder`. `fails` raises in the middle of the next recordings."""

    fails: Exception | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        if Recorder.fails is not None:
            try:
                raise Recorder.fails
            except Exception:
                raise RuntimeError("the recording is invalid")  # noqa: B904
        with Tape() as tape:
            result = call()
        # What a graph returns is not there before its first replay.
        tree_map_only(Tensor, lambda t: t.fill_(float("nan")), result)
        return tape.replay, result

    def take_turns(self) -> None: ...

    def finish(self) -> None: ...
