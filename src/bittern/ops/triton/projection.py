"""Few tokens down-projected for the low-rank branch: what the 16-bit path adds to its product.

The maths, for M tokens of K inputs and rank R, in P parts of K:

    low[p, m, r] = sum_{k in part p} x[m, k] · D[r, k]          x · D^T = low[0] + low[1] + ... + low[P - 1]

in float32, by matrix instructions. The kernel that needs the projection adds the parts as it reads them, in their
order: no atomics, so that runs are equal, and no further launch. Parts of further segments follow the first's.

Layout: a program owns a part, 16 tokens and 32 of the rank. One pass over K would leave a multiprocessor or two to
read all of D, a latency at a time; the tiles of a part are in flight together. Adding costs each program of the
consumer 4·P·M·R bytes from the L2 cache beside the 2·M·K of x, that is R / 256 as much with parts of 512 inputs.

Floor: x and D once: 3072 inputs, 64 tokens, rank 32 0.6 MB or 0.2 us at 3 TB/s, 12288 inputs 2.4 MB or 0.8 us. The
launch, about 2 us with the latency of its first loads, is more than either.
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

BLOCK_M, BLOCK_R, BLOCK_K = 16, 32, 128
WARPS, STAGES = 4, 4
_LEAST_TILES = 4
"""Of a part: as many as are in flight."""
_MOST_PARTS = 16
"""Of a segment: what adds them reads each."""


def _tiles_of_a_part(k: int) -> int:
    return max(_LEAST_TILES, cdiv(k, _MOST_PARTS * BLOCK_K))


def parts_of(k: int) -> int:
    """How many parts a segment of so many inputs is summed in."""
    return cdiv(k, _tiles_of_a_part(k) * BLOCK_K)


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
    launch(
        projection_kernel,
        (parts_of(k), cdiv(m, BLOCK_M), cdiv(rank, BLOCK_R)),
        (x, down, low),
        (m, k, rank, x.stride(0), down.stride(0)),
        TILES=_tiles_of_a_part(k),
        BLOCK_M=BLOCK_M,
        BLOCK_R=BLOCK_R,
        BLOCK_K=BLOCK_K,
        num_warps=WARPS,
        num_stages=STAGES,
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
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """See the module; one program for each part, BLOCK_M tokens and BLOCK_R of the rank."""
    part = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    known, kept = (tokens < m)[:, None], (ranks < rank)[:, None]
    x_rows = x + tokens.to(tl.int64)[:, None] * stride_x
    down_rows = down + ranks.to(tl.int64)[:, None] * stride_down

    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for tile in range(TILES):
        columns = (part * TILES + tile) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (columns < k)[None, :]
        u = tl.load(x_rows + columns[None, :], mask=known & inside, other=0.0)
        d = tl.load(down_rows + columns[None, :], mask=kept & inside, other=0.0)
        total = product(u, d.T, total)
    at = low + (part * m + tokens)[:, None] * rank + ranks[None, :]
    tl.store(at, total, mask=known & (ranks < rank)[None, :])
