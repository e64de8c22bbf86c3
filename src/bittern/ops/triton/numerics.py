"""Arithmetic that all kernels share, written so that their codes are the reference's codes, bit for bit.

The reference (`bittern.ops.reference`) multiplies by float32 reciprocals and rounds to nearest, ties to even:
- a reciprocal is one correctly rounded division (`div_rn`; Triton's `/` is an approximation on NVIDIA);
- rounding to an integer adds 1.5 * 2^23, after which the low bits of the float are the integer. A compiler
  that fused the product before it with this addition would round once where the reference rounds twice:
  kernels that produce codes are compiled with `enable_fp_fusion=False`;
- maxima keep NaN, so that a token that is not finite gets a scale that is not finite either.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from bittern.ops import reference

TINY = tl.constexpr(reference.TINY)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter: it has no inline assembly, and faults of its own to go round."""

ROUNDER = tl.constexpr(1.5 * 2**23)
E4M3_MAX = tl.constexpr(float(reference.SPANS["fp8"]))
E4M3_RECIPROCAL = tl.constexpr(reference.RECIPROCALS["fp8"])
FORETELLERS = tl.constexpr(reference.FORETELLERS)
HEADROOM = tl.constexpr(float(reference.HEADROOM))
INT8_RECIPROCAL = tl.constexpr(reference.RECIPROCALS["int8"])


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded."""
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def reciprocal_of_smooth(s):
    """1 / s, in a few instructions where s is stored in 16 bits and no subnormal number.

    One Newton step from an approximation within one unit in the last place is correctly rounded unless the
    divisor's 24-bit significand is all ones (Markstein, 1990), which no 16-bit number's is.
    """
    wide = s.to(tl.float32)
    if INTERPRETED or s.dtype == tl.float32:
        return reciprocal(wide)
    else:
        near = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [wide], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.fma(near, tl.fma(-wide, near, tl.full(near.shape, 1.0, tl.float32)), near)


@triton.jit
def larger_magnitude(peak, x):
    """max(peak, |x|), where NaN is the largest."""
    return tl.maximum(peak, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of(magnitudes, AXIS: tl.constexpr = 1):
    """The maximum of each row of magnitudes, or of a vector, along an axis; NaN is the largest."""
    # As integers, magnitudes have the same order, with NaN above infinity.
    return tl.max(magnitudes.to(tl.int32, bitcast=True), axis=AXIS).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(magnitudes, FP8: tl.constexpr):
    """The scale of rows of magnitudes: their maximum over the limit, at least `TINY`; NaN stays NaN."""
    return at_least_tiny(largest_of(magnitudes) * (E4M3_RECIPROCAL if FP8 else INT8_RECIPROCAL))


@triton.jit
def at_least_tiny(scale):
    """A scale that may be divided by; NaN stays NaN."""
    return tl.where(scale < TINY, TINY, scale)


@triton.jit
def foretellers(x, start, BLOCK_K: tl.constexpr):
    """Of a tile that begins with input `start` those inputs which foretell a token's scale; 0 for the others."""
    return tl.where((start + tl.arange(0, BLOCK_K) < FORETELLERS)[None, :], x, 0.0)


@triton.jit
def foretold_scale(covered, magnitudes):
    """The scale of e4m3 tokens, and whether it is the one that their first inputs foretold.

    Args:
        covered: What the largest magnitude may be for that.
        magnitudes: Of all inputs, or maxima of some [tokens, any].
    """
    peak = largest_of(magnitudes)
    foretold = (peak <= covered) & (covered < float("inf"))
    return at_least_tiny(tl.where(foretold, covered, peak) * E4M3_RECIPROCAL), foretold


@triton.jit
def eight_bits(x, FP8: tl.constexpr):
    """Numbers in the range of the format as its codes."""
    if FP8:
        # A maximum can lie one rounding error above the limit, and the conversion of NVIDIA's GPUs saturates.
        if INTERPRETED:
            x = tl.where(x > E4M3_MAX, E4M3_MAX, x)
            x = _on_e4m3_grid(tl.where(x < -E4M3_MAX, -E4M3_MAX, x))
        return x.to(tl.float8e4nv)
    else:
        return (x + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _on_e4m3_grid(x):
    """Rounds to e4m3, ties to even; the interpreter's own cast loses the carry into the exponent."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2^-6 the step is 2^-9.
    subnormal = (x * 512 + ROUNDER - ROUNDER) * 0.001953125
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)


@triton.jit
def product(a, b, accumulator):
    """The sum accumulator + a · b in float32; where dtypes differ, or are float32, by tf32 in three parts.

    tf32 holds every bf16 and float16 number, so that products of the two are exact.
    """
    if INTERPRETED:
        # The interpreter takes bf16 for the integers that carry it.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    elif a.dtype == tl.float32 or b.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="tf32x3")
    elif a.dtype != b.dtype:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="tf32")
    else:
        return tl.dot(a, b, accumulator)


@triton.jit
def in_range(low, DTYPE: tl.constexpr):
    """Down-projected inputs [M, R] in the dtype of U, and the powers of two [M] that they were divided by.

    Those are 1 but in float16, which ends at 65,504, where what follows a product with D may not.
    """
    power = tl.full([low.shape[0]], 1.0, tl.float32)
    if DTYPE == tl.float16:
        power = power_above(largest_of(tl.abs(low)))
        low *= reciprocal_of_power(power)[:, None]
    return low.to(DTYPE), power


@triton.jit
def power_above(peak):
    """The least power of two, 1 or more, that brings magnitudes below 2^15; not finite where they are not."""
    power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 6.103515625e-5
    return tl.where(power < 1.0, 1.0, power)


@triton.jit
def reciprocal_of_power(power):
    """1 over a power of two, exactly."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def add_branch(y, low, power, u):
    """The sum y + power · low · U^T, with what `in_range` returns."""
    if u.dtype == tl.float16:
        return product(low, u.T, y * reciprocal_of_power(power)[:, None]) * power[:, None]
    else:
        return product(low, u.T, y)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 as a result's dtype, to nearest, ties to even; the interpreter's own cast to bf16 cuts off."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        # The carry would make an infinity of some NaN.
        return tl.where(x == x, nearest, x).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def floored(last, first):
    """The scale `last`, but not nearer to 0 than 2^-40 of `first`, with the ratio of the two.

    What is below that would be lost beside the other segment's sum in any case, and the ratio stays finite.
    """
    least = tl.abs(first) * 9.094947017729282e-13
    nearest = tl.where(tl.abs(last) < least, least, last)
    return nearest, tl.where(nearest == 0.0, 0.0, first / nearest)


@triton.jit
def gelu(x):
    """The GELU in its tanh form: x / (1 + exp(-2 z)), z = sqrt(2 / pi) · (x + 0.044715 · x^3).

    The same as x / 2 · (1 + tanh(z)), without the cancellation where tanh is near -1: two instructions of the special
    function unit for each number, an exponential and an approximate reciprocal.
    """
    negative = x * (-2.302208198 - 0.1029432397 * x * x)
    return x / (1.0 + tl.exp2(negative))
