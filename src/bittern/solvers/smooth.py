"""The smoothing vector without data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.formats import KLayout, round_to

# An input whose weights are this much smaller than the widest one's is as good as dead: without a floor its
# divisor would leave the range of the stored type.
_FLOOR = 2.0**-10


def span_smoothing(
    weights: Sequence[Float[Tensor, "_ k"]], layout: KLayout, exponent: float, dtype: torch.dtype
) -> Float[Tensor, " k"]:
    """s_j proportional to amax |W_j| ** -exponent, over all weights that share the input.

    This is the weights' half of SVDQuant's s_j = amax |X_j|^a / amax |W_j|^b: the layer multiplies weights by s, so
    that their columns become alike, and divides activations by it. Nothing is known of the activations here. The
    geometric mean over each segment is 1, so that smoothing moves no segment against another; exponent 0 gives ones.

    Args:
        weights: [n_i, k] each.
        layout: The segments of K.
        exponent: 0 to 1.
        dtype: Stored type; the result is rounded to it.
    """
    spans = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
    smooth = torch.ones_like(spans)
    for segment in layout:
        span = spans[segment.logical]
        if span.max() > 0:
            logs = (span / span.max()).clamp(min=_FLOOR).log2().mul(-exponent)
            smooth[segment.logical] = (logs - logs.mean()).exp2()
    return round_to(smooth, dtype)
