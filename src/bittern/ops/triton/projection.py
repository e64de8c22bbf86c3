"""Up to a thousand tokens down-projected for the low-rank branch, in parts of K.

The maths, for M tokens of K inputs and rank R, in P parts of K:

    low[p, m, r] = sum_{k in part p} x[m, k] · D[r, k]          x · D^T = low[0] + low[1] + ... + low[P - 1]

in float32, by matrix instructions. Whatever kernel comes next adds the parts, in their order: no atomics, so that runs
are equal. Parts of further segments follow the first's.

Layout: a program owns a part, up to 64 tokens and 32 of the rank. One pass over K would leave a few multiprocessors to
read all of D, a latency at a time: with 512 tokens of 12288 inputs the one-walk prologue takes 34 us, parts 7 and codes
without a branch 14. Adding costs 4·P·M·R bytes, which stay in the L2 cache, beside the 2·M·K of x: R / 256 as much with
parts of 512 inputs.

Floor: x and D once: 3072 inputs, 512 tokens, rank 32 3.3 MB or 1.1 us at 3 TB/s, 12288 inputs 13.4 MB or 4.5 us. The
launch, about 2 us with the latency of its first loads, is more than the former.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bittern.ops.triton.launch import Launch, cdiv, contiguous_rows, launch
from bittern.ops.triton.numerics import product

BLOCK_R, BLOCK_K = 32, 128
WARPS, STAGES = 4, 4
_LEAST_PART = 512
"""Inputs: as many tiles as are in flight."""
_MOST_PARTS = 16
"""Of a segment: what adds them reads each."""


def part_of(k: int) -> int:
    """Inputs of a part of a segment; a multiple of `_LEAST_PART` or of a tile."""
    return max(_LEAST_PART, cdiv(k, _MOST_PARTS * BLOCK_K) * BLOCK_K)


def parts_of(k: int) -> int:
    """How many parts a segment of so many inputs is summed in."""
    return cdiv(k, part_of(k))


def tokens_at_once(factor_bytes: int) -> int:
    """Tokens of a program, for numbers of D of so many bytes; more are spilled with float32."""
    return 16 if factor_bytes > 2 else 64


def project(x: Tensor, down: Tensor, low: Tensor, launch: Launch = launch) -> None:
    """Fills `low`, whose sum over its first axis is x · D^T.

    Args:
        x: A segment's inputs [M, K], rows of any stride.
        down: First factor of the branch [R, K], rows of any stride; any float dtype, as x.
        low: float32 [`parts_of(K)`, M, R], contiguous.
        launch: What launches.
    """
    (m, k), rank = x.shape, down.shape[0]
    x = contiguous_rows(x)
    block_m = tokens_at_once(down.element_size())
    launch(
        projection_kernel,
        (parts_of(k), cdiv(m, block_m), cdiv(rank, BLOCK_R)),
        (x, down, low),
        (m, k, rank, x.stride(0), down.stride(0)),
        PART=part_of(k),
        BLOCK_M=block_m,
        BLOCK_R=BLOCK_R,
        BLOCK_K=BLOCK_K,
        STAGES=STAGES,
        num_warps=WARPS,
    )


@triton.jit
def projection_kernel(
    x,
    down,
    low,
    m,
    k,
    rank,
    stride_x,
    stride_down,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """See the module; one program for each part, BLOCK_M tokens and BLOCK_R of the rank."""
    first_token, first_rank = tl.program_id(1) * BLOCK_M, tl.program_id(2) * BLOCK_R
    project_part(
        x, down, low, m, k, rank, stride_x, stride_down, tl.program_id(0), first_token, first_rank, PART, BLOCK_M,
        BLOCK_R, BLOCK_K, STAGES,
    )  # fmt: skip


@triton.jit
def project_part(
    x, down, low, m, k, rank, stride_x, stride_down, part, first_token, first_rank, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part for BLOCK_M tokens and BLOCK_R of the rank."""
    tokens, ranks = first_token + tl.arange(0, BLOCK_M), first_rank + tl.arange(0, BLOCK_R)
    known, kept = (tokens < m)[:, None], (ranks < rank)[:, None]
    x_rows = x + tokens.to(tl.int64)[:, None] * stride_x
    down_rows = down + ranks.to(tl.int64)[:, None] * stride_down

    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
        columns = part * PART + start + tl.arange(0, BLOCK_K)
        inside = (columns < k)[None, :]
        u = tl.load(x_rows + columns[None, :], mask=known & inside, other=0.0)
        d = tl.load(down_rows + columns[None, :], mask=kept & inside, other=0.0)
        total = product(u, d.T, total)
    at = low + (part * m + tokens)[:, None] * rank + ranks[None, :]
    tl.store(at, total, mask=known & (ranks < rank)[None, :])


@triton.jit
def sum_of_parts(low, tokens, m, rank, PARTS: tl.constexpr, RANK: tl.constexpr):
    """The projection [tokens, RANK] of some tokens; 0 beyond the last token and the rank."""
    ranks = tl.arange(0, RANK)
    mask = (tokens < m)[:, None] & (ranks < rank)[None, :]
    total = tl.zeros([tokens.shape[0], RANK], tl.float32)
    # Some parts are asked for before the first of them is needed.
    for part in tl.range(0, PARTS, loop_unroll_factor=4):
        total += tl.load(low + (part * m + tokens)[:, None] * rank + ranks[None, :], mask=mask, other=0.0)
    return total
