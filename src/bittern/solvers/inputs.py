"""The input of a layer as its products see it: smoothed, and rounded to few bits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.formats import KLayout
from bittern.ops import reference
from bittern.scheme import ACTIVATION_GROUP, Scheme


def smoothed(rows: Float[Tensor, "m k"], smooth: Float[Tensor, " k"] | None) -> Float[Tensor, "m k"]:
    """The input over its smoothing, u = x / s, in float32."""
    wide = rows.float()
    return wide if smooth is None else wide / smooth.float()


def rounded(
    rows: Float[Tensor, "m k"], smooth: Float[Tensor, " k"] | None, layout: KLayout, scheme: Scheme
) -> Float[Tensor, "m k"]:
    """Qa((x + h) / s) - h / s: what stands in for x / s under the scheme's activations.

    4 bits round in groups of 64 per token, without a sign where a segment has a shift h; 8 bits (int8) per token and
    segment; 16 bits not at all.
    """
    plain = smoothed(rows, smooth)
    if scheme.activations == 16:
        return plain
    out = torch.empty_like(plain)
    shifts = scheme.shift if any(scheme.shift) and scheme.activations == 4 else (0.0,) * len(layout.segments)
    for segment, shift in zip(layout, shifts, strict=True):
        offset = shift * smoothed(torch.ones_like(rows[:1, segment.logical]), _part(smooth, segment.logical))
        out[:, segment.logical] = _round(plain[:, segment.logical] + offset, scheme.activations, shift > 0) - offset
    return out


def _part(smooth: Tensor | None, columns: slice) -> Tensor | None:
    return None if smooth is None else smooth[columns]


def _round(values: Float[Tensor, "m k"], bits: int, unsigned: bool) -> Float[Tensor, "m k"]:
    codes, scales = reference.quantize(values, "int8" if bits == 8 else "uint4" if unsigned else "int4")
    size = codes.shape[1] if bits == 8 else ACTIVATION_GROUP
    return codes.view(*scales.shape, size).mul_(scales[..., None]).flatten(1)[:, : values.shape[1]]
