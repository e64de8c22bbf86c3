"""The smoothing vector that leaves the least output error, among published candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.formats import KLayout, round_to

# Dead inputs and dead weights would leave the range of the stored type.
_FLOOR = 2.0**-10


def candidates() -> Iterator[tuple[float, float]]:
    """The 39 exponents (a, b) of SVDQuant (Li et al. 2024, arXiv:2411.05007): (0, 0), (a, 0) and (a, 1 - a)."""
    yield 0.0, 0.0
    for i in range(1, 20):
        yield i / 20, 0.0
        yield i / 20, 1 - i / 20


def smoothing(
    inputs: Float[Tensor, " k"],
    weights: Float[Tensor, " k"],
    a: float,
    b: float,
    layout: KLayout,
    dtype: torch.dtype,
) -> Float[Tensor, " k"]:
    """s_j = amax|X_j|^a / amax|W_j|^b, with a geometric mean of 1 over each segment; rounded to its stored type.

    Args:
        inputs: amax|X_j|, with its shift where there is one.
        weights: amax|W_j| over all weights that read the input.
        a: Power of the inputs.
        b: Power of the weights.
        layout: The segments of K.
        dtype: Stored type.
    """
    smooth = torch.ones_like(inputs)
    for segment in layout:
        x, w = (_logs(amax[segment.logical]) for amax in (inputs, weights))
        logs = a * x - b * w
        smooth[segment.logical] = (logs - logs.mean()).exp2()
    return round_to(smooth, dtype)


def best_smoothing(
    inputs: Float[Tensor, " k"],
    weights: Float[Tensor, " k"],
    layout: KLayout,
    dtype: torch.dtype,
    error: Callable[[Float[Tensor, " k"]], float],
) -> tuple[Float[Tensor, " k"], float]:
    """The candidate of least `error`, the first of equals, and its error."""
    best: tuple[Tensor, float] | None = None
    for a, b in candidates():
        smooth = smoothing(inputs, weights, a, b, layout, dtype)
        found = error(smooth)
        if best is None or found < best[1]:
            best = smooth, found
    assert best is not None
    return best


def _logs(amax: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    top = amax.max()
    return (amax / top).clamp(min=_FLOOR).log2() if top > 0 else torch.zeros_like(amax)
