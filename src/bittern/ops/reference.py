"""The numbers of a few-bit layer, in plain torch: what every faster kernel is compared with.

With K inputs, N outputs, rank R and M rows (tokens), a layer computes

    y = Qa(x / s) · What^T + (x · D^T) · U^T + b                                                     [a8, a4]
    y = (x / s) · What^T + (x · D^T) · U^T + b                                                          [a16]
    y = Qa((x + h) / s) · What^T + (x · D^T) · U^T + b - h · sum_j What_ij / s_j             [a4 with a shift]

What = codes · scales, one scale per group of K. K may be cut into segments, one input tensor each; every
segment has its own activation scales and its part of s and D, and the products of the segments add up.

From one output on, y may pass through a GELU: gelu(y) = y / 2 · (1 + tanh(sqrt(2 / pi) · (y + 0.044715 · y^3))).

Rules that make the numbers definite
- All arithmetic is float32; codes, scales, s, D, U and b are widened first. The result is rounded once, to
  the dtype of the input. Rounding is to nearest, ties to even, everywhere.
- Whatever is divided by a scale, by s or by a format's largest code is multiplied by its reciprocal, rounded
  to float32: one product is the same number on every device, while compilers and libraries differ in how they
  divide. "amax / 127" below is amax · f32(1 / 127).
- a16 multiplies x / s with What as they are.
- a8-int8 and a8-fp8 have one activation scale per token and segment: in int8 amax / 127. In fp8 it is foretold, so
  that codes are made while inputs are read: 16 · (amax of the first 256 inputs) / 448 if that covers all inputs, else
  amax / 448. E4m3's normal numbers span 15 powers of two, of which 16 takes 4: beside an input 100 times as large as
  the others, those keep the error that they had (2.65 %); beside one 1,000 times as large it is 2.9 %, beside one
  10,000 times as large, and among the first, 20 %.
- They fold the group scales of What into 8 bits: per output row and segment c = amax / 127 or amax / 448, where amax
  is the largest magnitude that the row's scales allow, max |scale| times the format's largest |code|; the folded
  codes are codes · (scale · (1 / c)), rounded to integers or to e4m3. Where a row has a single scale the codes
  themselves fit into 8 bits, c is that scale and folding is exact (ternary per row becomes -1, 0, 1).
  A product is ((codes · codes) · activation scale) · c. The int8 sum is exact, whatever the order of the BLAS.
- a8-fp8-folded is a8-fp8, but folds the branch, too, where many tokens share it (`folds_branch`):
  (What + U · (D · s)) / c becomes e4m3 as a whole, D · s rounded to bf16, so that tokens need no branch. c is a power
  of two with room for the largest sum that could be: of |scale| times the largest |code|, and over ranks of the
  largest |U| of 64 rows times the largest |D · s|.
- a4 has one activation scale per token and 64 inputs: amax / 8.25, with the sign that takes the largest to -8, and
  codes -8..7; or max / 15 with codes 0..15 where the segment has a shift h > 0. Groups start at each segment, whose
  last group is filled with zeros. What is not folded.
- A scale is at least the smallest normal float32, so that zeros and denormals give code 0 and never NaN.
  An infinity of either sign or a NaN in a token makes that token's outputs non-finite, and no other token's.

Memory stays bounded: weights are unpacked a block of rows at a time, so that no float copy of a large weight
ever exists. Activations are held in float32 once or twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from bittern import formats
from bittern.errors import UserError, did_you_mean
from bittern.formats import Format, KLayout, Segment
from bittern.scheme import ACTIVATION_GROUP

TINY = torch.finfo(torch.float32).tiny
"""The smallest scale."""

RANGES: dict[str, tuple[int, int]] = {"int8": (-127, 127), "fp8": (-448, 448), "int4": (-8, 7), "uint4": (0, 15)}
"""The codes of each activation format."""

SPANS: dict[str, float] = {"int8": 127, "fp8": 448, "int4": 8.25, "uint4": 15}
"""What the largest magnitude of a row or group is in units of its scale. In int4 it becomes code -8."""

RECIPROCALS: dict[str, float] = {name: torch.tensor(span).reciprocal().item() for name, span in SPANS.items()}
"""What an amax is multiplied by to give the scale: 1 over the span, rounded to float32."""

FORETELLERS = 256
"""A token's first inputs, which foretell its scale in fp8."""

HEADROOM = 16
"""How much larger than those the others may be."""

FOLDED_FROM = 1024
"""Tokens that share a branch which is folded into the weight: on an H100 it is faster from here on."""

