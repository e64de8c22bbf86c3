"""Queries, keys and values as e4m3 codes under one scale each, and e4m3 results as 16-bit numbers.

The maths and the floor are in `bittern.ops.attention`. Two launches make the codes: the first keeps one maximum a
program and tensor, the second takes the maximum of those and writes the codes. It walks backwards, from what the first
read last, of which a part is still in the L2 cache. No program waits for another and nothing is added up, so that the
codes are the same in every run. Inputs have any strides but the last, which is 1; codes are contiguous [b, l, h, d].
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bittern.ops.triton.launch import Launches, Recorder, cdiv, contiguous_rows, multiprocessors, on_device_of
from bittern.ops.triton.numerics import E4M3_RECIPROCAL, TINY, eight_bits, larger_magnitude, reciprocal, rounded

BLOCK_L, BLOCK_H, WARPS = 4, 8, 4
BLOCK, BLOCK_WARPS = 4096, 8
PROGRAMS_A_PROCESSOR = 4
SLOT = 4
"""Numbers from one scalar to the next: each begins at a multiple of 16 bytes."""
_MOST = 256
_launches: dict[Hashable, Launches | None] = {}


def quantize(q: Tensor, k: Tensor, v: Tensor, codes: Sequence[Tensor], scalars: Tensor, softmax_scale: float) -> None:
    """Fills codes and scalars.

    Args:
        q: Queries [b, l, h, d], bf16 or float16.
        k: Keys.
        v: Values.
        codes: e4m3 of the shapes of q, k and v, contiguous.
        scalars: float32 [6 or more, SLOT]. The first of each row becomes, in this order: what multiplies codes of q, of
            k and of v; 1 / softmax_scale; softmax_scale; what results are multiplied by before they are rounded.
        softmax_scale: What multiplies weights before they are rounded, a power of two.
    """
    tensors = [q, k, v, *codes, scalars]
    signature = (softmax_scale, *[(t.shape, t.stride(), t.dtype, t.get_device()) for t in tensors])
    known = _launches.get(signature)
    if known is not None:
        with on_device_of(q):
            if known.repeat(tensors, q.device):
                return
    recorder = Recorder(tensors)
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    batch, tokens, heads, size = q.shape
    key_tokens = k.shape[1]
    programs = PROGRAMS_A_PROCESSOR * multiprocessors(q.device)
    (peaks,) = recorder.scratch(q.device, ((3, programs), torch.float32))
    sizes = (batch, tokens, key_tokens, heads, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shape = {"SIZE": size, "BLOCK_D": triton.next_power_of_2(size), "BLOCK_L": BLOCK_L, "BLOCK_H": BLOCK_H}
    recorder.launch(peaks_kernel, (programs,), (q, k, v, peaks), sizes, **shape, num_warps=WARPS)
    recorder.launch(
        codes_kernel,
        (batch * cdiv(max(tokens, key_tokens), BLOCK_L), 3),
        (q, k, v, *codes, peaks, scalars),
        (*sizes, programs),
        **shape,
        BLOCK_P=triton.next_power_of_2(programs),
        SOFTMAX_SCALE=softmax_scale,
        SLOT=SLOT,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    _remember(signature, recorder)


def dequantize(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Fills `out` with codes / scale.

    Args:
        codes: e4m3, contiguous.
        scale: float32, one number, a power of two.
        out: bf16 or float16, as `codes`.
    """
    tensors = [codes, scale, out]
    signature = (*[(t.shape, t.dtype, t.get_device()) for t in tensors],)
    known = _launches.get(signature)
    if known is not None:
        with on_device_of(out):
            if known.repeat(tensors, out.device):
                return
    recorder = Recorder(tensors)
    grid = (cdiv(codes.numel(), BLOCK),)
    recorder.launch(numbers_kernel, grid, (codes, scale, out), (codes.numel(),), BLOCK=BLOCK, num_warps=BLOCK_WARPS)
    _remember(signature, recorder)


def _remember(signature: Hashable, recorder: Recorder) -> None:
    if len(_launches) >= _MOST:
        # Inputs of ever new lengths must not fill the memory.
        _launches.clear()
    _launches[signature] = recorder.launches()


