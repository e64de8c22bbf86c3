"""Finished blocks that are not run again: the same numbers, no more runs and no more memory than is said."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from bittern.trajectories import Skipping, State, call_order, dependence, most_bytes
from bittern.trajectories.skipping import Use


def block(k: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(k, 8), nn.GELU(), nn.Linear(8, 6))


class Middle(nn.Module):
    """A block around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.side = nn.Linear(6, 6), block(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x).sin()) + self.side(x)


class Toy(nn.Module):
    """Two blocks down, one in the middle, two up that read what the first ones gave; written to in place between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.ends = nn.Linear(6, 6), nn.ModuleList([block(), block(), block(12), block(12)])
        self.middle = Middle()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for down in self.ends[:2]:
            x = down(x)
            x += 1
            skips.append(x)
        x = self.middle(x)
        for up in self.ends[2:]:
            x = up(torch.cat([x, skips.pop()], dim=-1))
        return x


BLOCKS = ["ends.0", "ends.1", "middle.inner", "middle", "ends.2", "ends.3"]
READ = {
    "ends.0.0": 0, "ends.0.2": 0, "ends.1.0": 1, "middle.first": 2, "middle.inner.0": 3, "middle.inner.2": 3,
    "middle.side": 4, "ends.2.0": 5, "ends.2.2": 5, "ends.3.0": 6,
}  # fmt: skip
"""Layers whose inputs are recorded, and when."""


@pytest.fixture
def model() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def states(count: int = 3) -> list[State]:
    return [State(i, 0, (torch.randn(4, 6, generator=torch.Generator().manual_seed(i)),), {}) for i in range(count)]


def test_order_and_dependence(model: Toy) -> None:
    order = call_order(model, [*READ, "stem"], states()[0])
    assert sorted(order, key=order.__getitem__) == ["stem", *READ]
    # A block runs for the last time in the turn after its own: until then what it reads is needed.
    uses = dependence(model, [*BLOCKS, "ends"], READ, states()[0])
    assert uses == {
        "ends.0": Use(1, 7, 96),  # read by the next block, and by the last
        "ends.1": Use(2, 6, 96),  # by the middle, and by the first on the way up
        "middle.inner": Use(4, 5, 96),  # no layer reads it, but the block around it is still to run
        "middle": Use(5, 6, 96),
        "ends.2": Use(6, 7, 96),
        "ends.3": Use(7, -1, 96),
    }
    assert most_bytes(uses, 3) == 4 * 3 * 96


def inputs(model: Toy, name: str, given: list[State]) -> list[Tensor]:
    """What a layer reads."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for state in given:
            state.replay(model)
    handle.remove()
    return seen


@torch.no_grad()
def test_replays_give_the_same_run_a_block_only_once_more_and_take_the_memory_that_is_said(model: Toy) -> None:
    given = states()
    expected = {name: inputs(model, name, given) for name in READ}
    uses = dependence(model, BLOCKS, READ, given[0])
    skipping, runs, most = Skipping(uses, len(given)), Counter[str](), 0
    for name in READ:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: runs.update([name]))
    for turn in range(1 + max(READ.values())):
        finished = [name for name in BLOCKS if uses[name].first <= turn]
        names = [name for name, when in READ.items() if when == turn]
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(lambda _m, args, s=s: s.append(args[0].clone()))
            for name, s in seen.items()
        ]
        runs.clear()
        with skipping.replaying(model, finished, turn):
            for state in given:
                state.replay(model)
                most = max(most, skipping.nbytes)
        for handle in handles:
            handle.remove()
        for name in names:
            assert all(torch.equal(a, b) for a, b in zip(seen[name], expected[name], strict=True)), name
        for name in READ:
            until = min(uses[other].first for other in BLOCKS if name.startswith(f"{other}."))
            assert runs[name] == (len(given) if turn <= until else 0), (turn, name)
    assert most_bytes(uses, 1) < most <= most_bytes(uses, len(given))
    assert skipping.knows("ends.2.0") and not skipping.knows("ends.3.0")
    assert "forward" not in model.ends[0].__dict__
    # Known, but let go: NaN, which nobody could take for the real thing.
    for turn, gone in ((7, False), (8, True)):
        with skipping.replaying(model, BLOCKS, turn):
            assert all(bool(torch.isnan(state.replay(model)).all()) is gone for state in given)
    assert skipping.nbytes == 0
