"""The smoothing vector without data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.formats import KLayout, round_to

# An input that is, or whose weights are, this much smaller than the largest is as good as dead: without a floor its
# divisor would leave the range of the stored type.
_FLOOR = 2.0**-10


def span_smoothing(
    weights: Sequence[Float[Tensor, "_ k"]],
    layout: KLayout,
    exponent: float,
    dtype: torch.dtype,
    magnitudes: Float[Tensor, " k"] | None = None,
    activation_exponent: float = 0.0,
) -> Float[Tensor, " k"]:
    """s_j proportional to magnitude_j ** activation_exponent / amax |W_j| ** exponent.

    This is SVDQuant's s_j = amax |X_j|^a / amax |W_j|^b over all weights that share the input: the layer multiplies
    weights by s and divides activations by it, so that the channels of both become more alike. Without magnitudes it
    is the weights' half alone. The geometric mean over each segment is 1, so that smoothing moves no segment against
    another; exponents of 0 give ones.

    Args:
        weights: [n_i, k] each.
        layout: The segments of K.
        exponent: 0 to 1.
        dtype: Stored type; the result is rounded to it.
        magnitudes: How large the input's channels are, up to a common factor.
        activation_exponent: 0 to 1.
    """
    spans = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
    smooth = torch.ones_like(spans)
    for segment in layout:
        logs = -exponent * _logs(spans[segment.logical])
        if magnitudes is not None:
            logs += activation_exponent * _logs(magnitudes[segment.logical].float())
        smooth[segment.logical] = (logs - logs.mean()).exp2()
    return round_to(smooth, dtype)


def _logs(values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Binary logarithms relative to the largest value, floored; zeros where all are zero."""
    largest = values.max()
    return (values / largest).clamp(min=_FLOOR).log2() if largest > 0 else torch.zeros_like(values)