INPUTS_PER_RANK = 64
"""At least so many has a branch that is folded: of one with fewer, 16 bits are worth more than an e4m3 keeps."""

MOST_FOLDED = 64
"""The most rank of a branch that is folded."""

FOLDED_TOGETHER = 64
"""Rows whose scales in a folded weight leave room for the same branch."""

_LEAST_FOLDED = 2.0**-64
"""The least c of a weight with its branch, which leaves U / c finite."""

# Up to 2^24 every integer is a float32: sums of 127 * 127 over this many inputs are exact in any order.
_EXACT_K = 1024

# Weights unpacked at a time: in float32 about what fits a CPU's cache, but enough to fill a GPU.
_BLOCK = {"cpu": 3 * 2**18}
_LARGE_BLOCK = 2**25


class _Operand(NamedTuple):
    """One side of a product: its rows, and the scale of each row where it was left out of them."""

    values: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class _Arithmetic:
    """What a path does to its operands: the formats of activations and of folded weights (None: as they are)."""

    activations: str | None
    weights: str | None


PATHS: dict[str, _Arithmetic] = {
    "a4": _Arithmetic("int4", None),
    "a8-int8": _Arithmetic("int8", "int8"),
    "a8-fp8": _Arithmetic("fp8", "fp8"),
    "a8-fp8-folded": _Arithmetic("fp8", "fp8"),
    "a16": _Arithmetic(None, None),
}


@functools.lru_cache(maxsize=4096)
def layout_of(segments: tuple[int, ...], group_size: int | None) -> KLayout:
    """The layout of K, made once for each shape."""
    return KLayout(segments, group_size)


def few_bit_linear(
    inputs: Sequence[Float[Tensor, "*batch _"]],
    codes: UInt8[Tensor, "n _"],
    scales: Float[Tensor, "n groups"],
    smooth: Float[Tensor, " k"] | None,
    down: Float[Tensor, "r k"] | None,
    up: Float[Tensor, "n r"] | None,
    bias: Float[Tensor, " n"] | None,
    weight: str,
    group_size: int | None,
    path: str,
    shift: Sequence[float],
    gelu_from: int | None = None,
) -> Float[Tensor, "*batch n"]:
    """The layer of the module's docstring. Arguments as in `bittern.ops.few_bit_linear`."""
    layout = layout_of(tuple(x.shape[-1] for x in inputs), group_size)
    arithmetic = PATHS[path]
    folded = folds_branch(inputs[0].shape[:-1].numel(), down, up, weight, layout, path)
    # Only 4-bit codes are worth an unsigned grid: 8 bits have room for the sign.
    offsets = tuple(shift) if path == "a4" and any(shift) else (0.0,) * len(inputs)
    low: Tensor | None = None
    operands: list[_Operand] = []
    for x, segment, offset in zip(inputs, layout, offsets, strict=True):
        raw = x.reshape(-1, x.shape[-1]).float()
        if down is not None and not folded:
            part = raw @ down[:, segment.logical].float().T
            low = part if low is None else low.add_(part)
        smoothed = _smoothed(raw, smooth, segment, offset)
        operands.append(_activations(smoothed, arithmetic.activations, offset))

    outputs: list[Tensor] = []
    for rows, block in _blocks(codes, scales, layout, formats.get(weight)):
        total: Tensor | None = None
        for operand, segment, offset in zip(operands, layout, offsets, strict=True):
            if folded:
                assert down is not None and up is not None
                right = fold_with_branch(block, rows, segment, smooth, down, up, formats.get(weight).largest)
            else:
                right = fold(block, segment, arithmetic.weights, formats.get(weight).largest)
            part = _product(operand, right, exact=arithmetic.weights == "int8")
            if offset:
                ones = right.values.new_ones(right.values.shape[1])
                part.sub_(offset * (right.values @ _smoothed(ones, smooth, segment)))
            total = part if total is None else total.add_(part)
        assert total is not None
        if low is not None and up is not None:
            total.addmm_(low, up[rows].float().T)
        if bias is not None:
            total.add_(bias[rows])
        if gelu_from is not None:
            activated(total, max(0, gelu_from - rows.start))
        outputs.append(total.to(inputs[0].dtype))
    if not outputs:
        return inputs[0].new_empty(*inputs[0].shape[:-1], 0)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return y.reshape(*inputs[0].shape[:-1], codes.shape[0])


