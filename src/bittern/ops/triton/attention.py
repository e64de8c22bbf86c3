"""Queries, keys and values as e4m3 codes under one scale each, and e4m3 results as 16-bit numbers.

The maths and the floor are in `bittern.ops.attention`. Two launches make the codes, each with a program for a chunk of
one head's tokens. The first keeps a bound of each chunk, and of keys their sum; the second takes the largest bound, the
mean of keys from the sums, and writes the codes. It walks backwards, from what the first read last, of which a part is
still in the L2 cache. A Hadamard matrix is a product on tensor cores, with signs that a program works out from indices.
No program waits for another and every sum has one order, so that the codes are the same in every run. Inputs have any
strides but the last, which is 1; codes are contiguous [b, l, h, d].
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bittern.ops import attention
from bittern.ops.triton.launch import Recorder, Remembered, cdiv, contiguous_rows
from bittern.ops.triton.numerics import (
    E4M3_RECIPROCAL,
    eight_bits,
    larger_magnitude,
    largest_of,
    product,
    reciprocal,
    rounded,
)

LEAST_SCALE = tl.constexpr(attention.LEAST_SCALE)

BLOCK_L, WARPS = 64, 4
LEAST_CHUNK, MOST_CHUNKS = 256, 32
BLOCK, BLOCK_WARPS = 4096, 8
BOUNDS_AT_ONCE = 1024
SLOT = 4
"""Numbers from one scalar to the next: each begins at a multiple of 16 bytes."""
_launches = Remembered()


def quantize(q: Tensor, k: Tensor, v: Tensor, codes: Sequence[Tensor], scalars: Tensor, softmax_scale: float) -> None:
    """Fills codes and scalars.

    Args:
        q: Queries [b, l, h, d], bf16 or float16; d at least 16.
        k: Keys.
        v: Values.
        codes: e4m3 of the shapes of q, k and v, contiguous.
        scalars: float32 [6 or more, SLOT]. The first of each row becomes, in this order: what multiplies codes of q, of
            k and of v; 1 / softmax_scale; softmax_scale; what results are multiplied by before they are rounded.
        softmax_scale: What multiplies weights before they are rounded, a power of two.
    """
    tensors = [q, k, v, *codes, scalars]
    signature = (softmax_scale, *[(t.shape, t.stride(), t.dtype, t.get_device()) for t in tensors])
    if _launches.repeat(signature, tensors, q):
        return
    recorder = Recorder(tensors)
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    batch, tokens, heads, size = q.shape
    key_tokens = k.shape[1]
    chunk, key_chunk = _chunk(tokens), _chunk(key_tokens)
    grid = (max(cdiv(tokens, chunk), cdiv(key_tokens, key_chunk)), batch * heads, 3)
    block_d = triton.next_power_of_2(size)
    bounds, sums = recorder.scratch(
        q.device,
        ((3, batch * heads * MOST_CHUNKS), torch.float32),
        ((batch * heads, MOST_CHUNKS, block_d), torch.float32),
    )
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = (tokens, key_tokens, heads, chunk, key_chunk, *strides)
    shape = {"SIZE": size, "BLOCK_D": block_d, "BLOCK_L": BLOCK_L, "MOST_CHUNKS": MOST_CHUNKS}
    recorder.launch(
        bounds_kernel, grid, (q, k, v, bounds, sums), sizes, **shape, num_warps=WARPS, enable_fp_fusion=False
    )
    recorder.launch(
        codes_kernel,
        grid,
        (q, k, v, *codes, bounds, sums, scalars),
        sizes,
        **shape,
        N=size & -size,
        ROOT=float(size & -size) ** 0.5,
        BOUNDS_AT_ONCE=BOUNDS_AT_ONCE,
        SOFTMAX_SCALE=softmax_scale,
        SLOT=SLOT,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    _launches.keep(signature, recorder)


def _chunk(tokens: int) -> int:
    """Tokens of a program: at most MOST_CHUNKS of them make a head."""
    return max(LEAST_CHUNK, cdiv(cdiv(tokens, MOST_CHUNKS), BLOCK_L) * BLOCK_L)


def dequantize(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Fills `out` with codes / scale.

    Args:
        codes: e4m3, contiguous.
        scale: float32, one number, a power of two.
        out: bf16 or float16, as `codes`.
    """
    tensors = [codes, scale, out]
    signature = (*[(t.shape, t.dtype, t.get_device()) for t in tensors],)
    if _launches.repeat(signature, tensors, out):
        return
    recorder = Recorder(tensors)
    grid = (cdiv(codes.numel(), BLOCK),)
    recorder.launch(numbers_kernel, grid, (codes, scale, out), (codes.numel(),), BLOCK=BLOCK, num_warps=BLOCK_WARPS)
    _launches.keep(signature, recorder)


