"""The GEMM of 4-bit codes on int8 tensor cores, with the scales of groups in its loop: exact W4A4 on any GPU.

The maths, for M tokens, N outputs and chunks c of K that lie within one group of activations and one of weights:

    y = sum over c of (Qa_c · Qw_c^T) · a[c, m] · w[n, c]  +  low · U^T  +  bias,  and gelu(y) from one output on

with codes in int8. A chunk's sum, at most 64 · 15 · 8, is exact in int32; scaling and adding is float32.

Layout: both operands are row-major, K contiguous, segments at multiples of 128; activation scales [K / 64, M], weight
scales as the layer has them, [N, groups]. One program computes one tile.

Floor: the tensor cores' time, 2·M·N·K operations at the rate of int8, and twice as much for the general ALUs, since
each sum of 64 products costs a conversion at half rate, a product and a fused multiply-add: by Hopper's datasheet
140 ns and 290 ns for each 128 x 128 x 64 of a multiprocessor. One after the other that is 2.4 times what the 8-bit
GEMM takes there, an estimate. This is for evaluation: 8-bit activations are faster and closer to the original.
Native 4-bit matrix instructions cannot be reached from Triton.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bittern.formats import KLayout
from bittern.ops.triton.config import GroupedGemmConfig, padded_rank
from bittern.ops.triton.gemm import DTYPES, factors
from bittern.ops.triton.launch import Launch, cdiv, launch
from bittern.ops.triton.numerics import add_branch, gelu, rounded
from bittern.scheme import ACTIVATION_GROUP

_GROUP = tl.constexpr(ACTIVATION_GROUP)


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    row_scales: Tensor,
    scales: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    layout: KLayout,
    first_segment: int,
    gelu_from: int | None,
    config: GroupedGemmConfig,
    launch: Launch = launch,
) -> None:
    """Fills `out` with the product of codes and scales.

    Args:
        a: Activation codes, int8 [M, K], contiguous.
        b: Weight codes, int8 [N, K], contiguous.
        row_scales: Activation scales, float32 [K / 64, M], contiguous.
        scales: Weight scales [N, groups], rows of any stride.
        low: Down-projected inputs, float32 [M, R], contiguous.
        up: Second factor of the branch [N, R], rows of any stride.
        bias: [N].
        out: The result [M, N], contiguous, any float dtype.
        layout: Segments and groups of the weight, one segment or two.
        first_segment: Where the second segment starts in a and b; K if there is one.
        gelu_from: First output that passes through a GELU; None for none.
        config: Tile and launch.
        launch: What launches.
    """
    m, n = out.shape
    rank, group = 0 if up is None else up.shape[1], layout.group_size or 0
    launch(
        grouped_gemm_kernel,
        (cdiv(m, config.block_m) * cdiv(n, config.block_n),),
        (a, b, out, row_scales, scales, low, up, bias),
        (
            m,
            n,
            a.shape[1],
            layout.segments[0],
            layout.segments[-1],
            first_segment,
            layout.groups_per_segment[0],
            scales.stride(0),
            rank,
            0 if up is None else up.stride(0),
            gelu_from or 0,
        ),
        SEGMENTS=len(layout.segments),
        GROUP=group,
        RANK=padded_rank(rank),
        BIAS=bias is not None,
        GELU=gelu_from is not None,
        OUT_DTYPE=DTYPES[out.dtype],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        CHUNK=min(group, ACTIVATION_GROUP) if group else ACTIVATION_GROUP,
        GROUP_M=config.group_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@triton.jit
def _add_chunks(
    y, a_rows, b_rows, row_scales, scale_rows, inputs, first, m, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the products of one segment, which starts at `first`, to a tile of float32 sums."""
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    column_scale = tl.load(scale_rows).to(tl.float32)
    for start in range(0, inputs, CHUNK):
        columns = first + start + tl.arange(0, CHUNK)
        left = tl.load(a_rows + columns[None, :])
        right = tl.load(b_rows + columns[None, :])
        row_scale = tl.load(row_scales + (first + start) // _GROUP * m)
        if GROUP > 0:
            column_scale = tl.load(scale_rows + start // GROUP).to(tl.float32)
        sums = tl.dot(left, right.T, zeros, out_dtype=tl.int32).to(tl.float32)
        y += sums * row_scale[:, None] * column_scale[None, :]
    return y


@triton.jit
def grouped_gemm_kernel(
    a,
    b,
    out,
    row_scales,
    scales,
    low,
    up,
    bias,
    m,
    n,
    k,
    inputs,
    last_inputs,
    first_segment,
    first_groups,
    stride_scales,
    rank,
    stride_up,
    gelu_from,
    SEGMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """See the module."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0)
    per_group = GROUP_M * tiles_n
    first_m = (tile // per_group) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    rows = (first_m + (tile % per_group) % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_start = ((tile % per_group) // group_m) * BLOCK_N
    columns = column_start + tl.arange(0, BLOCK_N)
    # Rows beyond the last repeat it and are not stored.
    a_rows, b_rows = tl.minimum(rows, m - 1).to(tl.int64), tl.minimum(columns, n - 1).to(tl.int64)
    left, right = a + a_rows[:, None] * k, b + b_rows[:, None] * k
    scale_rows = scales + b_rows * stride_scales

    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    y = _add_chunks(
        y, left, right, row_scales + a_rows, scale_rows, inputs, 0, m, GROUP, CHUNK, BLOCK_M, BLOCK_N
    )  # fmt: skip
    if SEGMENTS == 2:
        y = _add_chunks(
            y, left, right, row_scales + a_rows, scale_rows + first_groups, last_inputs, first_segment, m, GROUP, CHUNK,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if RANK > 0:
        projected, power, u = factors(low, up, a_rows, b_rows, rank, stride_up, RANK)
        y = add_branch(y, projected, power, u)
    if BIAS:
        y += tl.load(bias + b_rows).to(tl.float32)[None, :]
    if GELU:
        if column_start + BLOCK_N > gelu_from:
            y = tl.where((columns >= gelu_from)[None, :], gelu(y), y)
    at = out + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(at, rounded(y, OUT_DTYPE), mask=(rows < m)[:, None] & (columns < n)[None, :])