def activated(y: Float[Tensor, "*batch n"], gelu_from: int | None) -> Float[Tensor, "*batch n"]:
    """Outputs, in place: those from `gelu_from` on after a GELU in its tanh form; None for none."""
    if gelu_from is not None:
        part = y[..., gelu_from:]
        part.copy_(torch.nn.functional.gelu(part, approximate="tanh"))
    return y


def few_bit_linear_backward(
    grad: Float[Tensor, "*batch n"],
    codes: UInt8[Tensor, "n _"],
    scales: Float[Tensor, "n groups"],
    smooth: Float[Tensor, " k"] | None,
    down: Float[Tensor, "r k"] | None,
    up: Float[Tensor, "n r"] | None,
    weight: str,
    group_size: int | None,
    segments: Sequence[int],
) -> Float[Tensor, "*batch k"]:
    """The gradient of the inputs, side by side: grad · W for the effective weight W = What / s + U · D.

    Straight through: rounding activations counts as the identity (Bengio et al., 2013), and so a quantized
    path has the gradient of a16.
    """
    layout = layout_of(tuple(segments), group_size)
    flat = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1]).float()
    result = flat.new_zeros(flat.shape[0], layout.k)
    for rows, block in _blocks(codes, scales, layout, formats.get(weight)):
        for segment in layout:
            result[:, segment.logical].addmm_(flat[:, rows], _unfolded(block, segment))
    if smooth is not None:
        result.mul_(smooth.float().reciprocal())
    if down is not None and up is not None:
        result.addmm_(flat @ up.float(), down.float())
    return result.to(grad.dtype).reshape(*grad.shape[:-1], layout.k)


def dequantize(
    codes: UInt8[Tensor, "n _"],
    scales: Float[Tensor, "n groups"],
    smooth: Float[Tensor, " k"] | None,
    down: Float[Tensor, "r k"] | None,
    up: Float[Tensor, "n r"] | None,
    weight: str,
    group_size: int | None,
    segments: Sequence[int],
    dtype: torch.dtype,
) -> Float[Tensor, "n k"]:
    """The effective weight What / s + U · D. Arguments as in `bittern.ops.dequantize`."""
    layout = layout_of(tuple(segments), group_size)
    out = torch.empty(codes.shape[0], layout.k, dtype=dtype, device=codes.device)
    for rows, block in _blocks(codes, scales, layout, formats.get(weight)):
        effective = torch.cat([_unfolded(block, segment) for segment in layout], dim=-1)
        if smooth is not None:
            effective.mul_(smooth.float().reciprocal())
        if down is not None and up is not None:
            effective.addmm_(up[rows].float(), down.float())
        out[rows] = effective
    return out


def quantize_activations(
    x: Float[Tensor, "*batch k"],
    smooth: Float[Tensor, " k"] | None,
    down: Float[Tensor, "r k"] | None,
    format: str,
    shift: float,
) -> tuple[Shaped[Tensor, "*batch _"], Float[Tensor, "*batch groups"], Float[Tensor, "*batch r"]]:
    """A layer's prologue on one segment. Arguments and results as in `bittern.ops.quantize_activations`."""
    if format not in SPANS:
        raise UserError(f"unknown activation format {format!r}: {did_you_mean(format, SPANS)}")
    # What is promised of the results is that their rows are contiguous, whatever x's are.
    raw = x.reshape(-1, x.shape[-1]).float().contiguous()
    low = raw.new_empty(raw.shape[0], 0) if down is None else raw @ down.float().T
    (whole,) = layout_of((x.shape[-1],), None)
    offset = shift if format == "uint4" else 0.0
    values, scale = quantize(_smoothed(raw, smooth, whole, offset), format)
    if format == "fp8":
        codes = values.to(torch.float8_e4m3fn)
    elif format == "int8":
        codes = values.to(torch.int8)
    else:
        codes = formats.get_packing("nibbles").pack(values.to(torch.int8))
    batch = x.shape[:-1]
    return (
        codes.reshape(*batch, codes.shape[-1]),
        scale.reshape(*batch, scale.shape[-1]),
        low.reshape(*batch, low.shape[-1]),
    )