@triton.jit
def _tile(x, start, tokens, stride_l, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr):
    """BLOCK_L tokens of one head; 0 beyond the last token and the head's last place."""
    token = start + tl.arange(0, BLOCK_L)
    place = tl.arange(0, BLOCK_D)
    mask = (token < tokens)[:, None] & (place < SIZE)[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * stride_l + place[None, :], mask=mask, other=0.0)


@triton.jit
def bounds_kernel(
    q, k, v, bounds, sums, tokens, key_tokens, heads, chunk, key_chunk, stride_qb, stride_ql, stride_qh, stride_kb,
    stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, MOST_CHUNKS: tl.constexpr,
):  # fmt: skip
    """See the module: the largest square of a token's norm, of values the largest magnitude, and sums of keys."""
    at, pair, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    image, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    peak = tl.zeros([BLOCK_L], tl.float32)
    length = tokens if which == 0 else key_tokens
    size = chunk if which == 0 else key_chunk
    if at * size < length:
        last = tl.minimum((at + 1) * size, length)
        if which == 0:
            for start in range(at * size, last, BLOCK_L):
                x = _tile(q + image * stride_qb + head * stride_qh, start, length, stride_ql, SIZE, BLOCK_D, BLOCK_L)
                wide = x.to(tl.float32)
                peak = larger_magnitude(peak, tl.sum(wide * wide, axis=1))
        elif which == 1:
            total = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
            for start in range(at * size, last, BLOCK_L):
                x = _tile(k + image * stride_kb + head * stride_kh, start, length, stride_kl, SIZE, BLOCK_D, BLOCK_L)
                wide = x.to(tl.float32)
                total += wide
                peak = larger_magnitude(peak, tl.sum(wide * wide, axis=1))
            to = sums + (pair.to(tl.int64) * MOST_CHUNKS + at) * BLOCK_D + tl.arange(0, BLOCK_D)
            tl.store(to, tl.sum(total, axis=0))
        else:
            # The loop keeps a magnitude for every place, since a maximum of integers is exact in any order.
            highest = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
            for start in range(at * size, last, BLOCK_L):
                x = _tile(v + image * stride_vb + head * stride_vh, start, length, stride_vl, SIZE, BLOCK_D, BLOCK_L)
                highest = larger_magnitude(highest, x.to(tl.float32))
            peak = largest_of(highest)
    tl.store(bounds + (which * tl.num_programs(1) + pair) * MOST_CHUNKS + at, largest_of(peak, 0))


