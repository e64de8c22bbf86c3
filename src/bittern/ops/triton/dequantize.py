"""Packed weights to a 16-bit operand, for many tokens on the 16-bit path.

The maths: the effective weight of the reference, rounded once to 16 bits, so that one call of the vendor's GEMM
with the raw x is the whole layer:

    W[n, k] = codes[n, k] · scales[n, group] · (1 / s[k])  +  sum_r U[n, r] · D[r, k]

Layout: packed bytes and scales as for `unpack`; the result is row-major over the inputs as they are, without
padding. A program makes one tile; the low-rank product runs on tensor cores and is added in float32, in pieces of the
rank where shared memory has no room for all of it.

Floor: N·K·(b/8 + 2 + 2/G) bytes; 9216 x 3072 int4 g64 71 MB or 24 us at 3 TB/s, 8 % of the bf16 GEMM with 4,096
tokens. With a few hundred tokens this traffic costs more than it should: those want a fused kernel.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bittern import formats
from bittern.formats import Segment
from bittern.ops.triton.config import Device, device_of, padded_rank
from bittern.ops.triton.launch import cdiv, launch
from bittern.ops.triton.numerics import product, reciprocal_of_smooth, rounded
from bittern.ops.triton.unpack import load_weights

BLOCK_N, BLOCK_K = 64, 256


def dequantize_segment(
    codes: Tensor,
    scales: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    weight: str,
    segment: Segment,
    out: Tensor,
) -> None:
    """Fills one K-segment of the effective weight.

    Args:
        codes: Packed codes [N, bytes], rows of any stride.
        scales: Weight scales [N, groups], rows of any stride.
        smooth: Divides the segment's inputs [K].
        down: First factor of the branch [R, K], rows of any stride.
        up: Second factor [N, R], rows of any stride.
        weight: "int4", "nvfp4" or "ternary".
        segment: Where the segment lies in codes and scales.
        out: [N, K] in any float dtype, rows of any stride.
    """
    (n, k), per_byte = out.shape, formats.get(weight).codes_per_byte
    grouped = segment.groups.stop - segment.groups.start > 1
    rank = 0 if up is None else up.shape[1]
    launch(
        dequantize_kernel,
        (cdiv(n, BLOCK_N), cdiv(k, BLOCK_K)),
        (codes, scales, smooth, down, up, out),
        (
            n,
            k,
            cdiv(k, per_byte),
            segment.padded.start // per_byte,
            segment.groups.start,
            codes.stride(0),
            scales.stride(0),
            0 if down is None else down.stride(0),
            0 if up is None else up.stride(0),
            out.stride(0),
            rank,
        ),
        PER_BYTE=per_byte,
        FLOATS=weight == "nvfp4",
        GROUP=segment.size if grouped else 0,
        SMOOTH=smooth is not None,
        RANK=padded_rank(rank),
        RANKS=ranks_at_once(device_of(out.device), rank, _is_wide(down, up)),
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=8,
        enable_fp_fusion=False,
    )


def ranks_at_once(device: Device, rank: int, wide: bool) -> int:
    """How much of a rank one product takes: all of it, unless the tiles of D and U then exceed the shared memory.

    Tiles do not become narrower instead, for they hold whole groups.

    Args:
        device: Where it runs.
        rank: Of the branch.
        wide: Whether the product is one of float32 numbers.
    """
    ranks = max(16, padded_rank(rank))
    if wide:
        # From Hopper on, matrix instructions of data centres' GPUs read D from shared memory: 128 KiB for 64 of the
        # rank. Of less, in more pieces, Triton 3.6 makes no code for 10.0. Elsewhere, more than 32 spill by kilobytes.
        return min(ranks, 64 if device.capability[0] in (9, 10) else 32)
    while ranks > 16 and shared_memory(ranks) > device.shared_memory:
        ranks //= 2
    return ranks


def shared_memory(ranks: int) -> int:
    """About how many bytes tiles of so much rank take in 16 bits, and a tile of weights that changes hands."""
    return 2 * ranks * (BLOCK_N + BLOCK_K) + 2 * BLOCK_N * BLOCK_K + 1024


def _is_wide(down: Tensor | None, up: Tensor | None) -> bool:
    # Two 16-bit types meet in tf32.
    return down is not None and up is not None and (down.dtype != up.dtype or down.element_size() > 2)


@triton.jit
def dequantize_kernel(
    codes,
    scales,
    smooth,
    down,
    up,
    out,
    n,
    k,
    packed_width,
    first_byte,
    first_group,
    stride_codes,
    stride_scales,
    stride_down,
    stride_up,
    stride_out,
    rank,
    PER_BYTE: tl.constexpr,
    FLOATS: tl.constexpr,
    GROUP: tl.constexpr,
    SMOOTH: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """See the module; one program for each tile."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    columns = start + tl.arange(0, BLOCK_K)
    inside, known = (rows < n)[:, None], columns < k
    wide = tl.minimum(rows, n - 1).to(tl.int64)
    codes_rows = codes + wide[:, None] * stride_codes + first_byte
    scale_rows = scales + wide[:, None] * stride_scales + first_group
    w = load_weights(
        codes_rows,
        scale_rows,
        1.0,
        start,
        k,
        packed_width,
        inside,
        PER_BYTE,
        FLOATS,
        GROUP,
        BLOCK_N,
        BLOCK_K,
        EVEN=False,
    )
    if GROUP == 0:
        w *= tl.load(scale_rows).to(tl.float32)
    if SMOOTH:
        w *= reciprocal_of_smooth(tl.load(smooth + columns, mask=known, other=1.0))[None, :]
    for first_rank in tl.static_range(0, RANK, RANKS):
        ranks = first_rank + tl.arange(0, RANKS)
        u = tl.load(up + wide[:, None] * stride_up + ranks[None, :], mask=(ranks < rank)[None, :], other=0.0)
        d_inside = (ranks < rank)[:, None] & known[None, :]
        d = tl.load(down + ranks[:, None] * stride_down + columns[None, :], mask=d_inside, other=0.0)
        w = product(u, d, w)
    at = out + wide[:, None] * stride_out + columns[None, :]
    tl.store(at, rounded(w, out.dtype.element_ty), mask=inside & known[None, :])
