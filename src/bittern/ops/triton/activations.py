"""Activations to the 8-bit operand of a layer: which kernel makes it, and where it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.formats import KLayout
from bittern.ops.triton import config
from bittern.ops.triton.fold_branch import Weight, find_bounds
from bittern.ops.triton.launch import Launch, launch
from bittern.ops.triton.prologue import quantize_rows
from bittern.ops.triton.whole_rows import quantize_whole_rows

CODES = {
    "a8-int8": torch.int8,
    "a8-fp8": torch.float8_e4m3fn,
    "a8-fp8-folded": torch.float8_e4m3fn,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""By path, or by the format of activations."""


def scratch_bounds(layout: KLayout) -> list[tuple[int, int]]:
    """Where each segment lies in 8-bit operands, whose segments are filled up to whole tiles."""
    bounds: list[tuple[int, int]] = []
    start = 0
    for length in layout.segments:
        stop = start + -(-length // config.SCRATCH_MULTIPLE) * config.SCRATCH_MULTIPLE
        bounds.append((start, stop))
        start = stop
    return bounds


def quantize(
    x: Tensor,
    reciprocals: Tensor | None,
    down: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    low: Tensor | None,
    rank: int,
    parts: Tensor | None = None,
    accumulate: bool = False,
    smooth: Tensor | None = None,
    weight: Weight | None = None,
    launch: Launch = launch,
) -> None:
    """Fills codes, scales and, with `down` or its parts, low by the kernel that suits.

    The rank is the layer's. Of the smoothing either the reciprocals are given or, with few tokens, itself. Of a weight
    whose branch is to be folded the bounds are filled, too.
    """
    here, (m, k) = config.device_of(x.device), x.shape
    whole = None if down is not None else config.whole_rows_for(here, m, k, rank)
    if whole is not None:
        low = None if parts is None else low
        quantize_whole_rows(x, reciprocals, codes, scales, whole, parts, low, smooth, weight, launch)
        return
    if weight is not None:
        find_bounds(weight, launch)
    if smooth is not None:
        # Rows of more than 32,768 inputs. A tensor of this call: its launches are not repeated.
        reciprocals = smooth.float().reciprocal()
    tiles = config.prologue_for(here, m, 0 if down is None else rank, 2 if down is None else down.element_size())
    quantize_rows(x, reciprocals, down, codes, scales, None if down is None else low, tiles, accumulate, launch)
