"""Few tokens against packed weights, read once: the 16-bit path of adaLN modulation and other small M.

The maths, for M tokens, segments and groups of K (the reference's a16):

    y[m, n] = sum_g scales[n, g] · (sum_{k in g} codes[n, k] · x[m, k] / s[k])  +  (low · U^T)[m, n]  +  bias[n]

Codes are exact in bf16 and float16, so that products with an unsmoothed x are exact; sums are float32, group by
group, in one fixed order: no atomics, no split of K between programs. A smoothed x is rounded to bf16.

Layout: a program owns BLOCK_N rows of packed bytes and walks K. Weights are the left operand of the product,
[BLOCK_N, k] · [k, BLOCK_M]; a byte's codes go to as many operands as it has codes, and x is split to match, so
that nothing is interleaved. On NVIDIA a code becomes a bf16 in three steps for several at once: mask four bytes
together, put the exponent of 128 above each by `prmt` (128 + code), subtract with one `fma` for two. The bits of a
4-bit float go to the lowest of the exponent and the highest of the significand, and an `fma` for two multiplies them
to size, which is exact; that is 2.5 operations a weight instead of 1.4.

A product takes 16 numbers or more, and groups of 16 have 8 of even k, ternary ones of 32 as many at each place of a
byte. There a tile spans several groups, so that rows are read 32 bytes at a time, and is multiplied once for each,
with the inputs of the others 0: matrix units have time for it while bytes are waited for.

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
from bittern.ops.triton.config import SkinnyConfig, is_small, padded_rank
from bittern.ops.triton.launch import Launch, cdiv, contiguous_rows, launch
from bittern.ops.triton.numerics import INTERPRETED, product, reciprocal_of_smooth, rounded
from bittern.ops.triton.unpack import numbers

_BYTES_OF_PARTS = 32 << 10
"""Of shared memory, which tiles of codes and inputs leave before."""


def parts_at_once(block_m: int, rank: int) -> int:
    """How many parts of the projection are on their way or being added."""
    return 1 if rank == 0 else min(4, 1 + _BYTES_OF_PARTS // (4 * block_m * padded_rank(rank)))


def skinny_segment(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    smooth: Tensor | None,
    weight: str,
    segment: Segment,
    partial: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    config: SkinnyConfig,
    launch: Launch = launch,
) -> None:
    """Adds one K-segment's product to `partial` and writes `out`.

    Args:
        x: The segment's inputs [M, K], bf16 or float16, rows of any stride.
        codes: Packed codes [N, bytes], rows of any stride.
        scales: Weight scales [N, groups], rows of any stride.
        smooth: Divides x [K].
        weight: "int4", "nvfp4" or "ternary".
        segment: Where the segment lies in codes and scales.
        partial: What the segments before gave, float32 [M, N], contiguous.
        low: Down-projected inputs, float32 [parts, M, R], contiguous, whose sum over parts they are (`projection`);
            with the last segment only, as `up` and `bias`.
        up: Second factor of the branch [N, R], rows of any stride.
        bias: [N].
        out: float32 [M, N] for the next segment, or the result in any float dtype; contiguous.
        config: Tile and launch.
        launch: What launches.
    """
    (m, k), n = x.shape, codes.shape[0]
    x = contiguous_rows(x)
    per_byte = formats.get(weight).codes_per_byte
    count = segment.groups.stop - segment.groups.start
    # Groups of a tile; 0 for rows that have one scale.
    groups = 0 if count == 1 else config.groups if is_small(segment.size, per_byte) else 1
    block_m = min(64, 1 << (m - 1).bit_length())
    rank = 0 if up is None else up.shape[1]
    operand = torch.bfloat16 if smooth is not None else x.dtype
    launch(
        skinny_kernel,
        (cdiv(n, config.block_n), cdiv(m, block_m)),
        (x, codes, scales, smooth, partial, low, up, bias, out),
        (
            m,
            n,
            k,
            cdiv(k, per_byte),
            count,
            segment.padded.start // per_byte,
            segment.groups.start,
            x.stride(0),
            codes.stride(0),
            scales.stride(0),
            rank,
            0 if up is None else up.stride(0),
            0 if low is None else len(low),
        ),
        PER_BYTE=per_byte,
        FLOATS=weight == "nvfp4",
        GROUPS=groups,
        SMOOTH=smooth is not None,
        OPERAND=tl.bfloat16 if operand == torch.bfloat16 else tl.float16,
        PARTIAL=partial is not None,
        RANK=padded_rank(rank),
        PART_STAGES=parts_at_once(block_m, rank),
        BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_B=groups * segment.size // per_byte if groups else config.block_b,
        num_warps=config.warps,
        num_stages=config.stages,
    )


_NIBBLES = """
{
    .reg .b32 low, high, magic, one, shift;
    mov.b32 magic, MAGIC;
    mov.b32 one, ONE;
    mov.b32 shift, SHIFT;
    lop3.b32 low, $4, 0x0F0F0F0F, 0x08080808, 0x6a;
    shr.u32 high, $4, 4;
    lop3.b32 high, high, 0x0F0F0F0F, 0x08080808, 0x6a;
    prmt.b32 $0, low, magic, 0x4140;
    prmt.b32 $1, low, magic, 0x4342;
    prmt.b32 $2, high, magic, 0x4140;
    prmt.b32 $3, high, magic, 0x4342;
    fma.rn.TYPE $0, $0, one, shift;
    fma.rn.TYPE $1, $1, one, shift;
    fma.rn.TYPE $2, $2, one, shift;
    fma.rn.TYPE $3, $3, one, shift;
}
"""

# A byte becomes the upper one of 16 bits: the sign of its upper nibble lies right, its other three bits PLACE too high.
_FLOATS = """
{
    .reg .b32 a, b, c, d, e, one, zero;
    mov.b32 one, ONE;
    mov.b32 zero, 0x80008000;
    prmt.b32 c, $4, 0, 0x1404;
    prmt.b32 d, $4, 0, 0x3424;
    shl.b32 a, c, 4;
    shl.b32 b, d, 4;
    and.b32 e, a, 0x70007000;
    shr.u32 e, e, PLACE;
    lop3.b32 $0, a, zero, e, 0xea;
    fma.rn.TYPE $0, $0, one, zero;
    and.b32 e, b, 0x70007000;
    shr.u32 e, e, PLACE;
    lop3.b32 $1, b, zero, e, 0xea;
    fma.rn.TYPE $1, $1, one, zero;
    and.b32 e, c, 0x70007000;
    shr.u32 e, e, PLACE;
    lop3.b32 $2, c, zero, e, 0xea;
    fma.rn.TYPE $2, $2, one, zero;
    and.b32 e, d, 0x70007000;
    shr.u32 e, e, PLACE;
    lop3.b32 $3, d, zero, e, 0xea;
    fma.rn.TYPE $3, $3, one, zero;
}
"""

_CRUMBS = """
{
    .reg .b32 a, b, c, d, magic, one, shift;
    mov.b32 magic, MAGIC;
    mov.b32 one, ONE;
    mov.b32 shift, SHIFT;
    and.b32 a, $8, 0x03030303;
    shr.u32 b, $8, 2;
    and.b32 b, b, 0x03030303;
    shr.u32 c, $8, 4;
    and.b32 c, c, 0x03030303;
    shr.u32 d, $8, 6;
    and.b32 d, d, 0x03030303;
    prmt.b32 $0, a, magic, 0x4140;
    prmt.b32 $1, a, magic, 0x4342;
    prmt.b32 $2, b, magic, 0x4140;
    prmt.b32 $3, b, magic, 0x4342;
    prmt.b32 $4, c, magic, 0x4140;
    prmt.b32 $5, c, magic, 0x4342;
    prmt.b32 $6, d, magic, 0x4140;
    prmt.b32 $7, d, magic, 0x4342;
    fma.rn.TYPE $0, $0, one, shift;
    fma.rn.TYPE $1, $1, one, shift;
    fma.rn.TYPE $2, $2, one, shift;
    fma.rn.TYPE $3, $3, one, shift;
    fma.rn.TYPE $4, $4, one, shift;
    fma.rn.TYPE $5, $5, one, shift;
    fma.rn.TYPE $6, $6, one, shift;
    fma.rn.TYPE $7, $7, one, shift;
}
"""


def _assembly(template: str, **values: str) -> tl.constexpr:
    for name, value in values.items():
        template = template.replace(name, value)
    return tl.constexpr(template)


# 128 + code + 8 - 136 in bf16, 1024 + code + 8 - 1032 in float16; 128 + code + 1 - 129, 1024 + code + 1 - 1025.
_BF16_NIBBLES = _assembly(_NIBBLES, MAGIC="0x43434343", ONE="0x3F803F80", SHIFT="0xC308C308", TYPE="bf16x2")
_FP16_NIBBLES = _assembly(_NIBBLES, MAGIC="0x64646464", ONE="0x3C003C00", SHIFT="0xE408E408", TYPE="f16x2")
_BF16_CRUMBS = _assembly(_CRUMBS, MAGIC="0x43434343", ONE="0x3F803F80", SHIFT="0xC301C301", TYPE="bf16x2")
_FP16_CRUMBS = _assembly(_CRUMBS, MAGIC="0x64646464", ONE="0x3C003C00", SHIFT="0xE401E401", TYPE="f16x2")
# Times 2^127 in bf16 and 2^15 in float16, by which the biases of the exponents differ, and a code counts halves.
_BF16_FLOATS = _assembly(_FLOATS, ONE="0x7F007F00", PLACE="6", TYPE="bf16x2")
_FP16_FLOATS = _assembly(_FLOATS, ONE="0x78007800", PLACE="3", TYPE="f16x2")


@triton.jit
def nibbles(packed, OPERAND: tl.constexpr, FLOATS: tl.constexpr):
    """Bytes as two tensors of codes, of even and of odd k."""
    if INTERPRETED:
        return numbers(packed, 2, FLOATS).reshape(packed.shape[0], packed.shape[1], 2).split()
    elif OPERAND == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BF16_FLOATS if FLOATS else _BF16_NIBBLES,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            _FP16_FLOATS if FLOATS else _FP16_NIBBLES,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def crumbs(packed, OPERAND: tl.constexpr):
    """Bytes as four tensors of codes, the lowest k first."""
    if INTERPRETED:
        wide = packed.to(tl.int32)
        return (
            ((wide & 3) - 1).to(tl.float32),
            ((wide >> 2 & 3) - 1).to(tl.float32),
            ((wide >> 4 & 3) - 1).to(tl.float32),
            ((wide >> 6) - 1).to(tl.float32),
        )
    elif OPERAND == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BF16_CRUMBS,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            _FP16_CRUMBS,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def _plus_products(term, packed, u, OPERAND: tl.constexpr, PER_BYTE: tl.constexpr, FLOATS: tl.constexpr):
    """`term` [n, m] and the products of bytes [n, b] of codes and inputs [m, b · PER_BYTE]."""
    if PER_BYTE == 2:
        even, odd = u.reshape(u.shape[0], packed.shape[1], 2).split()
        w0, w1 = nibbles(packed, OPERAND, FLOATS)
        term = product(w0, even.T, term)
        term = product(w1, odd.T, term)
    else:
        even, odd = u.reshape(u.shape[0], packed.shape[1], 2, 2).split()
        x0, x2 = even.split()
        x1, x3 = odd.split()
        w0, w1, w2, w3 = crumbs(packed, OPERAND)
        term = product(w0, x0.T, term)
        term = product(w1, x1.T, term)
        term = product(w2, x2.T, term)
        term = product(w3, x3.T, term)
    return term


@triton.jit
def _scale(scale_rows, group, count):
    """A group's scales [n]; 0 beyond the last group."""
    return tl.where(group < count, tl.load(scale_rows + tl.minimum(group, count - 1)).to(tl.float32), 0.0)


