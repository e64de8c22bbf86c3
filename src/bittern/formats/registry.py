"""The weight formats by name: a grid of codes and the bytes that carry it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bittern.errors import UserError, did_you_mean
from bittern.formats import coding, nvfp4
from bittern.formats.dtypes import DtypeName
from bittern.formats.layout import KLayout
from bittern.formats.packing import PACKINGS, Bytes, Codes, Packing


@dataclass(frozen=True)
class Format:
    """A grid `scale * {code_min .. code_max}` and its packing in memory.

    Attributes:
        name: "int4", "nvfp4" or "ternary".
        code_min: Smallest code.
        code_max: Largest code.
        packing: The packing in memory.
        disk_packings: Names of the packings that a file may use.
        group_size: The group that it has; None for any.
        scale_dtype: Stored type of the scales that it has; None for any of 16 or 32 bits.
    """

    name: str
    code_min: int
    code_max: int
    packing: Packing
    disk_packings: tuple[str, ...]
    group_size: int | None = None
    scale_dtype: DtypeName | None = None

    @property
    def has_row_scales(self) -> bool:
        """Whether scales are of two levels, the second one a row and K-segment."""
        return self.scale_dtype == "e4m3"

    @property
    def largest(self) -> int:
        """The largest magnitude of a code."""
        return max(-self.code_min, self.code_max)

    @property
    def codes_per_byte(self) -> int:
        """Codes in a byte of memory."""
        return self.packing.codes_per_byte

    def pack(self, codes: Shaped[Tensor, "*rows k"]) -> Bytes:
        """int8 codes as bytes in memory.

        Raises:
            UserError: if codes are not int8, or one lies outside the grid and would spill into its neighbours.
        """
        if codes.dtype != torch.int8:
            raise UserError(f"codes have dtype {codes.dtype}: expected torch.int8")
        if codes.numel() and (int(codes.min()) < self.code_min or int(codes.max()) > self.code_max):
            raise UserError(
                f"{self.name} codes span {int(codes.min())}..{int(codes.max())}: "
                f"expected {self.code_min}..{self.code_max}"
            )
        return self.packing.pack(codes)

    def unpack(self, packed: Bytes, padded_k: int) -> Codes:
        """The inverse of `pack`."""
        return self.packing.unpack(packed, padded_k)

    def check(self, packed: Shaped[Tensor, "*rows bytes"], padded_k: int) -> None:
        """Refuses packed codes of a wrong dtype or width, or with codes outside the grid.

        Raises:
            UserError: naming what is wrong and how many codes are out of range (int4 has none).
        """
        self.packing.check(packed, padded_k)

    def decode(
        self, codes: Shaped[Tensor, "n _"], scales: Float[Tensor, "n groups"], layout: KLayout
    ) -> Float[Tensor, "n {layout.k}"]:
        """The float32 weight that codes and scales stand for.

        Args:
            codes: int8 codes [n, padded_k], or their packed bytes (uint8) in the memory packing.
            scales: One scale per row and group, in any float type; of nvfp4 the combined ones.
            layout: Segments and groups of K.
        """
        unpacked = self.unpack(codes, layout.padded_k) if codes.dtype == torch.uint8 else codes
        return coding.decode(unpacked, scales, layout)


FORMATS: dict[str, Format] = {
    "int4": Format("int4", -8, 7, PACKINGS["nibbles"], ("nibbles",)),
    "nvfp4": Format("nvfp4", nvfp4.LOW, nvfp4.HIGH, PACKINGS["e2m1"], ("e2m1",), nvfp4.GROUP, "e4m3"),
    "ternary": Format("ternary", -1, 1, PACKINGS["crumbs"], ("crumbs", "trits")),
}


def get(name: str) -> Format:
    """The format of that name: "int4", "nvfp4" or "ternary".

    Raises:
        UserError: for any other name.
    """
    if name not in FORMATS:
        raise UserError(f"unknown weight format {name!r}: {did_you_mean(name, FORMATS)}")
    return FORMATS[name]
