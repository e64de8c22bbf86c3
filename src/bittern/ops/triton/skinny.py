"""Few tokens against packed weights, read once: adaLN modulation and other small M, in 16 and in 8 bits.

The maths, for M tokens, segments and groups of K (the reference's a16; x smoothed before, where it is):

    y[m, n] = sum_g scales[n, g] · (sum_{k in g} codes[n, k] · x[m, k])  +  (low · U^T)[m, n]  +  bias[n]

and of the 8-bit paths, with x as codes and weights folded to 8 bits as `unpack` does:

    y[m, n] = (sum_k q[n, k] · x[m, k]) · c[n] · row_scales[m]  +  ...          q = round(codes · (scales · (1 / c)))

Codes are exact in bf16 and float16, so that products with an unsmoothed x are exact; sums are float32, group by
group, in one fixed order, without atomics. So are codes of 8 bits in float16, where they are multiplied: matrix units
have time for it.

Layout: a program owns BLOCK_N rows of packed bytes and walks K, or a part of it where a layer has too few rows for all
multiprocessors (3072 are 96 programs of 32): `combine` adds the parts then, and the branch. Further programs of the
same launch project x for it, in parts of K as well. Weights are the left operand of the product,
[BLOCK_N, k] · [k, BLOCK_M]; a byte's codes go to as many operands as it has codes, and x is split to match, so
that nothing is interleaved; `numbers_of_16_bits` makes them.

A product takes 16 numbers or more, and groups of 16 have 8 of even k, ternary ones of 32 as many at each place of a
byte. There a tile spans several groups, so that rows are read 16 to 64 bytes at a time, and is multiplied once for
each, with the inputs of the others 0: matrix units have time for it while bytes are waited for.

Floor: bytes alone, N·K·b/8 and the scales: 18432 x 3072 int4 g64 30.1 MB or 10.0 us at 3 TB/s, ternary with row
scales 14.2 MB or 4.7 us, bf16 113 MB or 37.7 us. About 1.4 operations a weight on the general ALUs, 2.8 us.
nvfp4, whose scales of two levels come combined in float32, 42.5 MB or 14.2 us.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bittern import formats
from bittern.formats import Segment
from bittern.ops.triton.config import SkinnyConfig, few_at_once
from bittern.ops.triton.launch import Launch, cdiv, contiguous_rows, launch
from bittern.ops.triton.numbers_of_16_bits import crumbs, nibbles
from bittern.ops.triton.numerics import (
    eight_bits,
    larger_magnitude,
    product,
    reciprocal,
    rounded,
    scale_of,
)
from bittern.ops.triton.projection import BLOCK_R, part_of, parts_of, project_part

PROJECTION_K, PROJECTION_STAGES = 64, 3
"""Inputs of a tile of the projection, and tiles in flight: less than by itself, for the product needs shared memory."""
SCALES = tl.constexpr(64)
"""Of a row, looked at together."""


def skinny_segment(
    x: Tensor,
    row_scales: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    weight: str,
    segment: Segment,
    bias: Tensor | None,
    out: Tensor,
    config: SkinnyConfig,
    raw: Tensor | None = None,
    down: Tensor | None = None,
    low: Tensor | None = None,
    launch: Launch = launch,
) -> None:
    """One K-segment's product, whole or in parts.

    Args:
        x: The segment's inputs [M, K], rows of any stride: bf16 or float16, divided by the smoothing, or 8-bit codes.
        row_scales: Of the codes, float32 [M].
        codes: Packed codes of the weights [N, bytes], rows of any stride.
        scales: Weight scales [N, groups], rows of any stride.
        weight: "int4", "nvfp4" or "ternary".
        segment: Where the segment lies in codes and scales.
        bias: [N]; where there are no parts.
        out: The result [M, N] in any float dtype, or float32 [parts, M, N] for `combine`; contiguous.
        config: Tile and launch.
        raw: The inputs [M, K] as they came, for the branch; rows of any stride.
        down: First factor of the branch [R, K], rows of any stride.
        low: float32 [`parts_of(K)`, M, R], contiguous; takes `raw` down-projected in parts.
        launch: What launches.
    """
    (m, k), n, fmt = x.shape, codes.shape[0], formats.get(weight)
    x, raw = contiguous_rows(x), None if raw is None else contiguous_rows(raw)
    per_byte = fmt.codes_per_byte
    count = segment.groups.stop - segment.groups.start
    group = None if count == 1 else segment.size
    groups, block_b = config.groups_at_once(k, group, per_byte), config.packed(k, group, per_byte)
    block_m = few_at_once(m)
    rank = 0 if down is None else down.shape[0]
    parts = out.shape[0] if out.ndim == 3 else 1
    blocks_n, blocks_m, width = cdiv(n, config.block_n), cdiv(m, block_m), cdiv(k, per_byte)
    projecting = parts_of(k) * blocks_m * cdiv(rank, BLOCK_R) if rank else 0
    launch(
        skinny_kernel,
        (blocks_n * blocks_m * parts + projecting,),
        (x, row_scales, codes, scales, bias, out, raw, down, low),
        (
            m,
            n,
            k,
            width,
            count,
            segment.padded.start // per_byte,
            segment.groups.start,
            cdiv(cdiv(width, block_b), parts) * block_b,
            x.stride(0),
            codes.stride(0),
            scales.stride(0),
            rank,
            0 if raw is None else raw.stride(0),
            0 if down is None else down.stride(0),
        ),
        PER_BYTE=per_byte,
        FLOATS=weight == "nvfp4",
        LARGEST=fmt.largest,
        GROUPS=groups,
        BITS=8 if row_scales is not None else 16,
        FP8=x.dtype == torch.float8_e4m3fn,
        OPERAND=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        PARTS=parts,
        PART=part_of(k) if rank else 0,
        BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_B=block_b,
        BLOCK_R=BLOCK_R,
        BLOCK_K=PROJECTION_K,
        STAGES=PROJECTION_STAGES,
        num_warps=config.warps,
        num_stages=config.stages,
        # Codes are rounded after a product, as the reference rounds them.
        enable_fp_fusion=row_scales is None,
    )


@triton.jit
def _folded(w, factor, BITS: tl.constexpr, FP8: tl.constexpr, OPERAND: tl.constexpr):
    """Codes [n, b] times a factor for each row as the numbers of 8-bit codes; with 16 bits as they are."""
    if BITS == 16:
        return w
    else:
        return eight_bits(w.to(tl.float32) * factor[:, None], FP8).to(OPERAND)


@triton.jit
def _plus_products(
    term, packed, u, factor, OPERAND: tl.constexpr, PER_BYTE: tl.constexpr, FLOATS: tl.constexpr, BITS: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """`term` [n, m] and the products of bytes [n, b] of codes and inputs [m, b · PER_BYTE]."""
    if PER_BYTE == 2:
        even, odd = u.reshape(u.shape[0], packed.shape[1], 2).split()
        w0, w1 = nibbles(packed, OPERAND, FLOATS)
        term = product(_folded(w0, factor, BITS, FP8, OPERAND), even.T, term)
        term = product(_folded(w1, factor, BITS, FP8, OPERAND), odd.T, term)
    else:
        even, odd = u.reshape(u.shape[0], packed.shape[1], 2, 2).split()
        x0, x2 = even.split()
        x1, x3 = odd.split()
        w0, w1, w2, w3 = crumbs(packed, OPERAND)
        term = product(_folded(w0, factor, BITS, FP8, OPERAND), x0.T, term)
        term = product(_folded(w1, factor, BITS, FP8, OPERAND), x1.T, term)
        term = product(_folded(w2, factor, BITS, FP8, OPERAND), x2.T, term)
        term = product(_folded(w3, factor, BITS, FP8, OPERAND), x3.T, term)
    return term


@triton.jit
def _scale(scale_rows, group, count):
    """A group's scales [n]; 0 beyond the last group."""
    return tl.where(group < count, tl.load(scale_rows + tl.minimum(group, count - 1)).to(tl.float32), 0.0)


