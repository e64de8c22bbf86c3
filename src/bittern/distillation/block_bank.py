"""What one block of the teacher is given and gives along the teacher's trajectories, block after block.

The states of the bank are replayed once for each block. Blocks before it are not run again: they give what they gave
before (`trajectories.skipping`), and the replay ends where the block in hand has answered. What is kept of a block is
let go before the next one.

    bytes = states · (what a block is given and gives + outputs of blocks before it that are still asked for)

Of FLUX.1 at 1024 x 1024 that is 85 MB a state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bittern.distillation.bank import Bank, narrow, wide
from bittern.errors import UserError
from bittern.threads import is_small, one_thread
from bittern.trajectories import Skipping, State, call_order, dependence, device_of, most_bytes, pack, unpack

WATCHED = 8
"""One state in so many is watched, and not learned."""


class _Answered(Exception):
    """The block in hand has answered."""


@dataclass(frozen=True)
class BlockBank:
    """States of a block, and the teacher's answers there.

    Attributes:
        tree: Its arguments, with names in place of tensors (see `trajectories.pack`).
        fixed: Tensors that are always the same.
        given: Tensors of each state, by name, [states, rows of a state, ...].
        answers: What it gives, tensor by tensor, [states, rows of a state, ...].
        sizes: The mean square of each of the answers.
        at: The step of each state, [states].
        steps: Of a trajectory.
        device: Where the block learns; the tensors may lie elsewhere.
    """

    tree: list[Any]
    fixed: dict[str, Tensor]
    given: dict[str, Tensor]
    answers: list[Tensor]
    sizes: list[float]
    at: Tensor
    steps: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.at)

    def everything(self) -> list[Tensor]:
        """All tensors."""
        return [*self.fixed.values(), *self.given.values(), *self.answers, self.at]

    def steps_of(self, rows: Tensor) -> Tensor:
        """The steps of the trajectories that these states are."""
        return self.at[rows]

    def call(self, rows: Tensor, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the block in these states, 16-bit tensors in `dtype`."""
        tensors = {name: wide(self._rows(tensor, rows), dtype) for name, tensor in self.given.items()}
        (state,) = unpack({**self.fixed, **tensors}, self.tree)
        return state.args, state.kwargs

    def missed(self, answer: Any, rows: Tensor) -> Tensor:
        """The squared error of an answer in each of these states, relative to the answers: each tensor counts alike."""
        total = torch.zeros(len(rows), device=self.device)
        for leaf, wanted, size in zip(_tensors(answer), self.answers, self.sizes, strict=True):
            error = leaf.float() - self._rows(wanted, rows).float()
            total = total + error.square().reshape(len(rows), -1).mean(dim=1) / size
        return total / len(self.answers)

    def _rows(self, tensor: Tensor, rows: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)].to(self.device).flatten(0, 1)

    def split(self, count: int) -> tuple[BlockBank, BlockBank]:
        """The first states, and the others."""
        parts: list[BlockBank] = []
        for part in (slice(None, count), slice(count, None)):
            given = {name: tensor[part] for name, tensor in self.given.items()}
            answers = [tensor[part] for tensor in self.answers]
            parts.append(
                BlockBank(self.tree, self.fixed, given, answers, self.sizes, self.at[part], self.steps, self.device)
            )
        return parts[0], parts[1]


