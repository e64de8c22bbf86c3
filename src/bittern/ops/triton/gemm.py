"""The 8-bit GEMM with everything that follows it in its epilogue.

The maths, for M tokens, N outputs, segments of K, and rank R:

    y = sum over segments of ((Qa · Qw^T) · a) · c  +  low · U^T  +  bias,  and gelu(y) from one output on

with codes Qa [M, K] and Qw [N, K] in int8 (summed in int32, exactly) or e4m3 (in float32, on Hopper with the
tensor cores' own fast accumulation), one scale a for each token and segment and one c for each output and
segment. Each is applied once per element of a tile, and the result is rounded once. The low-rank product takes
`low` rounded to U's dtype: half a unit of bf16 in a part of the sum; in float16 tokens that exceed its range are
divided by a power of two, and so are their sums until the product is added. In fp8 a first segment's sums are brought
to the scales of the second, which is then added to them: sums · (a1 / a2) · (c1 / c2).

Layout: both operands are row-major, K contiguous; segments start at multiples of 128 and are filled with
zeros, so that no tile needs a mask along K. One program per multiprocessor walks over output tiles, GROUP_M
tiles of tokens at a time, so that a wave of programs shares its operands in the L2 cache. Where the device has
tensor descriptors tiles are loaded by them, elsewhere by pointers.

Floor: 2·M·N·K operations at the rate of the 8-bit tensor cores; M·K + N·K + 2·M·N bytes. FLUX's 4096 x 9216 x
3072 is 232 GFLOP (.117 ms at Hopper's 1,979 TFLOP/s, .168 in cuBLAS' fp8) against 116 MB (.039 ms).
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bittern.ops.triton.config import GemmConfig, padded_rank
from bittern.ops.triton.launch import Launch, Operand, Tiled, cdiv, launch, multiprocessors
from bittern.ops.triton.numerics import add_branch, floored, gelu, in_range, rounded


def gemm(
    a: Tensor,
    b: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    first_segment: int,
    gelu_from: int | None,
    config: GemmConfig,
    launch: Launch = launch,
) -> None:
    """Fills `out` with the product of 8-bit operands.

    Args:
        a: Activation codes [M, K], int8 or e4m3, contiguous; K a multiple of 128.
        b: Weight codes [N, K], likewise.
        row_scales: Activation scales, float32 [segments, M], one or two segments.
        column_scales: Weight scales, float32 [segments, N].
        low: Down-projected inputs, float32 [M, R], contiguous.
        up: Second factor of the branch [N, R], rows of any stride.
        bias: [N].
        out: The result [M, N], contiguous, any float dtype.
        first_segment: Where the second segment starts; K if there is one.
        gelu_from: First output that passes through a GELU; None for none.
        config: Tile and launch.
        launch: What launches.
    """
    m, n = out.shape
    rank = 0 if up is None else up.shape[1]
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    store_descriptors = config.store_descriptors and n % 8 == 0
    first: Operand = Tiled(a, [config.block_m, config.block_k]) if config.descriptors else a
    second: Operand = Tiled(b, [config.block_n, config.block_k]) if config.descriptors else b
    result: Operand = out
    if store_descriptors:
        result = Tiled(out, [config.block_m, config.block_n // (2 if config.halves else 1)])
    launch(
        gemm_kernel,
        (min(tiles, config.programs * multiprocessors(a.device)),),
        (first, second, result, row_scales, column_scales, low, up, bias),
        (m, n, first_segment, a.shape[1], rank, 0 if up is None else up.stride(0), gelu_from or 0),
        SEGMENTS=row_scales.shape[0],
        RANK=padded_rank(rank),
        BIAS=bias is not None,
        GELU=gelu_from is not None,
        OUT_DTYPE=DTYPES[out.dtype],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        DESCRIPTORS=config.descriptors,
        STORE_DESCRIPTORS=store_descriptors,
        HALVES=config.halves,
        # What float16's powers are worked out from would take shared memory during the products.
        EARLY=config.early and (up is None or up.dtype != torch.float16),
        num_warps=config.warps,
        num_stages=config.stages,
    )


DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _add_products(
    accumulator, a, b, k_start, k_stop, k, row_start, column_start, a_rows, b_rows, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INTEGERS: tl.constexpr,
):  # fmt: skip
    """Adds one segment's products to a tile of sums."""
    for start in range(k_start, k_stop, BLOCK_K):
        if DESCRIPTORS:
            left = a.load([row_start, start])
            right = b.load([column_start, start])
        else:
            columns = start + tl.arange(0, BLOCK_K)
            left = tl.load(a + a_rows[:, None] * k + columns[None, :])
            right = tl.load(b + b_rows[:, None] * k + columns[None, :])
        if INTEGERS:
            accumulator = tl.dot(left, right.T, accumulator, out_dtype=tl.int32)
        else:
            accumulator = tl.dot(left, right.T, accumulator)
    return accumulator


