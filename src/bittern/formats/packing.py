"""Codes to bytes and back: two, four or five codes a byte, the lowest k in the lowest place.

Every packing takes any number of codes: what the last byte has left over is filled with code 0 and ignored
when it is read. Packed codes are uint8 because neither torch nor safetensors has a smaller integer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int8, Shaped, UInt8
from torch import Tensor

from bittern.errors import UserError, did_you_mean

Codes = Int8[Tensor, "*rows k"]
Bytes = UInt8[Tensor, "*rows bytes"]


def pack_nibbles(codes: Int8[Tensor, "*rows k"]) -> UInt8[Tensor, "*rows bytes"]:
    """Codes -8..7 as two's complement nibbles, even k low."""
    low, high = _columns(codes, 2)
    return ((low & 0xF) | (high << 4)).view(torch.uint8)


def unpack_nibbles(packed: UInt8[Tensor, "*rows bytes"], k: int) -> Int8[Tensor, "*rows k"]:
    """The inverse of `pack_nibbles` for rows of k codes."""
    # The byte's nibbles move to the two bytes of an int16, which is far cheaper than taking them apart and
    # interleaving them again; flipping the sign bit and subtracting it extends the sign.
    wide = packed.to(torch.int16)
    wide = (wide | (wide << 4)) & 0x0F0F
    return ((_bytes(wide) ^ 8) - 8)[..., :k].contiguous()


def pack_crumbs(codes: Int8[Tensor, "*rows k"]) -> UInt8[Tensor, "*rows bytes"]:
    """Codes -1..1, each plus one, in two bits: k ascending from the low bits."""
    a, b, c, d = (column + 1 for column in _columns(codes, 4))
    return (a | (b << 2) | (c << 4) | (d << 6)).view(torch.uint8)


def unpack_crumbs(packed: UInt8[Tensor, "*rows bytes"], k: int) -> Int8[Tensor, "*rows k"]:
    """The inverse of `pack_crumbs` for rows of k codes; the invalid bit pattern 3 reads as code 2."""
    wide = packed.to(torch.int32)
    wide = (wide | (wide << 12)) & 0x000F000F
    wide = (wide | (wide << 6)) & 0x03030303
    return (_bytes(wide) - 1)[..., :k].contiguous()


def pack_trits(codes: Int8[Tensor, "*rows k"]) -> UInt8[Tensor, "*rows bytes"]:
    """Codes -1..1, each plus one, as five digits of base 3: the lowest k least significant."""
    total: Tensor | None = None
    for column in reversed(_columns(codes, 5)):
        digit = (column + 1).view(torch.uint8)
        total = digit if total is None else total * 3 + digit
    assert total is not None
    return total


def unpack_trits(packed: UInt8[Tensor, "*rows bytes"], k: int) -> Int8[Tensor, "*rows k"]:
    """The inverse of `pack_trits` for rows of k codes; bytes 243..255 read as a last code of 2."""
    digits: list[Tensor] = []
    rest = packed
    for _ in range(4):
        quotient = rest // 3
        digits.append((rest - quotient * 3).view(torch.int8) - 1)
        rest = quotient
    digits.append(rest.view(torch.int8) - 1)
    return torch.stack(digits, dim=-1).flatten(-2)[..., :k].contiguous()


def pack_e2m1(codes: Int8[Tensor, "*rows k"]) -> UInt8[Tensor, "*rows bytes"]:
    """Codes of nvfp4 as nibbles, even k low: the lower three bits are exponent and mantissa, the highest the sign.

    Raises:
        UserError: for a code between those of the grid.
    """
    sizes = codes.abs()
    # 0 to 4 are their own bits; 6, 8 and 12 follow.
    bits = torch.where(sizes <= 4, sizes, 5 + (sizes > 6).to(torch.int8) + (sizes > 8).to(torch.int8))
    if not bool(torch.isin(codes, torch.tensor(_E2M1, dtype=torch.int8, device=codes.device)).all()):
        raise UserError(f"nvfp4 codes are not all on the grid: expected {', '.join(map(str, sorted(set(_E2M1))))}")
    return pack_nibbles(torch.where(codes < 0, bits - 8, bits))