def quantize(x: Float[Tensor, "m k"], format: str) -> tuple[Float[Tensor, "m padded_k"], Float[Tensor, "m groups"]]:
    """Rows as codes and scales: one scale per row in 8 bits; one per 64 columns, zero-filled, in 4.

    An int4 scale has the sign that makes the group's largest number negative, where there is a code more. The number
    is 8.25 of it and not 8: the rest gains more than it loses. Gaussian groups then have 20.6 dB instead of 19.4.

    Args:
        x: Rows in float32.
        format: "int8", "fp8", "int4" or "uint4".

    Returns:
        The codes as float32 numbers, and the scales.
    """
    m, k = x.shape
    if format in ("int4", "uint4"):
        x = torch.nn.functional.pad(x, (0, -k % ACTIVATION_GROUP)) if k % ACTIVATION_GROUP else x
        groups = x.view(m, x.shape[1] // ACTIVATION_GROUP, ACTIVATION_GROUP)
    else:
        groups = x.view(m, 1, k)
    peak = _largest(groups) if format == "uint4" else _amax(groups)
    if format == "fp8":
        covered = _amax(groups[..., :FORETELLERS]) * HEADROOM
        peak = torch.where((peak <= covered) & (covered < torch.inf), covered, peak)
    scale = (peak * RECIPROCALS[format]).clamp_min_(TINY)
    if format == "int4":
        scale = torch.where(groups.amax(-1, keepdim=True) > -groups.amin(-1, keepdim=True), -scale, scale)
    return _rounded(groups * scale.reciprocal(), format).flatten(1), scale.squeeze(-1)


def quantize_in_place(rows: Float[Tensor, "m k"]) -> Float[Tensor, " m"]:
    """Rows become their int8 codes, which stay float32 numbers; returns the scales. As `quantize`, to the bit."""
    scale = (_amax(rows) * RECIPROCALS["int8"]).clamp_min_(TINY)
    rows.mul_(scale.reciprocal()).round_()
    return scale.squeeze(-1)


def _smoothed(raw: Tensor, smooth: Tensor | None, segment: Segment, offset: float = 0.0) -> Tensor:
    """(raw + offset) / s of one segment."""
    shifted = raw + offset if offset else raw
    return shifted if smooth is None else shifted * smooth[segment.logical].float().reciprocal()


def _activations(smoothed: Tensor, format: str | None, offset: float) -> _Operand:
    """One segment's activations: as they are, or codes with one scale per token, or rounded in groups."""
    if format is None:
        return _Operand(smoothed)
    if format != "int4":
        return _Operand(*quantize(smoothed, format))
    values, scales = quantize(smoothed, "uint4" if offset else "int4")
    values.view(*scales.shape, ACTIVATION_GROUP).mul_(scales[..., None])
    return _Operand(values[:, : smoothed.shape[1]])


def fold(block: tuple[Tensor, Tensor], segment: Segment, format: str | None, largest: int) -> _Operand:
    """The weights of one block and segment: folded to 8 bits, or as they are; they take the place of the codes.

    Args:
        block: Codes [rows, padded_k] and scales [rows, groups], both float32.
        segment: Where the segment lies in both.
        format: "int8" or "fp8"; None for the weights as they are.
        largest: The format's largest magnitude of a code. Scales alone then give c, before any code is read; a row
            whose largest scale has no such code loses a fraction of a step.
    """
    codes, scales = block
    if format is None:
        return _Operand(_unfolded(block, segment))
    scale, ratios = fold_scales(scales[:, segment.groups], format, largest)
    if ratios is None:
        return _Operand(codes[:, segment.unpadded], scale)
    return _Operand(_rounded(_scaled(codes, ratios, segment), format), scale)


def fold_scales(
    groups: Float[Tensor, "n groups"], format: str, largest: int
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n groups"] | None]:
    """What is left of a segment's scales after folding to 8 bits, and what folds the codes.

    Args:
        groups: The segment's scales, float32.
        format: "int8" or "fp8".
        largest: The weight format's largest magnitude of a code.

    Returns:
        c, one per row, and scale · (1 / c) per group; None where c is the only scale and codes stay as they are.
    """
    if groups.shape[1] == 1:
        return groups, None
    scale = (_amax(groups) * largest * RECIPROCALS[format]).clamp_min_(TINY)
    return scale, groups * scale.reciprocal()


def folds_branch(m: int, down: Tensor | None, up: Tensor | None, weight: str, layout: KLayout, path: str) -> bool:
    """Whether the branch is folded into the weight: of many tokens, in bf16, with many inputs for each rank."""
    return (
        path == "a8-fp8-folded"
        and m >= FOLDED_FROM
        and down is not None
        and up is not None
        and down.dtype == up.dtype == torch.bfloat16
        and weight == "int4"
        and 0 < len(down) <= MOST_FOLDED
        and len(down) * INPUTS_PER_RANK <= layout.k
        and not any(length % ACTIVATION_GROUP for length in (*layout.segments, layout.group_size or 0))
    )


def fold_with_branch(
    block: tuple[Tensor, Tensor],
    rows: slice,
    segment: Segment,
    smooth: Float[Tensor, " k"] | None,
    down: Float[Tensor, "r k"],
    up: Float[Tensor, "n r"],
    largest: int,
) -> _Operand:
    """What + U · (D · s) of one block of rows and a segment in e4m3; takes the place of the codes.

    Arguments as of `fold`; U is the whole layer's.
    """
    weights = _unfolded(block, segment)
    scales, part = block[1][:, segment.groups], down[:, segment.logical].float()
    if smooth is not None:
        part = (part * smooth[segment.logical].float()).bfloat16().float()
    magnitudes = torch.nn.functional.pad(up.float().abs(), (0, 0, 0, -len(up) % FOLDED_TOGETHER))
    most = magnitudes.view(-1, FOLDED_TOGETHER, up.shape[1]).amax(1)
    bound = (most @ part.abs().amax(1)).repeat_interleave(FOLDED_TOGETHER)[rows, None] + _amax(scales) * largest
    up = up[rows]
    scale = _power_of_two_below(bound).mul_(2.0**-7).clamp_min_(_LEAST_FOLDED)
    weights.addmm_(up.float(), part)
    return _Operand(_rounded(weights.mul_(scale.reciprocal()), "fp8"), scale)


def _power_of_two_below(values: Tensor) -> Tensor:
    """Of numbers that are not negative the largest power of two that is not larger; not finite where they are not."""
    return (values.view(torch.int32) & 0x7F800000).view(torch.float32)


def _unfolded(block: tuple[Tensor, Tensor], segment: Segment) -> Tensor:
    """What of one block and segment; it takes the place of the codes."""
    codes, scales = block
    return _scaled(codes, scales[:, segment.groups], segment)


def _scaled(codes: Tensor, groups: Tensor, segment: Segment) -> Tensor:
    """A segment's codes times what its groups have, in place of the codes."""
    codes[:, segment.padded].view(*groups.shape, segment.size).mul_(groups[..., None])
    return codes[:, segment.unpadded]


def _product(a: _Operand, w: _Operand, exact: bool) -> Tensor:
    """The product a · w^T times the scales of both, first a's."""
    k = a.values.shape[1]
    if exact and k > _EXACT_K:
        # The sum of several exact parts can pass 2^24; int32 holds it.
        total = torch.zeros(len(a.values), len(w.values), dtype=torch.int32, device=w.values.device)
        for start in range(0, k, _EXACT_K):
            columns = slice(start, start + _EXACT_K)
            total += (a.values[:, columns] @ w.values[:, columns].T).to(torch.int32)
        product = total.float()
    else:
        product = a.values @ w.values.T
    if a.scale is not None and w.scale is not None:
        product.mul_(a.scale).mul_(w.scale.T)
    return product


def _rounded(values: Tensor, format: str) -> Tensor:
    """Values as codes of a format, in place where possible."""
    if format == "fp8":
        # The cast overflows to NaN, and scaling can leave a maximum one rounding error above the limit.
        return values.clamp_(*RANGES["fp8"]).to(torch.float8_e4m3fn).float()
    # In int8 the largest is 127 by its scale, weights included.
    return values.round_() if format == "int8" else values.round_().clamp_(*RANGES[format])


def _amax(values: Tensor) -> Tensor:
    """The largest magnitude of each row, as a column; without a full-size copy of magnitudes."""
    return torch.maximum(values.amax(-1, keepdim=True), values.amin(-1, keepdim=True).neg_())


def _largest(values: Tensor) -> Tensor:
    """The largest number of each row, as a column; infinity also for the negative one, which must not become code 0."""
    peak = values.amax(-1, keepdim=True)
    return peak.masked_fill_(values.amin(-1, keepdim=True).isneginf(), torch.inf)


def _blocks(
    codes: Tensor, scales: Tensor, layout: KLayout, fmt: Format
) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Blocks of output rows: float32 codes [rows, padded_k] that the caller may overwrite, and their scales."""
    n = codes.shape[0]
    size = max(1, _BLOCK.get(codes.device.type, _LARGE_BLOCK) // layout.padded_k)
    # Matrix products prefer whole tiles.
    size -= size % 64 if size > 64 else 0
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        yield rows, (fmt.unpack(codes[rows], layout.padded_k).float(), scales[rows].float())
