"""Replays that do not run again what has not changed: finished blocks give what they gave before.

A block that will not change any more gives the same outputs for the same state from then on. They are kept on the host
when it runs for the last time; in later replays it is not called. What lies between the blocks runs as it is, so that a
skip connection, a concatenation or a second stream of tokens needs no special case: whoever asks for the output of a
block gets it. An output is kept as long as anything that has still to run depends on it (`dependence`); from then on
the block gives NaN, which would be seen in what is recorded.

A turn is a replay of all states, in which the inputs of some layers are recorded. These layers are then solved, so that
blocks of which they are the last finish with that turn; in the next one they run for the last time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bittern.threads import is_small, one_thread
from bittern.trajectories.states import State, device_of

NEVER = 2**31
"""A turn that does not come."""


@dataclass(frozen=True)
class Use:
    """When a block's output is asked for.

    Attributes:
        first: The turn in which the block runs for the last time.
        last: The last turn in which something that runs depends on it; -1 if nothing does.
        nbytes: Of the output, for one state.
    """

    first: int
    last: int
    nbytes: int


class Skipping:
    """The outputs of finished blocks.

    Args:
        uses: Of every block that may be skipped, by path: what `dependence` gave.
        states: How many are replayed, in order.
    """

    def __init__(self, uses: Mapping[str, Use], states: int) -> None:
        self.uses, self.states = uses, states
        self.kept: dict[str, list[list[Any]]] = {}

    def knows(self, path: str) -> bool:
        """Whether a module lies in a block whose outputs are all known."""
        blocks = (block for block, outputs in self.kept.items() if len(outputs) == self.states)
        return any(path == block or path.startswith(f"{block}.") for block in blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs that are kept."""
        tensors = (leaf for leaf in tree_leaves(list(self.kept.values())) if isinstance(leaf, Tensor))
        return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)

    @contextmanager
    def replaying(self, model: nn.Module, finished: Collection[str], turn: int) -> Generator[None]:
        """Within it every state is replayed once, in order.

        Known blocks are skipped, of other finished ones the outputs are kept; those on which no later turn depends go
        as soon as their state has been replayed.

        Args:
            model: The denoiser; its blocks may be on several devices.
            finished: Paths of blocks that will not change any more.
            turn: Which replay this is.
        """
        device, state, calls = device_of(model), [-1], dict[str, int]()

        def begin(*_: Any) -> None:
            self._release(state[0], turn)
            state[0] += 1
            calls.clear()

        def answer(block: str) -> Callable[..., Any]:
            def forward(*_args: Any, **_kwargs: Any) -> Any:
                calls[block] = calls.get(block, 0) + 1
                return _answer(self.kept[block][state[0]][calls[block] - 1], device)

            return forward

        def keep(block: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                outputs = self.kept.setdefault(block, [])
                if len(outputs) == state[0]:
                    outputs.append([])
                outputs[-1].append(_to(output, "cpu"))

            return hook

        known = {block for block in finished if block in self.uses and self.knows(block)}
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(begin).remove)
            for block in known:
                stack.enter_context(_instead(model.get_submodule(block), answer(block)))
            for block in finished:
                if block in self.uses and not self.knows(block):
                    self.kept.pop(block, None)
                    stack.callback(model.get_submodule(block).register_forward_hook(keep(block)).remove)
            yield
            self._release(state[0], turn)

    def _release(self, state: int, turn: int) -> None:
        """Of a state that was replayed in a turn, lets go of outputs for which no later one asks; shapes stay."""
        for block, outputs in self.kept.items():
            if 0 <= state < len(outputs) and self.uses[block].last <= turn:
                outputs[state] = _to(outputs[state], "meta")


@torch.no_grad()
def call_order(model: nn.Module, paths: Sequence[str], state: State) -> dict[str, int]:
    """In which place each module is called first; modules that are never called are left out."""
    order: dict[str, int] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            order.setdefault(path, len(order))

        return hook

    with one_thread(is_small(model)), ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(watch(path)).remove)
        state.replay(model)
    return order