@triton.jit
def row_scale(scale_rows, count, rows, LARGEST: tl.constexpr, FP8: tl.constexpr):
    """C of rows of several groups, as `unpack` finds it."""
    peak = tl.zeros([rows.shape[0], SCALES], tl.float32)
    for first in range(0, count, SCALES):
        groups = first + tl.arange(0, SCALES)
        found = tl.load(scale_rows[:, None] + groups[None, :], mask=(groups < count)[None, :], other=0.0)
        peak = larger_magnitude(peak, found.to(tl.float32))
    return scale_of(peak * LARGEST, FP8)


@triton.jit
def skinny_kernel(
    x,
    row_scales,
    codes,
    scales,
    bias,
    out,
    raw,
    down,
    low,
    m,
    n,
    k,
    width,
    count,
    first_byte,
    first_group,
    part_width,
    stride_x,
    stride_codes,
    stride_scales,
    rank,
    stride_raw,
    stride_down,
    PER_BYTE: tl.constexpr,
    FLOATS: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    OPERAND: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """See the module; one program for each BLOCK_N outputs, BLOCK_M tokens and part, and some that project."""
    blocks_m = tl.cdiv(m, BLOCK_M)
    multiplying = tl.cdiv(n, BLOCK_N) * blocks_m * PARTS
    if PART == 0 or tl.program_id(0) < multiplying:
        _multiply(
            x, row_scales, codes, scales, bias, out, m, n, k, width, count, first_byte, first_group, part_width,
            stride_x, stride_codes, stride_scales, PER_BYTE, FLOATS, LARGEST, GROUPS, BITS, FP8, OPERAND, BIAS, BLOCK_M,
            BLOCK_N, BLOCK_B,
        )  # fmt: skip
    else:
        program, blocks_r = tl.program_id(0) - multiplying, tl.cdiv(rank, BLOCK_R)
        project_part(
            raw, down, low, m, k, rank, stride_raw, stride_down, program // (blocks_m * blocks_r),
            program % blocks_m * BLOCK_M, program // blocks_m % blocks_r * BLOCK_R, PART,
            16 if BLOCK_M < 16 else BLOCK_M, BLOCK_R, BLOCK_K, STAGES,
        )  # fmt: skip


@triton.jit
def _multiply(
    x, row_scales, codes, scales, bias, out, m, n, k, width, count, first_byte, first_group, part_width, stride_x,
    stride_codes, stride_scales, PER_BYTE: tl.constexpr, FLOATS: tl.constexpr, LARGEST: tl.constexpr,
    GROUPS: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr, OPERAND: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One part of the product of BLOCK_N outputs and BLOCK_M tokens."""
    WIDTH: tl.constexpr = BLOCK_B * PER_BYTE
    # Codes of rows with one scale are their 8-bit codes.
    FOLD: tl.constexpr = tl.constexpr(16) if GROUPS == 0 else BITS
    blocks_n, blocks_m = tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    rows = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) // (blocks_n * blocks_m)
    inside, known = (rows < n)[:, None], (tokens < m)[:, None]
    wide = tl.minimum(rows, n - 1).to(tl.int64)
    codes_rows = codes + wide[:, None] * stride_codes + first_byte
    scale_rows = scales + wide * stride_scales + first_group
    x_rows = x + tokens.to(tl.int64)[:, None] * stride_x

    folded = tl.full([BLOCK_N], 1.0, tl.float32)
    inverse = folded
    if FOLD == 8:
        folded = row_scale(scale_rows, count, rows, LARGEST, FP8)
        inverse = reciprocal(folded)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = part * part_width
    # A scale is asked for one step before it is needed.
    following = tl.load(scale_rows + (tl.minimum(first, width - 1) // BLOCK_B if GROUPS == 1 else 0))
    for start in range(first, tl.minimum(first + part_width, width), BLOCK_B):
        scale = following.to(tl.float32)
        if GROUPS == 1:
            following = tl.load(scale_rows + tl.minimum(start + BLOCK_B, width - 1) // BLOCK_B)
        places = start + tl.arange(0, BLOCK_B)
        packed = tl.load(codes_rows + places[None, :], mask=(places < width)[None, :], other=0)
        columns = start * PER_BYTE + tl.arange(0, WIDTH)
        u = tl.load(x_rows + columns[None, :], mask=known & (columns < k)[None, :], other=0.0).to(OPERAND)
        if GROUPS > 1:
            for g in tl.static_range(GROUPS):
                own = tl.where((tl.arange(0, WIDTH) // (WIDTH // GROUPS) == g)[None, :], u, 0.0)
                scale = _scale(scale_rows, start // BLOCK_B * GROUPS + g, count)
                total = _plus_group(total, packed, own, scale, inverse, OPERAND, PER_BYTE, FLOATS, FOLD, FP8)
        elif GROUPS == 1:
            total = _plus_group(total, packed, u, scale, inverse, OPERAND, PER_BYTE, FLOATS, FOLD, FP8)
        else:
            total = _plus_products(total, packed, u, inverse, OPERAND, PER_BYTE, FLOATS, FOLD, FP8)
    if GROUPS == 0:
        total *= following.to(tl.float32)[:, None]
    if FOLD == 8:
        total *= folded[:, None]
    if BITS == 8:
        total *= tl.load(row_scales + tokens, mask=tokens < m, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + wide).to(tl.float32)[:, None]
    at = (part * m + tokens).to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(out + at, rounded(total, out.dtype.element_ty), mask=inside & (tokens < m)[None, :])


@triton.jit
def _plus_group(
    total, packed, u, scale, inverse, OPERAND: tl.constexpr, PER_BYTE: tl.constexpr, FLOATS: tl.constexpr,
    FOLD: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Adds a group: weights folded on the way, or their sum scaled."""
    if FOLD == 8:
        return _plus_products(total, packed, u, scale * inverse, OPERAND, PER_BYTE, FLOATS, FOLD, FP8)
    else:
        term = tl.zeros(total.shape, tl.float32)
        term = _plus_products(term, packed, u, inverse, OPERAND, PER_BYTE, FLOATS, FOLD, FP8)
        return total + term * scale[:, None]
