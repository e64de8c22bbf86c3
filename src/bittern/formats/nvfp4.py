"""nvfp4: floats of 4 bits (e2m1: sign, two bits of exponent, one of mantissa), groups of 16 under e4m3 scales.

The sixteen numbers are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their opposites. A code counts halves, so that it is an integer
like every other format's: 0, 1, 2, 3, 4, 6, 8, 12 and their opposites.

e4m3 reaches from 2^-9 to 448 only; a second scale, one for each row and K-segment in float32, takes a weight's size
off. (Files with one such scale for a whole tensor have the same number in all rows.) So a weight is

    e2m1 · group scale · row scale = code · (group scale · row scale / 2),

and the number in brackets is what `combine` gives to the operations and what solvers work with, in float32. Row scales
that we choose are powers of two: nothing is rounded by them, and `split` finds them again.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bittern.formats.coding import Blocks, Coded, GroupLengths
from bittern.formats.dtypes import round_to
from bittern.formats.layout import KLayout

GROUP = 16
LOW, HIGH = -12, 12
HALF = 0.5
E4M3 = torch.float8_e4m3fn
_E4M3_MAX = 448.0

# e4m3 has eight steps an octave. Smaller scales cut the largest weight off, larger ones put it on 4 instead of 6.
_RATIOS = tuple(2 ** (step / 8) for step in range(-6, 6))


def on_grid(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The code nearest to each value, as a float; ties go to the even mantissa."""
    sizes = values.abs().clamp_(max=HIGH)
    # Steps are 1 up to 4, 2 up to 8, and 4 from there.
    step = 1.0 + (sizes > 4) + 2.0 * (sizes > 8)
    return (sizes / step).round_().mul_(step).copysign_(values)


def nearest(blocks: Blocks, scales: Float[Tensor, "n groups"]) -> Int8[Tensor, "n groups size"]:
    """The codes nearest to weight / scale; 0 where the scale is 0."""
    divisor = torch.where(scales == 0, torch.inf, scales)
    return on_grid(blocks / divisor[..., None]).to(torch.int8)


def absmax(blocks: Blocks, lengths: GroupLengths, dtype: torch.dtype) -> Coded:
    """Scales that put a group's largest weight on 6, rounded to e4m3, and the nearest codes: the usual baseline."""
    return _best_of((1.0,), blocks)


def search(blocks: Blocks, lengths: GroupLengths, dtype: torch.dtype) -> Coded:
    """Of all scales of e4m3 near that of `absmax` the one of least squared error; no group is worse off."""
    return _best_of(_RATIOS, blocks)


def _best_of(ratios: tuple[float, ...], blocks: Blocks) -> Coded:
    """Codes and combined scales in float32, for one K-segment."""
    largest = blocks.abs().amax(dim=-1)
    exponents = _row_exponents(largest.amax(dim=-1, keepdim=True) / 6)
    unit = torch.ldexp(blocks, -exponents[..., None])
    plain = torch.ldexp(largest, -exponents) / 6
    best = torch.zeros_like(plain)
    best_error = torch.full_like(plain, torch.inf)
    for ratio in ratios:
        scales = round_to(plain * ratio, E4M3).float() * HALF
        error = (unit - nearest(unit, scales).float() * scales[..., None]).square_().sum(dim=-1)
        better = error < best_error
        best, best_error = torch.where(better, scales, best), torch.where(better, error, best_error)
    return nearest(unit, best), torch.ldexp(best, exponents)


def _row_exponents(largest: Float[Tensor, "n 1"]) -> Tensor:
    """Powers of two that bring the largest scale of each row to 128 up to 256, where ratios leave it in range."""
    exponents = torch.frexp(largest).exponent - 8
    return torch.where(largest > 0, exponents, 0).clamp(-120, 120)


def combine(
    scales: Float[Tensor, "n groups"], row_scales: Float[Tensor, "n segments"], layout: KLayout
) -> Float[Tensor, "n groups"]:
    """What codes are multiplied with, in float32."""
    parts = [
        scales[:, segment.groups].float() * (row_scales[:, place : place + 1] * HALF)
        for place, segment in enumerate(layout)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def split(
    combined: Float[Tensor, "n groups"], layout: KLayout
) -> tuple[Float[Tensor, "n groups"], Float[Tensor, "n segments"]]:
    """The inverse of `combine` for scales that a rule of this file gave: e4m3, and powers of two in float32."""
    scales = torch.empty(combined.shape, dtype=E4M3, device=combined.device)
    rows: list[Tensor] = []
    for segment in layout:
        own = combined[:, segment.groups] / HALF
        mantissa, exponents = torch.frexp(own.amax(dim=1, keepdim=True))
        # As large as they can be: those of the smallest groups keep their bits.
        exponents = torch.where(mantissa == 0, 0, exponents - torch.where(mantissa <= _E4M3_MAX / 512, 9, 8))
        scales[:, segment.groups] = torch.ldexp(own, -exponents).to(E4M3)
        rows.append(torch.ldexp(torch.ones_like(mantissa), exponents))
    return scales, torch.cat(rows, dim=1)
