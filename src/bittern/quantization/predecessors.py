"""Few-bit layers in the place of a model's own while the blocks behind them are recorded.

A layer meets in the few-bit model what the few-bit blocks before it give. A recipe with `predecessors: few-bit` solves
it for that: blocks are recorded one by one, in the order of their calls, with the layers in place that are solved.
Their activations are rounded as in the solver, to the bits of their scheme.

The outputs of finished blocks are kept, so that a replay of the samples runs the block in hand and the one before it,
and no more (`trajectories.skipping`); where the host has no room for them, it runs all blocks up to the one in hand.

    host memory    (samples + 1) x bytes of the outputs of blocks that something still depends on: of a transformer
                   those of one block, of a U-Net also those that skip connections carry
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from bittern.errors import memory_size
from bittern.layers import FewBitLayer, swap
from bittern.quantization.memory import Blocks
from bittern.threads import is_small, one_thread
from bittern.trajectories import Skipping, State, call_order, dependence, device_of, most_bytes

Finished = Sequence[tuple[str, Mapping[str, FewBitLayer]]]
"""Blocks that an earlier run has solved: their names, and their layers by path."""


class Predecessors:
    """What is solved of a model, and what it gives.

    Args:
        model: In full precision.
        blocks: To be solved.
        finished: Solved before.
        states: Samples.
        room: Bytes of the host for outputs.

    Attributes:
        order: Indices of the blocks in the order of their calls.
        kept_bytes: Of the host, that outputs take at most.
        said: How it is done, for people.
    """

    def __init__(
        self, model: nn.Module, blocks: Blocks, finished: Finished, states: Sequence[State], room: int
    ) -> None:
        self.small = is_small(model)
        targets = {name: [path for job in jobs for path in job.paths] for name, jobs in blocks}
        targets |= {name: list(layers) for name, layers in finished}
        called = call_order(model, [path for paths in targets.values() for path in paths], states[0])
        # Names are in the order of the model's modules; a U-Net has its middle behind its ends there.
        places = {name: (min(called.get(path, len(called)) for path in paths), name) for name, paths in targets.items()}
        turns = {name: turn for turn, name in enumerate(sorted(places, key=places.__getitem__))}
        self.turns = [turns[name] for name, _ in blocks]
        self.order = sorted(range(len(blocks)), key=self.turns.__getitem__)
        self.parents = list(dict.fromkeys(name.partition(".")[2] for name in targets))
        uses = dependence(
            model, self.parents, {path: turns[name] for name, paths in targets.items() for path in paths}, states[0]
        )
        needed = most_bytes(uses, len(states))
        self.skipping = Skipping(uses if needed <= room else {}, len(states))
        self.kept_bytes = needed if needed <= room else 0
        self.said = f"calibrating {len(blocks)} blocks one by one, each behind the few-bit ones before it"
        if not self.kept_bytes:
            self.said += f"; their outputs would take {memory_size(needed)} of records: all of them run every time"
        self.missing = {path for paths in targets.values() for path in paths}
        self.layers: dict[str, FewBitLayer] = {}
        self.model: nn.Module | None = None
        self.placed: dict[str, ExitStack] = {}
        for _, layers in finished:
            self.put(layers)

    def put(self, layers: Mapping[str, FewBitLayer]) -> None:
        """Takes layers that are solved; inside `within` they are in their places from now on."""
        self.missing -= layers.keys()
        self.layers |= layers
        if self.model is not None:
            self._place(self.model, layers)

    @contextmanager
    def within(self, model: nn.Module) -> Generator[None]:
        """For as long as it lasts the model is few-bit as far as it is solved; afterwards it is as it was."""
        self.model = model
        try:
            self._place(model, self.layers)
            yield
        finally:
            self._remove([*self.placed])
            self.model = None

    @contextmanager
    def turn(self, index: int) -> Generator[None]:
        """Within it the states are replayed once, to record the inputs of a block."""
        assert self.model is not None
        finished = [path for path in self.parents if not any(other.startswith(f"{path}.") for other in self.missing)]
        with one_thread(self.small), self.skipping.replaying(self.model, finished, self.turns[index]):
            yield
        known = [path for path in self.layers if self.skipping.knows(path)]
        self._remove(known)
        for path in known:
            del self.layers[path]

    def _place(self, model: nn.Module, layers: Mapping[str, FewBitLayer]) -> None:
        device = device_of(model)
        for path, layer in layers.items():
            own, undo = model.get_submodule(path), ExitStack()
            self.placed[path] = undo
            undo.callback(swap, model, path, own)
            swap(model, path, layer)
            undo.callback(setattr, layer, "path", layer.path)
            layer.path = "a4" if layer.scheme.activations == 4 else layer.path
            if hasattr(own, "_hf_hook"):  # its weights come from the host, and go again
                undo.callback(layer.register_forward_pre_hook(lambda layer, _: _move(layer, device)).remove)
                undo.callback(layer.register_forward_hook(lambda layer, *_: _move(layer, "cpu")).remove)
            _move(layer, "cpu" if hasattr(own, "_hf_hook") else device)

    def _remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            if path in self.placed:
                self.placed.pop(path).close()


def _move(layer: FewBitLayer, device: torch.device | str) -> None:
    """A layer, and the one that holds its rows."""
    layer.holder.to(device)
    layer.to(device)
