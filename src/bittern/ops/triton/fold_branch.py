"""Packed weights and their branch to one e4m3 operand, for the GEMM: many tokens then need no branch.

The maths, for one row and K-segment (the reference's `fold_with_branch`):

    bound = largest · max_g |scale_g| + sum_r (max over 64 rows of |U_r|) · max_k |D_rk · s_k|
    c = the power of two with 128 c <= bound < 256 c
    q_k = round(codes_k · (scale_group / c) + sum_r (U_r / c) · (D_rk · s_k))

c is a power of two, so that U / c is still a bf16 number. What it takes has to be there before the first weight is
written: peaks and maxima of U and D are worked out by programs of their own in the launch that makes codes of the
tokens (`whole_rows`), where they wait for memory beside others; elsewhere they are a launch, 3 us or more. Maxima are
those of each rank, since the size of U · D may lie in either factor, and otherwise so in a LoRA beside others. D · s is
rounded to bf16, D's dtype, for the matrix units.

Layout: as of `unpack`, int4 in groups of any multiple of 64 inputs or whole rows; D [R, K] and U [N, R] in bf16.
`specialized_fold` does the same where the GPU and Triton are those that it was written for.

Floor: as of `unpack`, N·K·(1/2 + 1 + 2/G) bytes; 21504 x 3072 101 MB or 33.7 us at 3 TB/s. With rank 32 4.2 GFLOP of
products, 7 us, and about 4 operations a weight on the general ALUs, which overlap with the bytes.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bittern.ops import reference
from bittern.ops.triton.config import padded_rank
from bittern.ops.triton.launch import Launch, cdiv, launch
from bittern.ops.triton.numerics import (
    eight_bits,
    larger_magnitude,
    largest_of,
    product,
    reciprocal_of_power,
    rounded,
)
from bittern.ops.triton.unpack import numbers

LEAST = tl.constexpr(reference._LEAST_FOLDED)
LARGEST = tl.constexpr(8.0)
"""The largest magnitude of an int4 code."""
PART = tl.constexpr(64)
"""Inputs that share a scale at the least."""
IN_DOWN = 32
"""Programs that look for the largest number of D."""
PER_FINDER = tl.constexpr(reference.FOLDED_TOGETHER)
"""Rows of every other program."""
_BLOCK_N, _BLOCK_K = PER_FINDER.value, 128


class Weight(NamedTuple):
    """One K-segment of a weight with its branch.

    Attributes:
        codes: Packed codes of the segment [N, K / 2], rows of any stride.
        scales: Their scales [N, groups], rows of any stride.
        group: Inputs that share a scale: a multiple of 64, or K.
        smooth: What divides the inputs [K], bf16, float16 or float32.
        down: First factor [R, K] in bf16.
        up: Second factor [N, R] in bf16.
        column_scales: float32 [N]; takes c.
        bounds: float32 (`bounds_of`), contiguous; takes peaks [N], and maxima by rank: of parts of D
            [IN_DOWN, padded R], and of 64 rows of U each [N / 64, padded R].
    """

    codes: Tensor
    scales: Tensor
    group: int
    smooth: Tensor | None
    down: Tensor
    up: Tensor
    column_scales: Tensor
    bounds: Tensor

    @property
    def finders(self) -> int:
        """Programs that fill `bounds`."""
        return IN_DOWN + cdiv(len(self.up), PER_FINDER.value)


def bounds_of(n: int, rank: int) -> int:
    """Numbers in the bounds of N rows and a branch."""
    return n + (IN_DOWN + cdiv(n, PER_FINDER.value)) * padded_rank(rank)


def find_bounds(weight: Weight, launch: Launch = launch) -> None:
    """Fills `bounds`, in a launch of its own."""
    n, rank = weight.up.shape
    launch(
        bounds_kernel,
        (weight.finders,),
        (weight.scales, weight.smooth, weight.down, weight.up, weight.bounds),
        (
            n,
            weight.down.shape[1],
            rank,
            weight.scales.stride(0),
            weight.down.stride(0),
            weight.up.stride(0),
        ),
        GROUP=weight.group,
        SMOOTH=weight.smooth is not None,
        RANK=padded_rank(rank),
        IN_DOWN=IN_DOWN,
        num_warps=4,
    )


def fold_branch(weight: Weight, out: Tensor, launch: Launch = launch) -> None:
    """Fills `out`, e4m3 [N, width]; what lies beyond the segment's inputs becomes 0, and `column_scales`."""
    n, rank = weight.up.shape
    k, width = weight.down.shape[1], out.shape[1]
    launch(
        fold_kernel,
        (cdiv(n, _BLOCK_N), cdiv(width, _BLOCK_K)),
        (weight.codes, weight.scales, weight.smooth, weight.down, weight.up, weight.bounds, weight.column_scales, out),
        (
            n,
            k,
            width,
            rank,
            weight.codes.stride(0),
            weight.scales.stride(0),
            weight.down.stride(0),
            weight.up.stride(0),
            out.stride(0),
        ),
        GROUP=weight.group,
        SMOOTH=weight.smooth is not None,
        RANK=padded_rank(rank),
        IN_DOWN=IN_DOWN,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
    )


@triton.jit
def smoothed_down(d, smooth, columns, k, SMOOTH: tl.constexpr):
    """A tile of D · s."""
    if SMOOTH:
        s = tl.load(smooth + columns, mask=columns < k, other=1.0).to(tl.float32)
        return rounded(d.to(tl.float32) * s[None, :], d.dtype)
    else:
        return d


