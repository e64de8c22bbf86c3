"""What solvers need to know of a layer's input: rows of it, and sums over all of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bittern.errors import UserError
from bittern.layers import patches
from bittern.precision import exact_products
from bittern.trajectories.sampler import State


@dataclass(frozen=True)
class Statistics:
    """The inputs of layers that read one tensor.

    Attributes:
        rows: A seeded sample of the tokens, in the model's dtype. A concatenated input is its K-segments side by side.
        gram: X^T X of all `count` tokens, summed in float32.
        amax: Largest magnitude of each input among all tokens.
        count: Tokens seen.
    """

    rows: Float[Tensor, "m k"]
    gram: Float[Tensor, "k k"]
    amax: Float[Tensor, " k"]
    count: int


def record_bytes(widths: Sequence[int], rows: int, itemsize: int) -> int:
    """Bytes that `record` holds for inputs of these widths: sum over k of rows k itemsize + 4 k^2 + 4 k."""
    return sum(rows * k * itemsize + 4 * k * k + 4 * k for k in widths)


@torch.no_grad()
@exact_products()
def record(
    model: nn.Module,
    paths: Sequence[str],
    states: Sequence[State],
    *,
    rows: int,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> dict[str, Statistics]:
    """Replays states through the model and watches the inputs of some of its modules.

    Each state gives the same number of tokens, drawn by a generator that depends on the seed, the state and the
    number of tokens alone: layers that see the same tokens are recorded at the same ones. Hooks go on the modules
    themselves, so any attention processor that calls them will do.

    Args:
        model: The denoiser.
        paths: Linears or convolutions; of layers that share an input, one.
        states: What `sample` gave.
        rows: Rows to keep of each input, at most; fewer where there are fewer tokens.
        seed: Of the choice of tokens.
        progress: Called with states done and their number.

    Raises:
        UserError: if there is no state, if a module is not reached, or an input is not finite.
    """
    if not states:
        raise UserError("no samples to calibrate with: expected at least one prompt and one sample")
    share = -(-rows // len(states))
    watches = {path: _Watch(path, share, seed) for path in paths}
    handles = [model.get_submodule(path).register_forward_pre_hook(watch) for path, watch in watches.items()]
    try:
        for index, state in enumerate(states):
            for watch in watches.values():
                watch.state = index
            model(*state.args, **state.kwargs)
            if progress:
                progress(index + 1, len(states))
    finally:
        for handle in handles:
            handle.remove()
    return {path: watch.statistics(rows) for path, watch in watches.items()}


class _Watch:
    """A forward hook that accumulates one module's statistics."""

    def __init__(self, path: str, share: int, seed: int) -> None:
        self.path, self.share, self.seed, self.state = path, share, seed, 0
        self.kept: list[Tensor] = []
        self.gram: Tensor | None = None
        self.amax: Tensor | None = None
        self.count = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # A convolution is a product with what its pixels read.
        x = (patches(module, args[0]) if isinstance(module, nn.Conv2d) else args[0]).flatten(0, -2)
        wide = x.float()
        peak = wide.abs().amax(dim=0)
        # A NaN is the maximum of whatever it is among.
        if not torch.isfinite(peak).all():
            raise UserError(f"the input of {self.path} is NaN or infinite: the model overflows; try another dtype")
        own_seed = random.Random(f"tokens:{self.seed}:{self.state}:{len(x)}").getrandbits(63)
        generator = torch.Generator("cpu").manual_seed(own_seed)
        chosen = torch.randperm(len(x), generator=generator)[: self.share].sort().values
        self.kept.append(x[chosen.to(x.device)].clone())
        if self.gram is None or self.amax is None:
            self.gram, self.amax = wide.T @ wide, peak
        else:
            self.gram.addmm_(wide.T, wide)
            self.amax = torch.maximum(self.amax, peak)
        self.count += len(x)

    def statistics(self, rows: int) -> Statistics:
        if self.gram is None or self.amax is None:
            raise UserError(f"{self.path} is never called when the model draws: keep it, with a glob under `keep`")
        return Statistics(torch.cat(self.kept)[:rows], self.gram, self.amax, self.count)