@triton.jit
def factors(low, up, a_rows, b_rows, rank, stride_up, RANK: tl.constexpr):
    """The tile's rows of the low-rank branch, both in the dtype of U; the former with their powers (`in_range`)."""
    ranks = tl.arange(0, RANK)
    known = (ranks < rank)[None, :]
    u = tl.load(up + b_rows[:, None] * stride_up + ranks[None, :], mask=known, other=0.0)
    projected = tl.load(low + a_rows[:, None] * rank + ranks[None, :], mask=known, other=0.0)
    projected, power = in_range(projected, u.dtype)
    return projected, power, u


@triton.jit
def gemm_kernel(
    a,
    b,
    out,
    row_scales,
    column_scales,
    low,
    up,
    bias,
    m,
    n,
    first_segment,
    k,
    rank,
    stride_up,
    gelu_from,
    SEGMENTS: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STORE_DESCRIPTORS: tl.constexpr,
    HALVES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """See the module; `a`, `b` and `out` are tensor descriptors or pointers."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    INTEGERS: tl.constexpr = (a.dtype if DESCRIPTORS else a.dtype.element_ty) == tl.int8
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False):
        per_group = GROUP_M * tiles_n
        first_m = (tile // per_group) * GROUP_M
        group_m = tl.minimum(tiles_m - first_m, GROUP_M)
        row_start = (first_m + (tile % per_group) % group_m) * BLOCK_M
        column_start = ((tile % per_group) // group_m) * BLOCK_N
        rows, columns = row_start + tl.arange(0, BLOCK_M), column_start + tl.arange(0, BLOCK_N)
        # Rows beyond the last repeat it and are not stored.
        a_rows, b_rows = tl.minimum(rows, m - 1).to(tl.int64), tl.minimum(columns, n - 1).to(tl.int64)

        if EARLY:
            # What the epilogue reads is asked for now and arrives during the products.
            row_scale, column_scale = tl.load(row_scales + a_rows), tl.load(column_scales + b_rows)
            if RANK > 0:
                projected, power, u = factors(low, up, a_rows, b_rows, rank, stride_up, RANK)
            if BIAS:
                shift = tl.load(bias + b_rows)

        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGERS else tl.float32)
        sums = _add_products(
            zeros, a, b, 0, first_segment, k, row_start, column_start, a_rows, b_rows, BLOCK_K, DESCRIPTORS, INTEGERS
        )
        if not EARLY:
            row_scale, column_scale = tl.load(row_scales + a_rows), tl.load(column_scales + b_rows)
        if SEGMENTS == 2:
            last_row_scale = tl.load(row_scales + m + a_rows)
            last_column_scale = tl.load(column_scales + n + b_rows)
            if INTEGERS:
                y = sums.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
                sums = _add_products(
                    zeros, a, b, first_segment, k, k, row_start, column_start, a_rows, b_rows, BLOCK_K, DESCRIPTORS,
                    INTEGERS,
                )  # fmt: skip
                y += sums.to(tl.float32) * last_row_scale[:, None] * last_column_scale[None, :]
            else:
                # The sums change to the scales of the last segment: a second set would not fit the registers.
                row_scale, row_ratio = floored(last_row_scale, row_scale)
                column_scale, column_ratio = floored(last_column_scale, column_scale)
                sums = sums * row_ratio[:, None] * column_ratio[None, :]
                sums = _add_products(
                    sums, a, b, first_segment, k, k, row_start, column_start, a_rows, b_rows, BLOCK_K, DESCRIPTORS,
                    INTEGERS,
                )  # fmt: skip
                y = sums * row_scale[:, None] * column_scale[None, :]
        else:
            y = sums.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
        if RANK > 0:
            if not EARLY:
                projected, power, u = factors(low, up, a_rows, b_rows, rank, stride_up, RANK)
            y = add_branch(y, projected, power, u)
        if BIAS:
            if not EARLY:
                shift = tl.load(bias + b_rows)
            y += shift.to(tl.float32)[None, :]
        if GELU:
            if column_start + BLOCK_N > gelu_from:
                y = tl.where((columns >= gelu_from)[None, :], gelu(y), y)
        if STORE_DESCRIPTORS:
            if HALVES:
                left, right = y.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
                out.store([row_start, column_start], rounded(left, OUT_DTYPE))
                out.store([row_start, column_start + BLOCK_N // 2], rounded(right, OUT_DTYPE))
            else:
                out.store([row_start, column_start], rounded(y, OUT_DTYPE))
        else:
            at = out + rows.to(tl.int64)[:, None] * n + columns[None, :]
            tl.store(at, rounded(y, OUT_DTYPE), mask=(rows < m)[:, None] & (columns < n)[None, :])