class Walk:
    """A teacher that is replayed block by block.

    Args:
        teacher: Its weights may wait on the host.
        blocks: Paths of its blocks, none within another.
        banks: States to learn from, and states to watch.
        room: Bytes that may be kept.
        batch: States of a replay.
        dtype: What the teacher computes in.
        device: Where blocks learn.
        seed: Of the choice of states.

    Attributes:
        order: The blocks in the order of their calls.
        learned: How many states are learned from.

    Raises:
        UserError: for blocks that are not called once, and for too little room.
    """

    def __init__(
        self,
        teacher: nn.Module,
        blocks: Sequence[str],
        banks: tuple[Bank, Bank],
        *,
        room: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        self.teacher, self.banks, self.dtype, self.device = teacher, banks, dtype, device
        self.small = is_small(teacher)
        here = device_of(teacher)
        states = [self._state(banks[0], torch.arange(count) % len(banks[0])).to(here) for count in (1, 2)]
        one = states[0]
        called = call_order(teacher, blocks, one)
        self.order = sorted(called, key=called.__getitem__)
        uses = dependence(teacher, self.order, {path: turn for turn, path in enumerate(self.order)}, one)
        self.shapes = shapes_of(teacher, blocks, states)
        # Outputs that are kept: those of a state in hand are there twice, which is little of many.
        self.state_bytes = max(shapes.nbytes for shapes in self.shapes.values()) + most_bytes(uses, 1) // 2
        count = min(room // self.state_bytes, len(banks[0]) + len(banks[1]))
        if count < 2:
            raise UserError(
                f"bank_gib {room / 2**30:g}: one state of a block takes {self.state_bytes / 2**30:.2g} GiB; expected "
                "room for two at least"
            )
        watched = min(max(1, count // WATCHED), len(banks[1]))
        self.learned = min(count - watched, len(banks[0]))
        self.batches: list[tuple[Bank, Tensor]] = []
        for bank, wanted in zip(banks, (self.learned, watched), strict=True):
            chosen = sorted(random.Random(f"states:{seed}").sample(range(len(bank)), wanted))
            self.batches += [(bank, rows) for rows in torch.tensor(chosen).split(batch)]
        self.skipping = Skipping(uses, len(self.batches))

    def _state(self, bank: Bank, rows: Tensor) -> State:
        return State(0, 0, *bank.call(rows.to(bank.device), self.dtype))

    @torch.no_grad()
    def record(self, turn: int) -> tuple[BlockBank, BlockBank]:
        """What the block of this turn was given and gave: states to learn, and states to watch.

        Turns are in order; the first of a run may be any.
        """
        path = self.order[turn]
        grows = self.shapes[path].grows
        home = self.banks[0].device
        found: list[tuple[dict[str, Tensor], list[Tensor]]] = []
        fixed: dict[str, Tensor] = {}
        trees: list[list[Any]] = []

        def given(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors, tree = pack([State(0, 0, args, kwargs)])
            for name, tensor in tensors.items():
                if name not in grows and not torch.equal(fixed.setdefault(name, tensor.clone()), tensor):
                    raise UserError(
                        f"{path} is given a tensor {list(tensor.shape)} that changes and does not belong to a state: "
                        "such models cannot learn block by block; take another `mode`"
                    )
            # Copies: a block may write into what it is given.
            found.append(({name: by_state(tensors[name]) for name in sorted(grows)}, []))
            trees.append(tree)

        def answered(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            found[-1][1].extend(by_state(tensor) for tensor in _tensors(output))
            raise _Answered

        def by_state(tensor: Tensor) -> Tensor:
            return narrow(tensor).to(home).unflatten(0, (len(rows), -1))

        block = self.teacher.get_submodule(path)
        hooks = block.register_forward_pre_hook(given, with_kwargs=True), block.register_forward_hook(answered)
        try:
            with one_thread(self.small), self.skipping.replaying(self.teacher, self.order[:turn], turn):
                for bank, rows in self.batches:
                    with suppress(_Answered):
                        self._state(bank, rows).replay(self.teacher)
        finally:
            for hook in hooks:
                hook.remove()
        names, leaves = found[0][0], range(len(found[0][1]))
        tensors = {name: torch.cat([part[name] for part, _ in found]) for name in names}
        answers = [torch.cat([part[leaf] for _, part in found]) for leaf in leaves]
        sizes = [max(float(answer.float().square().mean()), 1e-12) for answer in answers]
        at = torch.cat([bank.steps_of(rows) for bank, rows in self.batches]).to(self.device)
        fixed = {name: tensor.to(self.device) for name, tensor in fixed.items()}
        whole = BlockBank(trees[0], fixed, tensors, answers, sizes, at, self.banks[0].steps, self.device)
        return whole.split(self.learned)


@dataclass(frozen=True)
class Shapes:
    """What a block is given and gives in one state, on meta.

    Attributes:
        tree: Its arguments (see `trajectories.pack`).
        given: Tensors of them, by name.
        answers: What it gives.
        grows: Names of the tensors that belong to a state.
    """

    tree: list[Any]
    given: dict[str, Tensor]
    answers: list[Tensor]
    grows: set[str]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept of a state."""
        return sum(narrow(t).nbytes for t in (*(self.given[name] for name in self.grows), *self.answers))

    def bank(self, states: int, steps: int, device: torch.device) -> BlockBank:
        """So many states on meta, as if they waited on the host to be learned on a device."""

        def many(tensor: Tensor) -> Tensor:
            return narrow(tensor).expand(states, *tensor.shape)

        fixed = {name: torch.zeros_like(t, device=device) for name, t in self.given.items() if name not in self.grows}
        given = {name: many(self.given[name]) for name in sorted(self.grows)}
        at = torch.zeros(states, dtype=torch.int64, device=device)
        answers = [many(answer) for answer in self.answers]
        return BlockBank(self.tree, fixed, given, answers, [1.0] * len(answers), at, steps, device)


@torch.no_grad()
def shapes_of(model: nn.Module, blocks: Sequence[str], states: Sequence[State]) -> dict[str, Shapes]:
    """Of each block that is called.

    Args:
        model: The teacher; it may be on meta.
        blocks: Paths.
        states: One with one row, and one with two, where the model is.

    Raises:
        UserError: for a block that is called more than once, and for an answer that does not belong to a state.
    """
    calls: list[dict[str, tuple[dict[str, Tensor], list[Any], list[Tensor]]]] = []

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if path in calls[-1]:
                raise UserError(f"{path} is called more than once: it cannot learn by itself; take another `mode`")
            tensors, tree = pack([State(0, 0, args, kwargs)])
            given = {name: tensor.to("meta") for name, tensor in tensors.items()}
            calls[-1][path] = given, tree, [tensor.to("meta") for tensor in _tensors(output)]

        return hook

    handles = [model.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True) for path in blocks]
    try:
        with one_thread(is_small(model)):
            for state in states:
                calls.append({})
                model(*state.args, **state.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    one, two = calls
    found: dict[str, Shapes] = {}
    for path, (given, tree, answers) in one.items():
        grows = {name for name, t in given.items() if t.ndim and len(two[path][0][name]) == 2 * len(t)}
        if not all(t.ndim and len(other) == 2 * len(t) for t, other in zip(answers, two[path][2], strict=True)):
            raise UserError(f"{path} gives a tensor of no state: it cannot learn by itself; take another `mode`")
        found[path] = Shapes(tree, given, answers, grows)
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