@triton.jit
def skinny_kernel(
    x,
    codes,
    scales,
    smooth,
    partial,
    low,
    up,
    bias,
    out,
    m,
    n,
    k,
    width,
    count,
    first_byte,
    first_group,
    stride_x,
    stride_codes,
    stride_scales,
    rank,
    stride_up,
    parts,
    PER_BYTE: tl.constexpr,
    FLOATS: tl.constexpr,
    GROUPS: tl.constexpr,
    SMOOTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PARTIAL: tl.constexpr,
    RANK: tl.constexpr,
    PART_STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """See the module; one program for each BLOCK_N outputs and BLOCK_M tokens."""
    WIDTH: tl.constexpr = BLOCK_B * PER_BYTE
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, known = (rows < n)[:, None], (tokens < m)[:, None]
    wide = tl.minimum(rows, n - 1).to(tl.int64)
    codes_rows = codes + wide[:, None] * stride_codes + first_byte
    scale_rows = scales + wide * stride_scales + first_group
    x_rows = x + tokens.to(tl.int64)[:, None] * stride_x

    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # A scale is asked for one step before it is needed.
    following = tl.load(scale_rows)
    for start in range(0, width, BLOCK_B):
        scale = following.to(tl.float32)
        if GROUPS == 1:
            following = tl.load(scale_rows + tl.minimum(start + BLOCK_B, width - 1) // BLOCK_B)
        places = start + tl.arange(0, BLOCK_B)
        packed = tl.load(codes_rows + places[None, :], mask=(places < width)[None, :], other=0)
        columns = start * PER_BYTE + tl.arange(0, WIDTH)
        u = tl.load(x_rows + columns[None, :], mask=known & (columns < k)[None, :], other=0.0)
        if SMOOTH:
            s = tl.load(smooth + columns, mask=columns < k, other=1.0)
            u = rounded(u.to(tl.float32) * reciprocal_of_smooth(s)[None, :], OPERAND)
        if GROUPS > 1:
            for g in tl.static_range(GROUPS):
                own = tl.where((tl.arange(0, WIDTH) // (WIDTH // GROUPS) == g)[None, :], u, 0.0)
                term = _plus_products(tl.zeros([BLOCK_N, BLOCK_M], tl.float32), packed, own, OPERAND, PER_BYTE, FLOATS)
                total += term * _scale(scale_rows, start // BLOCK_B * GROUPS + g, count)[:, None]
        elif GROUPS == 1:
            term = _plus_products(tl.zeros([BLOCK_N, BLOCK_M], tl.float32), packed, u, OPERAND, PER_BYTE, FLOATS)
            total += term * scale[:, None]
        else:
            total = _plus_products(total, packed, u, OPERAND, PER_BYTE, FLOATS)
    if GROUPS == 0:
        total *= following.to(tl.float32)[:, None]

    at = tokens.to(tl.int64)[None, :] * n + rows[:, None]
    stored = inside & (tokens < m)[None, :]
    if PARTIAL:
        total += tl.load(partial + at, mask=stored, other=0.0)
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        u = tl.load(up + wide[:, None] * stride_up + ranks[None, :], mask=(ranks < rank)[None, :], other=0.0)
        projected = tl.zeros([BLOCK_M, RANK], tl.float32)
        for part in tl.range(0, parts, num_stages=PART_STAGES):
            low_at = low + (part * m + tokens)[:, None] * rank + ranks[None, :]
            projected += tl.load(low_at, mask=known & (ranks < rank)[None, :], other=0.0)
        total = product(u, projected.to(u.dtype).T, total)
    if BIAS:
        total += tl.load(bias + wide).to(tl.float32)[:, None]
    tl.store(out + at, rounded(total, out.dtype.element_ty), mask=stored)
