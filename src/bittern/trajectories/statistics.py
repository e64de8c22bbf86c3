"""What solvers need to know of a layer's input: rows of it, and sums over all of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bittern.errors import UserError
from bittern.layers import patches
from bittern.precision import exact_products
from bittern.threads import is_small, one_thread
from bittern.trajectories.states import State


@dataclass(frozen=True)
class Statistics:
    """The inputs of layers that read one tensor, on the host until somebody solves with them.

    Attributes:
        rows: A seeded sample of the tokens, in the model's dtype. A concatenated input is its K-segments side by side.
        gram: X^T X of all `count` tokens, summed in float32; None if nobody asked for it.
        amax: Largest magnitude of each input among all tokens.
        count: Tokens seen.
    """

    rows: Float[Tensor, "m k"]
    gram: Float[Tensor, "k k"] | None
    amax: Float[Tensor, " k"]
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.rows.nbytes + self.amax.nbytes + (0 if self.gram is None else self.gram.nbytes)

    def to(self, device: torch.device) -> Statistics:
        """The same on a device."""
        gram = None if self.gram is None else self.gram.to(device)
        return Statistics(self.rows.to(device), gram, self.amax.to(device), self.count)


class _Enough(Exception):
    """All that is watched has been seen."""


@torch.no_grad()
@exact_products()
def record(
    model: nn.Module,
    paths: Sequence[str],
    states: Sequence[State],
    *,
    rows: int,
    seed: int = 0,
    grams: Collection[str] | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> dict[str, Statistics]:
    """Replays states through the model and watches the inputs of some of its modules.

    Each state gives the same number of tokens, drawn by a generator that depends on the seed, the state and the
    number of tokens alone: layers that see the same tokens are recorded at the same ones. Hooks go on the modules
    themselves, so any attention processor that calls them will do. What is behind the last of them does not run.
    A small model runs in one thread.

    Over paths with K inputs, the device holds 4 K bytes each and 4 K^2 more where a Gram matrix is wanted, and the
    host rows K bytes of an element at most. A path's statistics depend on nothing but the model, the states and the
    seed: recording paths together or one after another gives the same numbers.

    Args:
        model: The denoiser.
        paths: Linears or convolutions; of layers that share an input, one.
        states: What `sample` gave.
        rows: Rows to keep of each input, at most; fewer where there are fewer tokens.
        seed: Of the choice of tokens.
        grams: The paths whose Gram matrix is wanted; None wants all.
        progress: Called with states done and their number.

    Raises:
        UserError: if there is no state, if a module is not reached, or an input is not finite.
    """
    if not states:
        raise UserError("no samples to calibrate with: expected at least one prompt and one sample")
    share = -(-rows // len(states))
    turn = _Turn()
    watches = {path: _Watch(path, rows, share, seed, turn, grams is None or path in grams) for path in paths}
    handles = [model.get_submodule(path).register_forward_pre_hook(watch) for path, watch in watches.items()]
    if progress:
        progress(0, len(states))
    try:
        with one_thread(is_small(model)):
            for index, state in enumerate(states):
                turn.begin(index)
                # Exceptions leave a forward pass quickly, and there is no other way out of one that is not ours.
                with suppress(_Enough):
                    state.replay(model)
                if progress:
                    progress(index + 1, len(states))
    finally:
        for handle in handles:
            handle.remove()
    return {path: watch.statistics() for path, watch in watches.items()}


class _Turn:
    """Which state is replayed, and how many inputs are still to come; the first state runs to its end to find out."""

    def __init__(self) -> None:
        self.state = self.calls = 0
        self.expected: int | None = None

    def begin(self, state: int) -> None:
        if state == 1:
            self.expected = self.calls
        self.state, self.calls = state, 0

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.expected:
            raise _Enough


class _Watch:
    """A forward hook that accumulates one module's statistics."""

    def __init__(self, path: str, rows: int, share: int, seed: int, turn: _Turn, wants_gram: bool) -> None:
        self.path, self.rows, self.share, self.seed = path, rows, share, seed
        self.turn, self.wants_gram = turn, wants_gram
        self.kept: Tensor | None = None
        self.filled = self.count = 0
        self.gram: Tensor | None = None
        self.amax: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # A convolution is a product with what its pixels read.
        x = (patches(module, args[0]) if isinstance(module, nn.Conv2d) else args[0]).flatten(0, -2)
        peak = x.abs().amax(dim=0).float()
        # A NaN is the maximum of whatever it is among.
        if not torch.isfinite(peak).all():
            raise UserError(f"the input of {self.path} is NaN or infinite: the model overflows; try another dtype")
        self.amax = peak if self.amax is None else torch.maximum(self.amax, peak)
        if self.wants_gram:
            wide = x.float()
            self.gram = wide.T @ wide if self.gram is None else self.gram.addmm_(wide.T, wide)
        self.keep(x)
        self.count += len(x)
        self.turn.count()

    def keep(self, x: Float[Tensor, "m k"]) -> None:
        """Some of the tokens, on the host."""
        own_seed = random.Random(f"tokens:{self.seed}:{self.turn.state}:{len(x)}").getrandbits(63)
        generator = torch.Generator("cpu").manual_seed(own_seed)
        chosen = torch.randperm(len(x), generator=generator)[: self.share].sort().values
        if self.kept is None:
            # Pages that are never written take no memory.
            self.kept = torch.empty(self.rows, x.shape[1], dtype=x.dtype)
        chosen = chosen[: self.rows - self.filled]
        self.kept[self.filled : self.filled + len(chosen)] = x[chosen.to(x.device)].cpu()
        self.filled += len(chosen)

    def statistics(self) -> Statistics:
        """What was seen, on the host."""
        if self.kept is None or self.amax is None:
            raise UserError(f"{self.path} is never called when the model draws: keep it, with a glob under `keep`")
        rows = self.kept if self.filled == self.rows else self.kept[: self.filled].clone()
        gram = None if self.gram is None else self.gram.cpu()
        self.kept = self.gram = None
        return Statistics(rows, gram, self.amax.cpu(), self.count)
