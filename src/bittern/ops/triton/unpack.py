"""Packed weights to an 8-bit operand with one scale a row, for the GEMM.

The maths, for one row and K-segment (the reference's folding):

    c = max(amax |scales| · largest, tiny) · (1 / limit)          largest: |code|, 8, 12 or 1
    q_k = round(codes_k · (scales_group · (1 / c)))               for one group a row: q = codes, c = scales

Layout: packed bytes [N, bytes], two codes a byte (int4, two's complement nibbles, and nvfp4, floats of 4 bits that
count halves; even k low) or four (ternary, code + 1, k ascending from the low bits); scales [N, groups]. The result
has rows of codes [N, width]: each segment starts at a multiple of 128 and is filled with 0, as its activations are,
and c is [segments, N].
A program owns BLOCK_N rows: it reads their scales, which say c, and walks their codes once. So c costs a second
look at the scales, and nothing has to be kept for it beside the layer's tensors. What the codes of a segment are
not (padding) is taken for 0.

On the way the programs write 1 / s for the prologue, which comes after: there every program would work all of them out,
twice, and that took a fourth of its time.

Floor, for b bits a weight and group G: N·K·(b/8 + 1 + 2/G) bytes; int4 g64 3072 x 3072 14.5 MB or 4.8 us at
3 TB/s, 21504 x 3072 101 MB or 33.7 us. About 6 operations a weight on the general ALUs, 2 us and 14 us, which
overlap with the bytes as far as occupancy allows.
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
from bittern.ops.triton.config import UnpackConfig
from bittern.ops.triton.launch import Launch, cdiv, launch
from bittern.ops.triton.numerics import eight_bits, larger_magnitude, reciprocal, reciprocal_of_smooth, scale_of

COLUMNS = tl.constexpr(128)
"""Inputs whose 1 / s a program works out at a time."""


def unpack_segment(
    codes: Tensor,
    scales: Tensor,
    weight: str,
    segment: Segment,
    out: Tensor,
    column_scales: Tensor,
    config: UnpackConfig,
    fold: bool = True,
    smooth: Tensor | None = None,
    reciprocals: Tensor | None = None,
    launch: Launch = launch,
) -> None:
    """Folds one K-segment of a weight to 8 bits.

    Args:
        codes: Packed codes [N, bytes], rows of any stride.
        scales: Weight scales [N, groups], rows of any stride.
        weight: "int4", "nvfp4" or "ternary".
        segment: Where the segment lies in both.
        out: int8 or e4m3 [N, width]; what lies beyond the segment's inputs becomes 0.
        column_scales: float32 [N]; without folding, of the first group only.
        config: Tile and launch.
        fold: Whether to apply the groups' scales; otherwise codes stay as they are.
        smooth: What divides the segment's inputs [K].
        reciprocals: float32 [K]; takes 1 / smooth.
        launch: What launches.
    """
    fmt = formats.get(weight)
    n, per_byte = codes.shape[0], fmt.codes_per_byte
    groups = segment.groups.stop - segment.groups.start
    grouped = fold and groups > 1
    block_k = max(config.block_k, segment.size) if grouped else config.block_k
    k = segment.unpadded.stop - segment.unpadded.start
    launch(
        unpack_kernel,
        (cdiv(n, config.block_n),),
        (codes, scales, out, column_scales, smooth, reciprocals),
        (
            n,
            k,
            cdiv(k, per_byte),
            out.shape[1],
            segment.padded.start // per_byte,
            segment.groups.start,
            codes.stride(0),
            scales.stride(0),
            out.stride(0),
        ),
        PER_BYTE=per_byte,
        FLOATS=weight == "nvfp4",
        GROUP=segment.size if grouped else 0,
        FP8=out.dtype == torch.float8_e4m3fn,
        EVEN=k % block_k == 0 and out.shape[1] == k,
        LARGEST=fmt.largest,
        GROUPS=min(256, triton.next_power_of_2(groups)),
        SMOOTH=smooth is not None,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        STAGES=config.stages,
        num_warps=config.warps,
        enable_fp_fusion=False,
    )


@triton.jit
def numbers(packed, PER_BYTE: tl.constexpr, FLOATS: tl.constexpr):
    """Bytes [n, b] as codes [n, b · PER_BYTE] in float32.

    A code, made positive, goes straight into the significand of 2^23, which is then subtracted: two operations
    instead of a sign extension and a conversion. The bits of a 4-bit float go to the lowest of the exponent and the
    highest of the significand, where they stand for the code times 2^-127, subnormal numbers included.
    """
    wide = packed.to(tl.int32)
    if FLOATS:
        fields = tl.join((wide & 7) << 22 | (wide & 8) << 28, (wide & 0x70) << 18 | (wide & 0x80) << 24)
    elif PER_BYTE == 2:
        fields = tl.join((wide & 15) ^ 0x4B000008, (wide >> 4) ^ 0x4B000008)
        offset = 8388616.0
    else:
        even = tl.join(wide & 3 | 0x4B000000, (wide >> 4) & 3 | 0x4B000000)
        odd = tl.join((wide >> 2) & 3 | 0x4B000000, wide >> 6 | 0x4B000000)
        fields = tl.join(even, odd)
        offset = 8388609.0
    values = fields.reshape(packed.shape[0], packed.shape[1] * PER_BYTE).to(tl.float32, bitcast=True)
    return values * 1.7014118346046923e38 if FLOATS else values - offset


@triton.jit
def load_weights(
    codes_rows, scale_rows, factor, start, k, width, inside, PER_BYTE: tl.constexpr, FLOATS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Codes of inputs `start` and on [BLOCK_N, BLOCK_K], times group scales times `factor`; 0 beyond k.

    Rows with one scale have GROUP 0, and their codes stay as they are.
    """
    places = start // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
    mask = inside if EVEN else inside & (places < width)[None, :]
    packed = tl.load(codes_rows + places[None, :], mask=mask, other=0)
    values = numbers(packed, PER_BYTE, FLOATS)
    if GROUP > 0:
        groups = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
        mask = inside if EVEN else inside & (groups * GROUP < k)[None, :]
        scale = tl.load(scale_rows + groups[None, :], mask=mask, other=0.0)
        grouped = values.reshape(BLOCK_N, BLOCK_K // GROUP, GROUP) * (scale.to(tl.float32) * factor)[:, :, None]
        values = grouped.reshape(BLOCK_N, BLOCK_K)
    if not EVEN:
        columns = start + tl.arange(0, BLOCK_K)
        values = tl.where((columns < k)[None, :], values, 0.0)
    return values


@triton.jit
def unpack_kernel(
    codes,
    scales,
    out,
    column_scales,
    smooth,
    reciprocals,
    n,
    k,
    packed_width,
    width,
    first_byte,
    first_group,
    stride_codes,
    stride_scales,
    stride_out,
    PER_BYTE: tl.constexpr,
    FLOATS: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    EVEN: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUPS: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """See the module; one program for each BLOCK_N outputs."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < n)[:, None]
    wide = rows.to(tl.int64)
    codes_rows = codes + wide[:, None] * stride_codes + first_byte
    scale_rows = scales + wide[:, None] * stride_scales + first_group
    out_rows = out + wide[:, None] * stride_out

    if SMOOTH:
        for first in tl.range(tl.program_id(0) * COLUMNS, k, tl.num_programs(0) * COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            s = tl.load(smooth + columns, mask=columns < k, other=1.0)
            tl.store(reciprocals + columns, reciprocal_of_smooth(s), mask=columns < k)

    if GROUP > 0:
        peak = tl.zeros([BLOCK_N, GROUPS], tl.float32)
        for first in tl.range(0, tl.cdiv(k, GROUP), GROUPS):
            groups = first + tl.arange(0, GROUPS)
            mask = inside & (groups * GROUP < k)[None, :]
            found = tl.load(scale_rows + groups[None, :], mask=mask, other=0.0).to(tl.float32)
            peak = larger_magnitude(peak, found)
        scale = scale_of(peak * LARGEST, FP8)
        inverse = reciprocal(scale)[:, None]
    else:
        scale = tl.load(scales + wide * stride_scales + first_group, mask=rows < n, other=0.0).to(tl.float32)
        inverse = 1.0
    tl.store(column_scales + rows, scale, mask=rows < n)

    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        values = load_weights(
            codes_rows,
            scale_rows,
            inverse,
            start,
            k,
            packed_width,
            inside,
            PER_BYTE,
            FLOATS,
            GROUP,
            BLOCK_N,
            BLOCK_K,
            EVEN,
        )
        columns = start + tl.arange(0, BLOCK_K)
        mask = inside if EVEN else inside & (columns < width)[None, :]
        tl.store(out_rows + columns[None, :], eight_bits(values, FP8), mask=mask)
