"""Activations to 8-bit codes, with the low-rank down-projection, in one read of x.

The maths, for M tokens of K inputs and rank R (the reference's `quantize_activations`), given 1 / s:

    u = x · (1 / s)                      scale = max(amax_k |u|, tiny) · (1 / limit)
    codes = round(u · (1 / scale))       low = x · D^T, summed in float32

with amax_k foretold in e4m3: 16 times that of the first 256 inputs, where it covers the others.

A program owns BLOCK_M tokens. In e4m3 it walks K once: tiles of x are multiplied with D on tensor cores, looked
through for maxima and become codes. If a maximum is beyond what was foretold, and in int8, whose codes need the
maxima, it walks back, beginning with what was read last and is still in the caches. Codes go to rows of
`stride_codes` bytes, filled with code 0 up to `width`, as the GEMM wants them.

Floor, at b bytes an input: M·K·(b + 1) bytes of device memory; FLUX's 4096 x 3072 in bf16 37.7 MB or 12.6 us
at 3 TB/s, and 4608 x 12288 170 MB or 57 us. The down-projection is 2·M·K·R FLOP, below 1 % of the layer's.
D comes from the L2 cache once for every BLOCK_M tokens.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bittern.ops.triton.config import PrologueConfig, padded_rank
from bittern.ops.triton.launch import Launch, Operand, Tiled, cdiv, contiguous_rows, describable, launch
from bittern.ops.triton.numerics import (
    E4M3_RECIPROCAL,
    FORETELLERS,
    HEADROOM,
    at_least_tiny,
    eight_bits,
    foretellers,
    foretold_scale,
    larger_magnitude,
    largest_of,
    product,
    reciprocal,
    scale_of,
)


def quantize_rows(
    x: Tensor,
    reciprocals: Tensor | None,
    down: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    low: Tensor | None,
    config: PrologueConfig,
    accumulate: bool = False,
    launch: Launch = launch,
) -> None:
    """Fills codes, scales and low from x.

    Args:
        x: Inputs [M, K] in bf16 or float16, of any row stride.
        reciprocals: Multiply them, float32 [K]: 1 over the smoothing.
        down: First factor of the branch [R, K], of any row stride.
        codes: int8 or e4m3 [M, width >= K]; what lies beyond K becomes 0.
        scales: float32 [M].
        low: float32 [M, R].
        config: Tile and launch.
        accumulate: Whether to add to what `low` holds, for a later segment of K.
        launch: What launches.
    """
    m, k = x.shape
    rank = 0 if down is None else down.shape[0]
    width = codes.shape[1]
    padded = padded_rank(rank)
    x = contiguous_rows(x)
    descriptors = config.descriptors and describable(x) and (down is None or describable(down))
    tokens: Operand = Tiled(x, [config.block_m, config.block_k]) if descriptors else x
    factors: Operand = Tiled(down, [padded, config.block_k]) if descriptors and down is not None else down
    launch(
        prologue_kernel,
        (cdiv(m, config.block_m),),
        (tokens, reciprocals, factors, codes, scales, low),
        (m, k, width, x.stride(0), 0 if down is None else down.stride(0), codes.stride(0), rank),
        SMOOTH=reciprocals is not None,
        RANK=padded,
        FP8=codes.dtype == torch.float8_e4m3fn,
        ACCUMULATE=accumulate,
        EVEN=k % config.block_k == 0 and width == k,
        DESCRIPTORS=descriptors,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps,
        enable_fp_fusion=False,
    )


@triton.jit
def _load(
    x, x_rows, reciprocals, row_start, start, k, SMOOTH: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of x, and of x / s; beyond K both are 0."""
    columns = start + tl.arange(0, BLOCK_K)
    if DESCRIPTORS:
        raw = x.load([row_start, start])
    elif EVEN:
        raw = tl.load(x_rows + columns[None, :])
    else:
        raw = tl.load(x_rows + columns[None, :], mask=(columns < k)[None, :], other=0.0)
    smoothed = raw.to(tl.float32)
    if SMOOTH:
        if EVEN:
            inverse = tl.load(reciprocals + columns)
        else:
            inverse = tl.load(reciprocals + columns, mask=columns < k, other=1.0)
        smoothed *= inverse[None, :]
    return raw, smoothed