@torch.no_grad()
def dependence(model: nn.Module, blocks: Sequence[str], readers: Mapping[str, int], state: State) -> dict[str, Use]:
    """In which turns the output of each block is asked for; blocks that are never called are left out.

    NaN in place of one block's output, and zeros in place of the others', show in the inputs that depend on it. Only
    what lies between the blocks runs for that, once a block.

    Args:
        model: The denoiser.
        blocks: Paths of modules, which may lie within each other.
        readers: Of modules whose inputs are recorded, by path, the turn in which they are; all lie in blocks.
        state: A call of the model.
    """
    shapes: dict[str, list[Any]] = {block: [] for block in blocks}

    def note(block: str) -> Callable[..., None]:
        return lambda _module, _args, output: shapes[block].append(_to(output, "meta"))

    with one_thread(is_small(model)), ExitStack() as stack:
        for block in blocks:
            stack.callback(model.get_submodule(block).register_forward_hook(note(block)).remove)
        state.replay(model)
    device, uses = device_of(model), dict[str, Use]()
    turns = {block: [turn for path, turn in readers.items() if _within(path, block)] for block in blocks}
    called = [block for block in blocks if shapes[block] and turns[block]]
    first = {block: max(turns[block]) + 1 for block in called}
    for block in called:
        seen = {-1}
        with one_thread(is_small(model)), ExitStack() as stack:
            # What reads the output runs until the smallest block around it is known.
            for path in readers:
                until = min((first[other] for other in called if _within(path, other)), default=NEVER)
                hook = model.get_submodule(path).register_forward_pre_hook(_look(until, seen), with_kwargs=True)
                stack.callback(hook.remove)
            for other in called:
                module, calls = model.get_submodule(other), iter(shapes[other])
                if _within(block, other) and other != block:
                    # It has to run, for the block to be called; and once it is known, nobody asks for what is in it.
                    stack.callback(module.register_forward_hook(_look(first[other], seen)).remove)
                    continue
                value = float("nan") if other == block else 0.0
                stack.enter_context(_instead(module, _blank(calls, value, device)))
                hook = module.register_forward_pre_hook(_look(first[other], seen), with_kwargs=True)
                stack.callback(hook.remove)
            state.replay(model)
        nbytes = sum(t.nbytes for t in tree_leaves(shapes[block]) if isinstance(t, Tensor))
        around = (first[other] for other in called if _within(block, other) and other != block)
        uses[block] = Use(first[block], min(max(seen), *around, NEVER), nbytes)
    return uses


def most_bytes(uses: Mapping[str, Use], states: int) -> int:
    """Bytes of the outputs that are kept at a time, at most, if all states are like the one that was looked at."""
    turns = {use.first for use in uses.values()}
    least = max((sum(u.nbytes for u in uses.values() if u.first <= t < u.last) for t in turns), default=0)
    # The state in hand may have what it was given and what it gives.
    return (states + 1) * least


def _look(turn: int, seen: set[int]) -> Callable[..., None]:
    """A hook that notes a turn if it meets NaN."""

    def hook(_module: nn.Module, *values: Any) -> None:
        if any(bool(leaf.isnan().any()) for leaf in tree_leaves(values) if _is_float(leaf)):
            seen.add(turn)

    return hook


def _within(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _to(tree: Any, device: str | torch.device) -> Any:
    """Copies of all tensors on a device: a model may write into what it is given."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to(device, copy=True), tree)


def _filled(tree: Any, value: float, device: torch.device) -> Any:
    """Tensors of these shapes with one value."""
    return tree_map_only(
        Tensor, lambda t: torch.full(t.shape, value if _is_float(t) else 0, dtype=t.dtype, device=device), tree
    )


def _answer(tree: Any, device: torch.device) -> Any:
    """An output that was kept; NaN in the place of one that was not."""
    gone = any(tensor.is_meta for tensor in tree_leaves(tree) if isinstance(tensor, Tensor))
    return _filled(tree, float("nan"), device) if gone else _to(tree, device)


def _blank(outputs: Any, value: float, device: torch.device) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: _filled(next(outputs), value, device)


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Another forward for a module, whether its own is its class's or one that a library has put there."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
