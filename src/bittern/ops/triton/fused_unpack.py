"""A GEMM that unpacks its weights in the loop: too many tokens for `skinny`, too few to write unpacked weights for.

The maths is that of `skinny`, but for the sums of 16 bits in groups, whose weights are scaled before the product:

    16 bits   y[m, n] = sum_k w[n, k] · x[m, k]  +  (low · U^T)[m, n]  +  bias[n]      w = round16(codes · scales)
    8 bits    y[m, n] = (sum_k q[n, k] · x[m, k]) · c[n] · row_scales[m]  +  ...       q = round8(codes · (scales / c))

Weights of one scale a row are their codes in both, and their scale comes after the sum. q are `unpack`'s to the bit.

Layout: a program owns BLOCK_N rows of packed bytes and BLOCK_M tokens, and walks K, or a part of it where a layer has
too few tiles for all multiprocessors; `combine` adds the parts then, and the branch, for which further programs of the
launch project x. A tile of bytes becomes numbers of 16 bits in registers, four or eight at a time (1.4 operations a
weight), is scaled, rounded and put into shared memory, from where matrix units take it. Two programs a multiprocessor
take turns at the two. Weights may be the left operand of the product, whose rows are 64 at the least, so that a tile
may have 16 tokens.

Floor: N·K·b/8 bytes and 2·M·N·K operations: 12288 x 3072 int4 with 128 tokens 20.1 MB or 6.7 us, and 9.7 GFLOP,
9.8 us in bf16 and 4.9 in 8 bits. Beside them 4.5 operations a weight in bf16 and 6.7 in 8 bits on the general ALUs:
5.7 us and 8.5. Each tile reads all of its tokens' inputs from the L2 cache: 192 tiles with 256 tokens in 8 bits
151 MB, some 27 us, which is why more tokens are better served by `unpack` and `gemm`.
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
from bittern.ops.triton.config import FusedUnpackConfig
from bittern.ops.triton.gemm import DTYPES
from bittern.ops.triton.launch import Launch, Operand, Tiled, cdiv, contiguous_rows, describable, launch
from bittern.ops.triton.numbers_of_16_bits import crumbs, nibbles
from bittern.ops.triton.numerics import INTERPRETED, eight_bits, product, reciprocal, rounded
from bittern.ops.triton.projection import BLOCK_R, part_of, parts_of, project_part, tokens_at_once
from bittern.ops.triton.skinny import PROJECTION_K, PROJECTION_STAGES, row_scale


def fused_unpack_segment(
    x: Tensor,
    row_scales: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    weight: str,
    segment: Segment,
    bias: Tensor | None,
    out: Tensor,
    config: FusedUnpackConfig,
    raw: Tensor | None = None,
    down: Tensor | None = None,
    low: Tensor | None = None,
    launch: Launch = launch,
) -> None:
    """One K-segment's product, whole or in parts. Arguments as of `skinny_segment`."""
    (m, k), n, fmt = x.shape, codes.shape[0], formats.get(weight)
    x, raw = contiguous_rows(x), None if raw is None else contiguous_rows(raw)
    per_byte = fmt.codes_per_byte
    count = segment.groups.stop - segment.groups.start
    rank = 0 if down is None else down.shape[0]
    parts = out.shape[0] if out.ndim == 3 else 1
    blocks_m, blocks_n = cdiv(m, config.block_m), cdiv(n, config.block_n)
    projected = 0 if down is None else tokens_at_once(down.element_size())
    projecting = parts_of(k) * cdiv(m, projected) * cdiv(rank, BLOCK_R) if rank else 0
    descriptors = config.descriptors and describable(x)
    inputs: Operand = Tiled(x, [config.block_m, config.block_k]) if descriptors else x
    launch(
        fused_unpack_kernel,
        (blocks_n * blocks_m * parts + projecting,),
        (inputs, row_scales, codes, scales, bias, out, raw, down, low),
        (
            m,
            n,
            k,
            cdiv(k, per_byte),
            count,
            segment.padded.start // per_byte,
            segment.groups.start,
            cdiv(cdiv(k, config.block_k), parts) * config.block_k,
            x.stride(0),
            codes.stride(0),
            scales.stride(0),
            rank,
            0 if raw is None else raw.stride(0),
            0 if down is None else down.stride(0),
            parts,
        ),
        PER_BYTE=per_byte,
        FLOATS=weight == "nvfp4",
        LARGEST=fmt.largest,
        GROUP=segment.size if count > 1 else 0,
        EIGHT=row_scales is not None,
        OPERAND=_TYPES[x.dtype],
        EVEN=k % config.block_k == 0,
        DESCRIPTORS=descriptors,
        WEIGHTS_LEFT=config.weights_left,
        PART=part_of(k) if rank else 0,
        BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        PROJECTED=projected,
        PROJECTION_K=PROJECTION_K,
        PROJECTION_STAGES=PROJECTION_STAGES,
        BLOCK_R=BLOCK_R,
        num_warps=config.warps,
        # Codes are rounded after a product, as the reference rounds them.
        enable_fp_fusion=False,
    )