@triton.jit
def _power(bound):
    """The least power of two under which a bound is at most 448; NaN and infinity stay."""
    least = bound * E4M3_RECIPROCAL
    least = tl.where(least < LEAST_SCALE, LEAST_SCALE, least)
    power = ((least.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
    return tl.where(least == least, power, least)


@triton.jit
def _signs(DTYPE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A Hadamard matrix of N x N, as often as it fits on the diagonal: (-1)^(number of ones in i & j)."""
    i = tl.arange(0, BLOCK_D)[:, None]
    j = tl.arange(0, BLOCK_D)[None, :]
    common = i & j & (N - 1)
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return tl.where(i // N == j // N, 1.0 - 2.0 * (common & 1).to(tl.float32), 0.0).to(DTYPE)


@triton.jit
def _store(codes, numbers, start, tokens, heads, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr):
    token = start + tl.arange(0, BLOCK_L)
    place = tl.arange(0, BLOCK_D)
    mask = (token < tokens)[:, None] & (place < SIZE)[None, :]
    tl.store(
        codes + token.to(tl.int64)[:, None] * (heads * SIZE) + place[None, :], eight_bits(numbers, True), mask=mask
    )


@triton.jit
def codes_kernel(
    q, k, v, q_codes, k_codes, v_codes, bounds, sums, scalars, tokens, key_tokens, heads, chunk, key_chunk, stride_qb,
    stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, MOST_CHUNKS: tl.constexpr, N: tl.constexpr, ROOT: tl.constexpr,
    BOUNDS_AT_ONCE: tl.constexpr, SOFTMAX_SCALE: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """See the module: codes of a chunk of values, keys or queries; the first programs leave the scalars."""
    chunks, pairs = tl.num_programs(0), tl.num_programs(1)
    at, pair, which = chunks - 1 - tl.program_id(0), pairs - 1 - tl.program_id(1), 2 - tl.program_id(2)
    image, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    length = tokens if which == 0 else key_tokens
    size = chunk if which == 0 else key_chunk
    peak = tl.zeros([BOUNDS_AT_ONCE], tl.float32)
    for start in range(0, pairs * MOST_CHUNKS, BOUNDS_AT_ONCE):
        place = start + tl.arange(0, BOUNDS_AT_ONCE)
        # Of the chunks that there are programs for.
        mask = (place < pairs * MOST_CHUNKS) & (place % MOST_CHUNKS < chunks)
        peak = larger_magnitude(peak, tl.load(bounds + which * pairs * MOST_CHUNKS + place, mask=mask, other=0.0))
    # A vector of one: what follows takes tensors.
    bound = largest_of(peak, 0) + tl.zeros([1], tl.float32)
    if which != 2:
        # Of keys less their mean twice as much.
        bound = tl.sqrt_rn(bound) * (ROOT if which == 0 else 2.0 * ROOT)
    scale = _power(bound)
    inverse = reciprocal(scale)[:, None]
    one = tl.arange(0, 1)
    if (at == 0) & (pair == 0):
        tl.store(scalars + which * SLOT + one, scale * (1.0 / N) if which == 0 else scale)
        if which == 2:
            # Half the values' range: weights rounded upwards take a mean no further.
            tl.store(scalars + 5 * SLOT + one, reciprocal(scale) * 0.5)
            constant = tl.zeros([1], tl.float32) + SOFTMAX_SCALE
            tl.store(scalars + 3 * SLOT + one, reciprocal(constant))
            tl.store(scalars + 4 * SLOT + one, constant)
    if at * size < length:
        last = tl.minimum((at + 1) * size, length)
        to = (image * length * heads + head) * SIZE
        zeros = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        if which == 0:
            signs = _signs(q.dtype.element_ty, N, BLOCK_D)
            for start in range(at * size, last, BLOCK_L):
                x = _tile(q + image * stride_qb + head * stride_qh, start, length, stride_ql, SIZE, BLOCK_D, BLOCK_L)
                mixed = product(x, signs, zeros) * inverse
                _store(q_codes + to, mixed, start, length, heads, SIZE, BLOCK_D, BLOCK_L)
        elif which == 1:
            signs = _signs(k.dtype.element_ty, N, BLOCK_D)
            part = tl.arange(0, MOST_CHUNKS)[:, None]
            given = sums + (pair.to(tl.int64) * MOST_CHUNKS + part) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            there = part * size < length
            mean = tl.div_rn(tl.sum(tl.load(given, mask=there, other=0.0), axis=0), length.to(tl.float32))
            for start in range(at * size, last, BLOCK_L):
                x = _tile(k + image * stride_kb + head * stride_kh, start, length, stride_kl, SIZE, BLOCK_D, BLOCK_L)
                apart = rounded(x.to(tl.float32) - mean[None, :], x.dtype)
                _store(
                    k_codes + to, product(apart, signs, zeros) * inverse, start, length, heads, SIZE, BLOCK_D, BLOCK_L
                )  # fmt: skip
        else:
            for start in range(at * size, last, BLOCK_L):
                x = _tile(v + image * stride_vb + head * stride_vh, start, length, stride_vl, SIZE, BLOCK_D, BLOCK_L)
                _store(v_codes + to, x.to(tl.float32) * inverse, start, length, heads, SIZE, BLOCK_D, BLOCK_L)


@triton.jit
def numbers_kernel(codes, scale, out, count, BLOCK: tl.constexpr):
    """See the module; one program for each BLOCK codes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inverse = reciprocal(tl.load(scale + tl.arange(0, 1)))
    numbers = tl.load(codes + at, mask=at < count, other=0.0).to(tl.float32) * inverse
    tl.store(out + at, rounded(numbers, out.dtype.element_ty), mask=at < count)
