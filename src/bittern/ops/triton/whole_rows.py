"""Activations to 8-bit codes in one read of x, where the branch is not projected on the way: rows stay in registers.

The maths is the prologue's (`bittern.ops.triton.prologue`) without its product with D:

    u = x · (1 / s)      scale = max(amax_k |u|, tiny) · (1 / 127)        codes = round(u · (1 / scale))

and in e4m3 with the prologue's scale.

A program owns a few tokens and asks for their whole rows at once, as tiles that the loops below unroll: all of x is
on its way before the first is needed, and none is read again. In int8 the prologue walks rows twice, and 4608 x 12288
inputs leave the caches before it comes back. With a branch every program reads D as well, which few tokens a program do
not pay for.

An input is smoothed once, and stays in registers as float32 where there is room: reciprocals from memory have to be
dealt to threads, and special function units work one out in the time of 8 products. Anew for each use, smoothing of
4608 x 12288 inputs took 25 us more than none with the tiles that run; so it takes 2 to 6.

Where the weight's branch is to be folded (`fold_branch`), the first programs work out the bounds that this takes: they
wait for memory, as the others do, and a launch of their own would be 3 us or more that nothing hides.

Floor: M·K·3 bytes of device memory with bf16 inputs: 4608 x 12288 170 MB or 57 us at 3 TB/s.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bittern.ops.triton.config import WholeRowsConfig, padded_rank
from bittern.ops.triton.fold_branch import IN_DOWN, Weight, bounds_of_part
from bittern.ops.triton.launch import Launch, cdiv, contiguous_rows, launch
from bittern.ops.triton.numerics import (
    FORETELLERS,
    HEADROOM,
    eight_bits,
    foretellers,
    foretold_scale,
    larger_magnitude,
    largest_of,
    reciprocal,
    reciprocal_of_smooth,
    scale_of,
)
from bittern.ops.triton.projection import sum_of_parts


def quantize_whole_rows(
    x: Tensor,
    reciprocals: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    config: WholeRowsConfig,
    parts: Tensor | None = None,
    low: Tensor | None = None,
    smooth: Tensor | None = None,
    weight: Weight | None = None,
    launch: Launch = launch,
) -> None:
    """Fills codes and scales from x, and `low` from its parts.

    Args:
        x: Inputs [M, K] in bf16, float16 or float32, of any row stride.
        reciprocals: Multiply them, float32 [K]: 1 over the smoothing.
        codes: int8 or e4m3 [M, width >= K]; what lies beyond K becomes 0.
        scales: float32 [M].
        config: Tile and launch.
        parts: Down-projected inputs in parts, float32 [P, M, R], contiguous (`projection`).
        low: float32 [M, R], contiguous; takes the sum of the parts.
        smooth: The smoothing [K] itself, in the place of `reciprocals`: every program works them out.
        weight: What the codes will be multiplied with, if its branch is to be folded: its bounds are filled.
        launch: What launches.
    """
    (m, k), width = x.shape, codes.shape[1]
    count, _, rank = (0, m, 0) if parts is None else parts.shape
    x = contiguous_rows(x)
    finders, ranks, strides = 0, padded_rank(rank), (0, 0, 0, 0)
    tensors: tuple[Tensor | None, ...] = (None,) * 5
    if weight is not None:
        finders, rank = weight.finders, len(weight.down)
        ranks = padded_rank(rank)
        tensors = weight.scales, weight.smooth, weight.down, weight.up, weight.bounds
        strides = len(weight.up), weight.scales.stride(0), weight.down.stride(0), weight.up.stride(0)
    launch(
        whole_rows_kernel,
        (finders + cdiv(m, config.block_m),),
        (x, reciprocals if smooth is None else smooth, codes, scales, parts, low, *tensors),
        (m, k, width, x.stride(0), codes.stride(0), rank, finders, *strides),
        SMOOTH=reciprocals is not None or smooth is not None,
        INVERT=smooth is not None,
        HOLD=config.holds_smoothed(k),
        FP8=codes.dtype == torch.float8_e4m3fn,
        EVEN=k % config.block_k == 0 and width == k,
        TILES=cdiv(width, config.block_k),
        PARTS=count,
        RANK=ranks,
        IN_DOWN=0 if weight is None else IN_DOWN,
        GROUP=0 if weight is None else weight.group,
        SMOOTH_WEIGHT=weight is not None and weight.smooth is not None,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        enable_fp_fusion=False,
    )


@triton.jit
def _smoothed(raw, factors, start, k, SMOOTH: tl.constexpr, INVERT: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of x / s."""
    wide = raw.to(tl.float32)
    if SMOOTH:
        columns = start + tl.arange(0, BLOCK_K)
        factor = tl.load(factors + columns, mask=columns < k, other=1.0)
        wide *= (reciprocal_of_smooth(factor) if INVERT else factor)[None, :]
    return wide