_TYPES = {**DTYPES, torch.int8: tl.int8, torch.float8_e4m3fn: tl.float8e4nv}


@triton.jit
def _numbers(packed, TYPE: tl.constexpr, PER_BYTE: tl.constexpr, FLOATS: tl.constexpr):
    """Bytes [n, b] as codes [n, b · PER_BYTE] of 16 bits."""
    if PER_BYTE == 2:
        even, odd = nibbles(packed, TYPE, FLOATS)
        w = tl.join(even, odd)
    else:
        w0, w1, w2, w3 = crumbs(packed, TYPE)
        w = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return w.reshape(packed.shape[0], packed.shape[1] * PER_BYTE)


@triton.jit
def _weights(
    packed, scale_rows, inverse, start, count, TYPE: tl.constexpr, PER_BYTE: tl.constexpr, FLOATS: tl.constexpr,
    GROUP: tl.constexpr, EIGHT: tl.constexpr, FP8: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of bytes as an operand of the product."""
    w = _numbers(packed, TYPE, PER_BYTE, FLOATS)
    if GROUP > 0:
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        groups = start // GROUP + tl.arange(0, GROUPS)
        if EVEN:
            scale = tl.load(scale_rows[:, None] + groups[None, :])
        else:
            scale = tl.load(scale_rows[:, None] + groups[None, :], mask=(groups < count)[None, :], other=0.0)
        w = w.reshape(w.shape[0], GROUPS, GROUP)
        if EIGHT:
            w = w.to(tl.float32) * (scale.to(tl.float32) * inverse[:, None])[:, :, None]
        elif scale.dtype == TYPE and not INTERPRETED:
            w = w * scale[:, :, None]
        else:
            w = rounded(w.to(tl.float32) * scale.to(tl.float32)[:, :, None], TYPE)
        w = w.reshape(packed.shape[0], BLOCK_K)
    if EIGHT:
        return eight_bits(w.to(tl.float32), FP8)
    else:
        return w


@triton.jit
def _plus_product(total, left, right, EIGHT: tl.constexpr, INTEGERS: tl.constexpr):
    """The sum total + left · right^T."""
    if INTEGERS:
        return tl.dot(left, right.T, total, out_dtype=tl.int32)
    elif EIGHT:
        return tl.dot(left, right.T, total)
    else:
        return product(left, right.T, total)


@triton.jit
def fused_unpack_kernel(
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
    part_k,
    stride_x,
    stride_codes,
    stride_scales,
    rank,
    stride_raw,
    stride_down,
    parts,
    PER_BYTE: tl.constexpr,
    FLOATS: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
    EIGHT: tl.constexpr,
    OPERAND: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PROJECTED: tl.constexpr,
    PROJECTION_K: tl.constexpr,
    PROJECTION_STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """See the module; one program for each BLOCK_N outputs, BLOCK_M tokens and part, and some that project.

    `x` is a tensor descriptor or a pointer.
    """
    multiplying = tl.cdiv(n, BLOCK_N) * tl.cdiv(m, BLOCK_M) * parts
    if PART == 0 or tl.program_id(0) < multiplying:
        _multiply(
            x, row_scales, codes, scales, bias, out, m, n, k, width, count, first_byte, first_group, part_k, stride_x,
            stride_codes, stride_scales, PER_BYTE, FLOATS, LARGEST, GROUP, EIGHT, OPERAND, EVEN, DESCRIPTORS,
            WEIGHTS_LEFT, BIAS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        program, blocks_m, blocks_r = tl.program_id(0) - multiplying, tl.cdiv(m, PROJECTED), tl.cdiv(rank, BLOCK_R)
        project_part(
            raw, down, low, m, k, rank, stride_raw, stride_down, program // (blocks_m * blocks_r),
            program % blocks_m * PROJECTED, program // blocks_m % blocks_r * BLOCK_R, PART, PROJECTED, BLOCK_R,
            PROJECTION_K, PROJECTION_STAGES,
        )  # fmt: skip


@triton.jit
def _multiply(
    x, row_scales, codes, scales, bias, out, m, n, k, width, count, first_byte, first_group, part_k, stride_x,
    stride_codes, stride_scales, PER_BYTE: tl.constexpr, FLOATS: tl.constexpr, LARGEST: tl.constexpr,
    GROUP: tl.constexpr, EIGHT: tl.constexpr, OPERAND: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of the product of BLOCK_N outputs and BLOCK_M tokens."""
    FP8: tl.constexpr = OPERAND == tl.float8e4nv
    INTEGERS: tl.constexpr = OPERAND == tl.int8
    # What codes are before they are scaled.
    TYPE: tl.constexpr = tl.constexpr(tl.bfloat16) if EIGHT else OPERAND
    blocks_m, blocks_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    row_start = tl.program_id(0) % blocks_m * BLOCK_M
    tokens = row_start + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) // blocks_m % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(0) // (blocks_m * blocks_n)
    known = tokens < m
    wide = tl.minimum(rows, n - 1).to(tl.int64)
    codes_rows = codes + wide[:, None] * stride_codes + first_byte
    scale_rows = scales + wide * stride_scales + first_group

    column_scale = tl.full([BLOCK_N], 1.0, tl.float32)
    inverse = column_scale
    if GROUP == 0:
        column_scale = tl.load(scale_rows).to(tl.float32)
    elif EIGHT:
        column_scale = row_scale(scale_rows, count, rows, LARGEST, FP8)
        inverse = reciprocal(column_scale)

    LEFT: tl.constexpr = BLOCK_N if WEIGHTS_LEFT else BLOCK_M
    RIGHT: tl.constexpr = BLOCK_M if WEIGHTS_LEFT else BLOCK_N
    total = tl.zeros([LEFT, RIGHT], tl.int32 if INTEGERS else tl.float32)
    first = part * part_k
    for start in tl.range(first, tl.minimum(first + part_k, k), BLOCK_K, num_stages=STAGES):
        places = start // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
        if EVEN:
            packed = tl.load(codes_rows + places[None, :])
        else:
            packed = tl.load(codes_rows + places[None, :], mask=(places < width)[None, :], other=0)
        if DESCRIPTORS:
            u = x.load([row_start, start])
        else:
            columns = start + tl.arange(0, BLOCK_K)
            x_rows = x + tokens.to(tl.int64)[:, None] * stride_x
            u = tl.load(x_rows + columns[None, :], mask=known[:, None] & (columns < k)[None, :], other=0.0)
        w = _weights(
            packed, scale_rows, inverse, start, count, TYPE, PER_BYTE, FLOATS, GROUP, EIGHT, FP8, BLOCK_K, EVEN
        )
        if WEIGHTS_LEFT:
            total = _plus_product(total, w, u, EIGHT, INTEGERS)
        else:
            total = _plus_product(total, u, w, EIGHT, INTEGERS)
    y = total.to(tl.float32)
    if WEIGHTS_LEFT:
        y = y.T
    y *= column_scale[None, :]
    if EIGHT:
        y *= tl.load(row_scales + tokens, mask=known, other=0.0)[:, None]
    if BIAS:
        y += tl.load(bias + wide).to(tl.float32)[None, :]
    at = (part * m + tokens).to(tl.int64)[:, None] * n + rows[None, :]
    tl.store(out + at, rounded(y, out.dtype.element_ty), mask=known[:, None] & (rows < n)[None, :])