def unpack_e2m1(packed: UInt8[Tensor, "*rows bytes"], k: int) -> Int8[Tensor, "*rows k"]:
    """The inverse of `pack_e2m1` for rows of k codes; both zeros read as 0."""
    signed = unpack_nibbles(packed, k)
    bits = signed & 7
    sizes = bits + (bits - 4).clamp_(min=0) + 2 * (bits - 6).clamp_(min=0)
    return torch.where(signed < 0, -sizes, sizes)


# Twice what the sixteen patterns stand for.
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Packing:
    """One way to lay codes into bytes."""

    name: str
    codes_per_byte: int
    suspect: Callable[[Bytes], Tensor] | None
    """Marks the bytes that are not all valid codes; None where every byte is. Such codes unpack to 2."""
    pack: Callable[[Codes], Bytes]
    unpack: Callable[[Bytes, int], Codes]

    def bytes_per_row(self, k: int) -> int:
        """Bytes of a row of k codes."""
        return -(-k // self.codes_per_byte)

    def check(self, packed: Shaped[Tensor, "*rows bytes"], k: int) -> None:
        """Refuses packed codes of a wrong dtype or width, or with codes outside the grid.

        Raises:
            UserError: naming what is wrong and how many codes are out of range.
        """
        if packed.dtype != torch.uint8:
            raise UserError(f"packed codes have dtype {packed.dtype}: expected torch.uint8")
        if packed.shape[-1] != self.bytes_per_row(k):
            raise UserError(
                f"packed codes have {packed.shape[-1]} bytes a row: "
                f"expected {self.bytes_per_row(k)} for {k} codes as {self.name}"
            )
        if self.suspect is None:
            return
        # Sound files never get to the slow part, which also knows what is filling in the last byte.
        rows = packed.flatten(0, -2) if packed.ndim > 1 else packed[None]
        damaged = rows[self.suspect(rows).any(dim=1)]
        bad = int((self.unpack(damaged, k) == 2).sum())
        if bad:
            raise UserError(
                f"{bad} of {rows.shape[0] * k} codes are out of range: expected -1, 0 or 1; "
                "the file is damaged or was not packed as " + self.name
            )


PACKINGS: dict[str, Packing] = {
    packing.name: packing
    for packing in (
        Packing("nibbles", 2, None, pack_nibbles, unpack_nibbles),
        Packing("e2m1", 2, None, pack_e2m1, unpack_e2m1),
        Packing("crumbs", 4, lambda packed: (packed & (packed >> 1) & 0x55) != 0, pack_crumbs, unpack_crumbs),
        Packing("trits", 5, lambda packed: packed > 242, pack_trits, unpack_trits),
    )
}


def get_packing(name: str) -> Packing:
    """The packing of that name: "nibbles", "e2m1", "crumbs" or "trits".

    Raises:
        UserError: for any other name.
    """
    if name not in PACKINGS:
        raise UserError(f"unknown packing {name!r}: {did_you_mean(name, PACKINGS)}")
    return PACKINGS[name]


def _bytes(wide: Tensor) -> Tensor:
    """The bytes of integers as int8, lowest first, along the last axis."""
    # By way of one axis: rows of length 0 or 1 have strides that a view of other-sized elements refuses.
    narrow = wide.reshape(-1).view(torch.int8)
    return narrow.view(*wide.shape[:-1], wide.shape[-1] * wide.element_size())


def _columns(codes: Tensor, per_byte: int) -> tuple[Tensor, ...]:
    """The codes of each place in a byte, zero-filled to whole bytes."""
    short = -codes.shape[-1] % per_byte
    whole = torch.nn.functional.pad(codes, (0, short)) if short else codes
    places = whole.reshape(*whole.shape[:-1], whole.shape[-1] // per_byte, per_byte)
    return torch.unbind(places, dim=-1)