@triton.jit
def _quantize(
    x, factors, codes, scales, parts, low, m, k, width, stride_x, stride_codes, rank, block,
    SMOOTH: tl.constexpr, INVERT: tl.constexpr, HOLD: tl.constexpr, FP8: tl.constexpr, EVEN: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What a program with tokens of its own does; see the module."""
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows < m)[:, None]
    # M · K can pass 2^31; rows beyond the last repeat it and are not stored.
    wide = tl.minimum(rows, m - 1).to(tl.int64)
    x_rows, codes_rows = x + wide[:, None] * stride_x, codes + wide[:, None] * stride_codes

    kept = ()
    for tile in tl.static_range(TILES):
        columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        if EVEN:
            kept += (tl.load(x_rows + columns[None, :]),)
        else:
            kept += (tl.load(x_rows + columns[None, :], mask=(columns < k)[None, :], other=0.0),)
    if PARTS > 0:
        projected = sum_of_parts(parts, rows, m, rank, PARTS, RANK)
        ranks = tl.arange(0, RANK)
        tl.store(low + wide[:, None] * rank + ranks[None, :], projected, mask=inside & (ranks < rank)[None, :])
    if SMOOTH and HOLD:
        smoothed = ()
        for tile in tl.static_range(TILES):
            smoothed += (_smoothed(kept[tile], factors, tile * BLOCK_K, k, SMOOTH, INVERT, BLOCK_K),)
        kept = smoothed
    LEFT: tl.constexpr = tl.constexpr(SMOOTH and not HOLD)
    peak = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for tile in tl.static_range(TILES):
        peak = larger_magnitude(peak, _smoothed(kept[tile], factors, tile * BLOCK_K, k, LEFT, INVERT, BLOCK_K))
    if FP8:
        first = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for start in tl.static_range(0, FORETELLERS, BLOCK_K):
            if start < TILES * BLOCK_K:
                found = _smoothed(kept[start // BLOCK_K], factors, start, k, LEFT, INVERT, BLOCK_K)
                first = larger_magnitude(first, foretellers(found, start, BLOCK_K))
        scale, _ = foretold_scale(largest_of(first) * HEADROOM, peak)
    else:
        scale = scale_of(peak, FP8)
    tl.store(scales + rows, scale, mask=rows < m)
    inverse = reciprocal(scale)[:, None]
    for tile in tl.static_range(TILES):
        columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        numbers = _smoothed(kept[tile], factors, tile * BLOCK_K, k, LEFT, INVERT, BLOCK_K)
        mask = inside if EVEN else inside & (columns < width)[None, :]
        tl.store(codes_rows + columns[None, :], eight_bits(numbers * inverse, FP8), mask=mask)


@triton.jit
def whole_rows_kernel(
    x, factors, codes, scales, parts, low, weight_scales, smooth, down, up, bounds,
    m, k, width, stride_x, stride_codes, rank, finders, n, stride_scales, stride_down, stride_up,
    SMOOTH: tl.constexpr, INVERT: tl.constexpr, HOLD: tl.constexpr, FP8: tl.constexpr, EVEN: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, IN_DOWN: tl.constexpr, GROUP: tl.constexpr,
    SMOOTH_WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """See the module; first the programs that find bounds of a weight, then one for each BLOCK_M tokens."""
    program = tl.program_id(0)
    finds = False
    if IN_DOWN > 0:
        finds = program < finders
        if finds:
            bounds_of_part(
                weight_scales, smooth, down, up, bounds, n, k, rank, stride_scales, stride_down, stride_up, program,
                GROUP, SMOOTH_WEIGHT, RANK, IN_DOWN,
            )  # fmt: skip
    if not finds:
        _quantize(
            x, factors, codes, scales, parts, low, m, k, width, stride_x, stride_codes, rank, program - finders,
            SMOOTH, INVERT, HOLD, FP8, EVEN, TILES, PARTS, RANK, BLOCK_M, BLOCK_K,
        )  # fmt: skip