@triton.jit
def _most_of_down(
    down, smooth, found, finder, k, rank, stride_down, SMOOTH: tl.constexpr, RANK: tl.constexpr, IN_DOWN: tl.constexpr
):  # fmt: skip
    """One program's part of the largest magnitudes of D · s by rank."""
    WIDTH: tl.constexpr = 4096 // RANK
    ranks = tl.arange(0, RANK)
    rows = down + ranks[:, None].to(tl.int64) * stride_down
    peak = tl.zeros([RANK, WIDTH], tl.float32)
    for start in tl.range(finder * WIDTH, k, IN_DOWN * WIDTH):
        columns = start + tl.arange(0, WIDTH)
        d = tl.load(rows + columns[None, :], mask=(ranks < rank)[:, None] & (columns < k)[None, :], other=0.0)
        peak = larger_magnitude(peak, smoothed_down(d, smooth, columns, k, SMOOTH).to(tl.float32))
    tl.store(found + finder * RANK + ranks, largest_of(peak))


@triton.jit
def bounds_of_part(
    scales, smooth, down, up, bounds, n, k, rank, stride_scales, stride_down, stride_up, finder,
    GROUP: tl.constexpr, SMOOTH: tl.constexpr, RANK: tl.constexpr, IN_DOWN: tl.constexpr,
):  # fmt: skip
    """What one of the programs that find bounds does; see the module."""
    PARTS: tl.constexpr = 32
    if finder < IN_DOWN:
        _most_of_down(down, smooth, bounds + n, finder, k, rank, stride_down, SMOOTH, RANK, IN_DOWN)
    else:
        rows = (finder - IN_DOWN) * PER_FINDER + tl.arange(0, PER_FINDER)
        inside = (rows < n)[:, None]
        wide = tl.minimum(rows, n - 1).to(tl.int64)
        peak = tl.zeros([PER_FINDER, PARTS], tl.float32)
        for start in tl.range(0, k, PARTS * PART):
            # In parts of 64 inputs, of which a group has one or more.
            parts = start + tl.arange(0, PARTS) * PART
            places = scales + wide[:, None] * stride_scales + (parts // GROUP)[None, :]
            scale = tl.load(places, mask=inside & (parts < k)[None, :], other=0.0).to(tl.float32)
            peak = larger_magnitude(peak, scale)
        tl.store(bounds + rows, largest_of(peak) * LARGEST, mask=rows < n)
        ranks = tl.arange(0, RANK)
        u = tl.load(up + wide[:, None] * stride_up + ranks[None, :], mask=(ranks < rank)[None, :], other=0.0)
        tl.store(bounds + n + finder * RANK + ranks, largest_of(tl.abs(u.to(tl.float32)), 0))


@triton.jit
def bounds_kernel(
    scales, smooth, down, up, bounds, n, k, rank, stride_scales, stride_down, stride_up,
    GROUP: tl.constexpr, SMOOTH: tl.constexpr, RANK: tl.constexpr, IN_DOWN: tl.constexpr,
):  # fmt: skip
    """Bounds and nothing else."""
    bounds_of_part(
        scales, smooth, down, up, bounds, n, k, rank, stride_scales, stride_down, stride_up, tl.program_id(0),
        GROUP, SMOOTH, RANK, IN_DOWN,
    )  # fmt: skip


@triton.jit
def scale_within(bound):
    """C of rows with these bounds."""
    power = (bound.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 0.0078125
    return tl.where(power < LEAST, LEAST, power)


@triton.jit
def fold_kernel(
    codes, scales, smooth, down, up, bounds, column_scales, out, n, k, width, rank, stride_codes, stride_scales,
    stride_down, stride_up, stride_out, GROUP: tl.constexpr, SMOOTH: tl.constexpr, RANK: tl.constexpr,
    IN_DOWN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """See the module; one program for each tile of weights."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    wide, columns = tl.minimum(rows, n - 1).to(tl.int64), start + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, RANK)
    known = (ranks < rank)[None, :]
    parts_of_down = tl.arange(0, IN_DOWN)[:, None] * RANK + ranks[None, :]
    most = largest_of(tl.load(bounds + n + parts_of_down), 0)
    together = tl.load(bounds + n + (IN_DOWN + tl.program_id(0)) * RANK + ranks)
    c = scale_within(tl.load(bounds + wide) + tl.sum(together * most, axis=0))
    if start == 0:
        tl.store(column_scales + rows, c, mask=rows < n)
    inverse = reciprocal_of_power(c)[:, None]

    places = start // 2 + tl.arange(0, BLOCK_K // 2)
    packed = tl.load(codes + wide[:, None] * stride_codes + places[None, :], mask=(places < k // 2)[None, :], other=0)
    parts = start + tl.arange(0, BLOCK_K // PART) * PART
    scale = tl.load(
        scales + wide[:, None] * stride_scales + (parts // GROUP)[None, :], mask=(parts < k)[None, :], other=0.0
    )
    factor = scale.to(tl.float32) * inverse
    values = numbers(packed, 2, False)
    values = values.reshape(BLOCK_N, BLOCK_K // PART, PART) * factor[:, :, None]

    u = tl.load(up + wide[:, None] * stride_up + ranks[None, :], mask=known, other=0.0)
    u = (u.to(tl.float32) * inverse).to(u.dtype)
    d = tl.load(
        down + ranks[:, None].to(tl.int64) * stride_down + columns[None, :],
        mask=(ranks < rank)[:, None] & (columns < k)[None, :],
        other=0.0,
    )
    d = smoothed_down(d, smooth, columns, k, SMOOTH)
    weights = product(u, d, values.reshape(BLOCK_N, BLOCK_K))
    mask = (rows < n)[:, None] & (columns < width)[None, :]
    tl.store(out + wide[:, None] * stride_out + columns[None, :], eight_bits(weights, True), mask=mask)