@triton.jit
def _store(codes_rows, numbers, start, width, inside, FP8: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of codes."""
    columns = start + tl.arange(0, BLOCK_K)
    mask = inside if EVEN else inside & (columns < width)[None, :]
    tl.store(codes_rows + columns[None, :], eight_bits(numbers, FP8), mask=mask)


@triton.jit
def prologue_kernel(
    x,
    reciprocals,
    down,
    codes,
    scales,
    low,
    m,
    k,
    width,
    stride_x,
    stride_down,
    stride_codes,
    rank,
    SMOOTH: tl.constexpr,
    RANK: tl.constexpr,
    FP8: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """See the module; one program for each BLOCK_M tokens. `x` and `down` are tensor descriptors or pointers."""
    row_start = tl.program_id(0) * BLOCK_M
    rows = row_start + tl.arange(0, BLOCK_M)
    inside = (rows < m)[:, None]
    # M · K can pass 2^31; rows beyond the last repeat it and are not stored.
    wide = tl.minimum(rows, m - 1).to(tl.int64)
    x_rows = x if DESCRIPTORS else x + wide[:, None] * stride_x

    if RANK > 0:
        ranks = tl.arange(0, RANK)
        low_at = low + wide[:, None] * rank + ranks[None, :]
        low_inside = inside & (ranks < rank)[None, :]
        projected = tl.load(low_at, mask=low_inside, other=0.0) if ACCUMULATE else tl.zeros([BLOCK_M, RANK], tl.float32)

    codes_rows = codes + wide[:, None] * stride_codes
    if FP8:
        first = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for start in tl.static_range(0, FORETELLERS, BLOCK_K):
            _, smoothed = _load(x, x_rows, reciprocals, row_start, start, k, SMOOTH, False, DESCRIPTORS, BLOCK_K)
            first = larger_magnitude(first, foretellers(smoothed, start, BLOCK_K))
        covered = largest_of(first) * HEADROOM
        foretold = reciprocal(at_least_tiny(covered * E4M3_RECIPROCAL))[:, None]

    peak = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        raw, smoothed = _load(x, x_rows, reciprocals, row_start, start, k, SMOOTH, EVEN, DESCRIPTORS, BLOCK_K)
        peak = larger_magnitude(peak, smoothed)
        if FP8:
            _store(codes_rows, smoothed * foretold, start, width, inside, FP8, EVEN, BLOCK_K)
        if RANK > 0:
            if DESCRIPTORS:
                d = down.load([0, start])
            else:
                columns = start + tl.arange(0, BLOCK_K)
                d_inside = (ranks < rank)[:, None] if EVEN else (ranks < rank)[:, None] & (columns < k)[None, :]
                d = tl.load(down + ranks[:, None] * stride_down + columns[None, :], mask=d_inside, other=0.0)
            projected = product(raw, d.T, projected)
    if RANK > 0:
        tl.store(low_at, projected, mask=low_inside)

    if FP8:
        scale, kept = foretold_scale(covered, peak)
        again = tl.max(tl.where(kept, 0, 1), axis=0) > 0
    else:
        scale, again = scale_of(peak, FP8), True
    tl.store(scales + rows, scale, mask=rows < m)
    if again:
        inverse = reciprocal(scale)[:, None]
        for back in tl.range(0, width, BLOCK_K, num_stages=STAGES):
            start = (tl.cdiv(width, BLOCK_K) - 1) * BLOCK_K - back
            raw, smoothed = _load(x, x_rows, reciprocals, row_start, start, k, SMOOTH, EVEN, DESCRIPTORS, BLOCK_K)
            _store(codes_rows, smoothed * inverse, start, width, inside, FP8, EVEN, BLOCK_K)
