"""Activations to 4-bit codes with a scale for every 64 inputs, and what a shift adds to the bias.

The maths, for M tokens of K inputs, in groups g of 64 that start with the segment (the reference's a4):

    u = (x + h) · (1 / s)                      low = x · D^T, summed in float32
    signed (h = 0):  scale_g = max(amax_g |u| · (1 / 8.25), tiny), negative if the largest is positive,
                     codes = round(u · (1 / scale_g)) in -8..7
    unsigned:        scale_g = max(max_g u · (1 / 15), tiny),      codes = round(u · (1 / scale_g)) in 0..15
    bias - h · sum_k What[n, k] / s[k]

Codes are written a byte each, for int8 tensor cores, with zeros beyond K; scales as [groups, M], a group's side by
side. A scale needs no more than its group, and so x is read once. The correction of the bias reads the packed weight
once more, a twentieth of the layer's time; it is kept nowhere, as nothing beside the layer's tensors is.

Floor, at b bytes an input: M·K·(b + 1) bytes, as in 8 bits.
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
from bittern.ops import reference
from bittern.ops.triton.config import padded_rank
from bittern.ops.triton.launch import Launch, cdiv, contiguous_rows, launch
from bittern.ops.triton.numerics import ROUNDER, TINY, product, reciprocal, reciprocal_of_smooth
from bittern.ops.triton.unpack import load_weights
from bittern.scheme import ACTIVATION_GROUP

_GROUP = tl.constexpr(ACTIVATION_GROUP)
_SIGNED = tl.constexpr(reference.RECIPROCALS["int4"])
_UNSIGNED = tl.constexpr(reference.RECIPROCALS["uint4"])
_LEAST_SIGNED, _MOST_SIGNED = (tl.constexpr(float(code)) for code in reference.RANGES["int4"])
_MOST = tl.constexpr(float(reference.RANGES["uint4"][1]))
BLOCK_M, BLOCK_K = 16, 256
CORRECTED_N, CORRECTED_K = 4, 1024


def quantize_groups(
    x: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    low: Tensor | None,
    shift: float,
    accumulate: bool = False,
    launch: Launch = launch,
) -> None:
    """Fills codes, scales and low from x.

    Args:
        x: Inputs [M, K] in bf16 or float16, of any row stride.
        smooth: Divides them [K].
        down: First factor of the branch [R, K], of any row stride.
        codes: int8 [M, width >= K], width a multiple of 64; what lies beyond K becomes 0.
        scales: float32 [width / 64, M], contiguous.
        low: float32 [M, R].
        shift: Added to x, for unsigned codes; 0 for signed ones.
        accumulate: Whether to add to what `low` holds, for a later segment of K.
        launch: What launches.
    """
    m, k = x.shape
    rank, width = 0 if down is None else down.shape[0], codes.shape[1]
    x = contiguous_rows(x)
    launch(
        groups_kernel,
        (cdiv(m, BLOCK_M),),
        (x, smooth, down, codes, scales, low),
        (m, k, width, x.stride(0), 0 if down is None else down.stride(0), codes.stride(0), rank),
        SHIFT=float(shift),
        SMOOTH=smooth is not None,
        RANK=padded_rank(rank),
        ACCUMULATE=accumulate,
        BLOCK_M=BLOCK_M,
        BLOCK_K=columns_at_once(rank, 2 if down is None else down.element_size()),
        num_warps=4,
        enable_fp_fusion=False,
    )


def columns_at_once(rank: int, factor_bytes: int = 2) -> int:
    """Columns of a tile of x and D: fewer for a high rank, whose tile of D must fit the smallest shared memory.

    Args:
        rank: Of the branch.
        factor_bytes: Bytes of a number of D.
    """
    halvings = max(1, padded_rank(rank) * factor_bytes // 128).bit_length() - 1
    return BLOCK_K >> halvings


def correct_bias(
    codes: Tensor,
    scales: Tensor,
    smooth: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    weight: str,
    segment: Segment,
    shift: float,
    launch: Launch = launch,
) -> None:
    """Takes what a segment's shift adds to the outputs off the bias.

    Args:
        codes: Packed codes [N, bytes], rows of any stride.
        scales: Weight scales [N, groups], rows of any stride.
        smooth: Divides the segment's inputs [K].
        bias: [N]; it may be `out`.
        out: float32 [N].
        weight: "int4" or "ternary".
        segment: Where the segment lies in codes and scales.
        shift: What is added to the inputs.
        launch: What launches.
    """
    n, per_byte = codes.shape[0], formats.get(weight).codes_per_byte
    grouped = segment.groups.stop - segment.groups.start > 1
    k = segment.unpadded.stop - segment.unpadded.start
    launch(
        correction_kernel,
        (cdiv(n, CORRECTED_N),),
        (codes, scales, smooth, bias, out),
        (
            n,
            k,
            cdiv(k, per_byte),
            segment.padded.start // per_byte,
            segment.groups.start,
            codes.stride(0),
            scales.stride(0),
        ),
        SHIFT=float(shift),
        PER_BYTE=per_byte,
        GROUP=segment.size if grouped else 0,
        SMOOTH=smooth is not None,
        BIAS=bias is not None,
        BLOCK_N=CORRECTED_N,
        BLOCK_K=CORRECTED_K,
        num_warps=4,
        enable_fp_fusion=False,
    )


@triton.jit
def groups_kernel(
    x,
    smooth,
    down,
    codes,
    scales,
    low,
    m,
    k,
    width,
    stride_x,
    stride_down,
    stride_codes,
    rank,
    SHIFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    RANK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """See the module; one program for each BLOCK_M tokens."""
    GROUPS: tl.constexpr = BLOCK_K // _GROUP
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows < m)[:, None]
    # M · K can pass 2^31; rows beyond the last repeat it and are not stored.
    wide = tl.minimum(rows, m - 1).to(tl.int64)
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        low_at = low + wide[:, None] * rank + ranks[None, :]
        low_inside = inside & (ranks < rank)[None, :]
        projected = tl.load(low_at, mask=low_inside, other=0.0) if ACCUMULATE else tl.zeros([BLOCK_M, RANK], tl.float32)

    for start in range(0, width, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        known = columns < k
        raw = tl.load(x + wide[:, None] * stride_x + columns[None, :], mask=known[None, :], other=0.0)
        if RANK > 0:
            d_inside = (ranks < rank)[:, None] & known[None, :]
            d = tl.load(down + ranks[:, None] * stride_down + columns[None, :], mask=d_inside, other=0.0)
            projected = product(raw, d.T, projected)
        u = raw.to(tl.float32)
        if SHIFT != 0:
            u = tl.where(known[None, :], u + SHIFT, 0.0)
        if SMOOTH:
            u *= reciprocal_of_smooth(tl.load(smooth + columns, mask=known, other=1.0))[None, :]
        grouped = u.reshape(BLOCK_M, GROUPS, _GROUP)
        magnitudes = tl.abs(grouped)
        if SHIFT != 0:
            # Minus infinity must not become code 0: it counts as the other one.
            magnitudes = tl.where((grouped <= 0.0) & (magnitudes < float("inf")), 0.0, magnitudes)
        # As integers, magnitudes have the same order, with NaN above infinity.
        peak = tl.max(magnitudes.to(tl.int32, bitcast=True), axis=2).to(tl.float32, bitcast=True)
        scale = peak * (_UNSIGNED if SHIFT != 0 else _SIGNED)
        scale = tl.where(scale < TINY, TINY, scale)
        if SHIFT == 0:
            # Without NaN, which has a scale that shows it whatever its sign.
            scale = tl.where(tl.max(grouped, axis=2) > -tl.min(grouped, axis=2), -scale, scale)
        values = grouped * reciprocal(scale)[:, :, None]
        if SHIFT != 0:
            values = tl.where(values < 0.0, 0.0, tl.where(values > _MOST, _MOST, values))
        else:
            values = tl.where(values < _LEAST_SIGNED, _LEAST_SIGNED, values)
            values = tl.where(values > _MOST_SIGNED, _MOST_SIGNED, values)
        rounded = (values + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
        at = codes + wide[:, None] * stride_codes + columns[None, :]
        tl.store(at, rounded.reshape(BLOCK_M, BLOCK_K), mask=inside & (columns < width)[None, :])
        groups = start // _GROUP + tl.arange(0, GROUPS)
        at = scales + groups[None, :].to(tl.int64) * m + rows[:, None]
        tl.store(at, scale, mask=inside & (groups * _GROUP < width)[None, :])
    if RANK > 0:
        tl.store(low_at, projected, mask=low_inside)


@triton.jit
def correction_kernel(
    codes,
    scales,
    smooth,
    bias,
    out,
    n,
    k,
    packed_width,
    first_byte,
    first_group,
    stride_codes,
    stride_scales,
    SHIFT: tl.constexpr,
    PER_BYTE: tl.constexpr,
    GROUP: tl.constexpr,
    SMOOTH: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """See the module; one program for each BLOCK_N outputs."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < n)[:, None]
    wide = rows.to(tl.int64)
    codes_rows = codes + wide[:, None] * stride_codes + first_byte
    scale_rows = scales + wide[:, None] * stride_scales + first_group
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        w = load_weights(
            codes_rows,
            scale_rows,
            1.0,
            start,
            k,
            packed_width,
            inside,
            PER_BYTE,
            False,
            GROUP,
            BLOCK_N,
            BLOCK_K,
            EVEN=False,
        )
        if SMOOTH:
            columns = start + tl.arange(0, BLOCK_K)
            w *= reciprocal_of_smooth(tl.load(smooth + columns, mask=columns < k, other=1.0))[None, :]
        total += tl.sum(w, axis=1)
    if GROUP == 0:
        total *= tl.load(scales + wide * stride_scales + first_group, mask=rows < n, other=0.0).to(tl.float32)
    total *= -SHIFT
    if BIAS:
        total += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
    tl.store(out + rows, total, mask=rows < n)
