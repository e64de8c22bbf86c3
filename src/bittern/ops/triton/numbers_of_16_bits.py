"""Packed codes as bf16 or float16, where they are multiplied.

On NVIDIA a code becomes a bf16 in three steps for several at once: mask four bytes together, put the exponent of 128
above each by `prmt` (128 + code), subtract with one `fma` for two: 1.4 operations a weight. The bits of a 4-bit float
go to the lowest of the exponent and the highest of the significand, and an `fma` for two multiplies them to size, which
is exact; that is 2.5.
"""

# A type checker knows neither launch options nor the language inside kernels.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from bittern.ops.triton.numerics import INTERPRETED
from bittern.ops.triton.unpack import numbers

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
