"""Floats to codes and back, a block of rows at a time, so that no temporary grows with the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bittern.formats.layout import KLayout

Blocks = Float[Tensor, "n groups size"]
"""float32 weights of one segment with their zero padding, one group a row."""
GroupLengths = Float[Tensor, " groups"]
"""How many weights of each group are not padding."""
Coded = tuple[Int8[Tensor, "n groups size"], Float[Tensor, "n groups"]]
"""Codes, and the scales in their stored type."""

Rule = Callable[[Blocks, GroupLengths, torch.dtype], Coded]
"""How groups get their codes and scales: `int4.absmax`, `ternary.least_squares`, ..."""

# So many weights stay in a CPU's cache, three times faster than a whole layer; a GPU wants large blocks.
_CPU_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 25


def nearest(blocks: Blocks, scales: Float[Tensor, "n groups"], low: int, high: int) -> Int8[Tensor, "n groups size"]:
    """The code in low..high nearest to weight / scale; 0 where the scale is 0."""
    # Division by infinity is how a scale of 0 gives code 0 instead of NaN.
    divisor = torch.where(scales == 0, torch.inf, scales.float())
    return (blocks / divisor[..., None]).round_().clamp_(low, high).to(torch.int8)


def encode(
    weight: Float[Tensor, "n {layout.k}"], layout: KLayout, rule: Rule, scale_dtype: torch.dtype
) -> tuple[Int8[Tensor, "n {layout.padded_k}"], Float[Tensor, "n {layout.num_groups}"]]:
    """Codes and scales of a weight.

    Args:
        weight: Finite weights of any float type; the work is done in float32.
        layout: Segments and groups of K.
        rule: How each group gets its codes and scale.
        scale_dtype: Stored type of the scales. Codes belong to the scales as stored.
    """
    n = weight.shape[0]
    codes = torch.empty(n, layout.padded_k, dtype=torch.int8, device=weight.device)
    scales = torch.empty(n, layout.num_groups, dtype=scale_dtype, device=weight.device)
    for rows in row_blocks(weight):
        padded = layout.pad(weight[rows].float())
        for segment in layout:
            blocks = padded[:, segment.padded].reshape(padded.shape[0], -1, segment.size)
            lengths = torch.full((blocks.shape[1],), float(segment.size), device=weight.device)
            lengths[-1] -= segment.padding
            block_codes, block_scales = rule(blocks, lengths, scale_dtype)
            codes[rows, segment.padded] = block_codes.flatten(1)
            scales[rows, segment.groups] = block_scales
    return codes, scales


def decode(
    codes: Int8[Tensor, "n {layout.padded_k}"],
    scales: Float[Tensor, "n {layout.num_groups}"],
    layout: KLayout,
) -> Float[Tensor, "n {layout.k}"]:
    """The float32 weight that int8 codes and scales of any float type stand for."""
    out = torch.empty(codes.shape[0], layout.k, dtype=torch.float32, device=codes.device)
    for rows in row_blocks(codes):
        out[rows] = layout.unpad(codes[rows].float().mul_(layout.expand_scales(scales[rows].float())))
    return out


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows whose float32 temporaries stay small on the matrix' device."""
    budget = _CPU_BLOCK if matrix.device.type == "cpu" else _GPU_BLOCK
    step = max(1, budget // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)
