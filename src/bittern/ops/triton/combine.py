"""What programs summed of a product with few tokens, put together to the result.

The maths, for P parts of K and the parts of the projection (`skinny`):

    y[m, n] = sum_p sums[p, m, n]  +  ((sum_q low[q, m, :]) · U^T)[m, n]  +  bias[n]          gelu(y) from one output on

in float32, in this order, whoever comes first: runs on a device are equal.

Layout: a program owns 64 outputs of 16 tokens.

Floor: sums written just before, which the L2 cache has: 4·P·M·N bytes, 3072 outputs of one token in 8 parts 98 kB, of
64 tokens in 4 parts 3.1 MB. The launch is what takes time, about 2 us.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bittern.ops.triton.config import padded_rank
from bittern.ops.triton.launch import Launch, cdiv, launch
from bittern.ops.triton.numerics import add_branch, gelu, in_range, rounded
from bittern.ops.triton.projection import sum_of_parts

BLOCK_M, BLOCK_N, WARPS = 16, 64, 4


def combine(
    sums: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    gelu_from: int | None = None,
    launch: Launch = launch,
) -> None:
    """Fills `out`.

    Args:
        sums: float32 [P, M, N], contiguous.
        low: Down-projected inputs in parts, float32 [Q, M, R], contiguous.
        up: Second factor of the branch [N, R], rows of any stride.
        bias: [N].
        out: [M, N] in any float dtype, contiguous.
        gelu_from: First output that passes through a GELU; None for none.
        launch: What launches.
    """
    parts, m, n = sums.shape
    rank = 0 if up is None else up.shape[1]
    launch(
        combine_kernel,
        (cdiv(n, BLOCK_N), cdiv(m, BLOCK_M)),
        (sums, low, up, bias, out),
        (m, n, rank, 0 if up is None else up.stride(0), gelu_from or 0),
        PARTS=parts,
        LOW_PARTS=0 if low is None else len(low),
        RANK=padded_rank(rank),
        BIAS=bias is not None,
        GELU=gelu_from is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=WARPS,
    )


@triton.jit
def combine_kernel(
    sums,
    low,
    up,
    bias,
    out,
    m,
    n,
    rank,
    stride_up,
    gelu_from,
    PARTS: tl.constexpr,
    LOW_PARTS: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """See the module."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (tokens < m)[:, None] & (rows < n)[None, :]
    wide = tl.minimum(rows, n - 1).to(tl.int64)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Some are asked for before the first of them is needed.
    for part in tl.range(0, PARTS, loop_unroll_factor=8):
        at = (part * m + tokens).to(tl.int64)[:, None] * n + rows[None, :]
        total += tl.load(sums + at, mask=mask, other=0.0)
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        u = tl.load(up + wide[:, None] * stride_up + ranks[None, :], mask=(ranks < rank)[None, :], other=0.0)
        projected, power = in_range(sum_of_parts(low, tokens, m, rank, LOW_PARTS, RANK), u.dtype)
        total = add_branch(total, projected, power, u)
    if BIAS:
        total += tl.load(bias + wide).to(tl.float32)[None, :]
    if GELU:
        total = tl.where((rows >= gelu_from)[None, :], gelu(total), total)
    at = tokens.to(tl.int64)[:, None] * n + rows[None, :]
    tl.store(out + at, rounded(total, out.dtype.element_ty), mask=mask)