@triton.jit
def _rows(block, tokens, stride_b, stride_l, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr):
    """Offsets of BLOCK_L tokens of one image, which of them exist, and their places in a contiguous tensor's rows."""
    blocks = tl.cdiv(tokens, BLOCK_L)
    image = (block // blocks).to(tl.int64)
    token = (block % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = token < tokens
    # Beyond the last token it is repeated, which changes no maximum, and not stored.
    token = tl.minimum(token, tokens - 1).to(tl.int64)
    place = tl.arange(0, BLOCK_D)
    if BLOCK_D == SIZE:
        return image * stride_b + token[:, None] * stride_l + place[None, :], inside, image * tokens + token, place
    else:
        # Likewise for places beyond the head's last.
        place = tl.minimum(place, SIZE - 1)
        return image * stride_b + token[:, None] * stride_l + place[None, :], inside, image * tokens + token, place


@triton.jit
def _peak(
    x, batch, tokens, heads, stride_b, stride_l, stride_h, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The largest magnitude among this program's tokens."""
    peak = tl.zeros([BLOCK_L, BLOCK_H, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), batch * tl.cdiv(tokens, BLOCK_L), tl.num_programs(0)):
        rows, _, _, _ = _rows(block, tokens, stride_b, stride_l, SIZE, BLOCK_D, BLOCK_L)
        for start in range(0, heads, BLOCK_H):
            head = tl.minimum(start + tl.arange(0, BLOCK_H), heads - 1).to(tl.int64)[None, :, None]
            values = tl.load(x + rows[:, None, :] + head * stride_h)
            peak = larger_magnitude(peak, values.to(tl.float32))
    return _highest(peak.reshape(BLOCK_L * BLOCK_H * BLOCK_D))


@triton.jit
def _highest(magnitudes):
    # As integers, magnitudes have the same order, with NaN above infinity.
    return tl.max(magnitudes.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def peaks_kernel(
    q, k, v, peaks, batch, tokens, key_tokens, heads, stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """See the module; a fixed number of programs, which share out the tokens of each image."""
    at, programs = tl.program_id(0), tl.num_programs(0)
    peak = _peak(q, batch, tokens, heads, stride_qb, stride_ql, stride_qh, SIZE, BLOCK_D, BLOCK_L, BLOCK_H)
    tl.store(peaks + at, peak)
    peak = _peak(k, batch, key_tokens, heads, stride_kb, stride_kl, stride_kh, SIZE, BLOCK_D, BLOCK_L, BLOCK_H)
    tl.store(peaks + programs + at, peak)
    peak = _peak(v, batch, key_tokens, heads, stride_vb, stride_vl, stride_vh, SIZE, BLOCK_D, BLOCK_L, BLOCK_H)
    tl.store(peaks + 2 * programs + at, peak)


@triton.jit
def _scale(peaks, programs, BLOCK_P: tl.constexpr):
    """The least power of two under which the largest magnitude is at most 448; NaN and infinity stay."""
    at = tl.arange(0, BLOCK_P)
    # A vector of one: what follows takes tensors.
    peak = _highest(tl.load(peaks + at, mask=at < programs, other=0.0)) + tl.zeros([1], tl.float32)
    least = peak * E4M3_RECIPROCAL
    least = tl.where(least < TINY, TINY, least)
    power = ((least.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
    return tl.where(least == least, power, least)


@triton.jit
def _codes(
    x, codes, block, tokens, heads, scale, stride_b, stride_l, stride_h, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Codes of BLOCK_L tokens."""
    rows, inside, row, place = _rows(block, tokens, stride_b, stride_l, SIZE, BLOCK_D, BLOCK_L)
    to_rows = codes + row[:, None, None] * heads * SIZE + place[None, None, :]
    inverse = reciprocal(scale)[:, None, None]
    for start in range(0, heads, BLOCK_H):
        head = (start + tl.arange(0, BLOCK_H))[None, :, None]
        values = tl.load(x + rows[:, None, :] + tl.minimum(head, heads - 1).to(tl.int64) * stride_h).to(tl.float32)
        there = inside[:, None, None] & (head < heads)
        tl.store(to_rows + head * SIZE, eight_bits(values * inverse, True), mask=there)


@triton.jit
def codes_kernel(
    q, k, v, q_codes, k_codes, v_codes, peaks, scalars, batch, tokens, key_tokens, heads, stride_qb, stride_ql,
    stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, programs, SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    SOFTMAX_SCALE: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """See the module; one program for each BLOCK_L tokens of each image, of values, keys and queries."""
    which = 2 - tl.program_id(1)
    first = tl.program_id(0) == 0
    one = tl.arange(0, 1)
    scale = _scale(peaks + which * programs, programs, BLOCK_P)
    tl.store(scalars + which * SLOT + one, scale, mask=first)
    length = tokens if which == 0 else key_tokens
    blocks = batch * tl.cdiv(length, BLOCK_L)
    block = blocks - 1 - tl.program_id(0)
    if block >= 0:
        if which == 0:
            _codes(
                q, q_codes, block, tokens, heads, scale, stride_qb, stride_ql, stride_qh, SIZE, BLOCK_D, BLOCK_L,
                BLOCK_H,
            )  # fmt: skip
        elif which == 1:
            _codes(
                k, k_codes, block, key_tokens, heads, scale, stride_kb, stride_kl, stride_kh, SIZE, BLOCK_D, BLOCK_L,
                BLOCK_H,
            )  # fmt: skip
        else:
            _codes(
                v, v_codes, block, key_tokens, heads, scale, stride_vb, stride_vl, stride_vh, SIZE, BLOCK_D, BLOCK_L,
                BLOCK_H,
            )  # fmt: skip
            # Half the values' range: weights rounded upwards take a mean no further.
            tl.store(scalars + 5 * SLOT + one, reciprocal(scale) * 0.5, mask=first)
            constant = tl.zeros([1], tl.float32) + SOFTMAX_SCALE
            tl.store(scalars + 3 * SLOT + one, reciprocal(constant), mask=first)
            tl.store(scalars + 4 * SLOT + one, constant, mask=first)


@triton.jit
def numbers_kernel(codes, scale, out, count, BLOCK: tl.constexpr):
    """See the module; one program for each BLOCK codes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inverse = reciprocal(tl.load(scale + tl.arange(0, 1)))
    numbers = tl.load(codes + at, mask=at < count, other=0.0).to(tl.float32) * inverse
    tl.store(out + at, rounded(numbers, out.dtype.element_ty), mask=at < count)
