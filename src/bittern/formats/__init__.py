"""Few-bit formats: a grid of numbers and its bytes. Pure torch functions that know nothing of layers."""

from __future__ import annotations

from bittern.formats import nvfp4
from bittern.formats.coding import Rule, decode, encode
from bittern.formats.dtypes import DTYPES, DtypeName, dtype_of, round_to
from bittern.formats.layout import KLayout, Segment
from bittern.formats.packing import PACKINGS, Packing, get_packing
from bittern.formats.registry import FORMATS, Format, get

__all__ = [
    "DTYPES",
    "FORMATS",
    "PACKINGS",
    "DtypeName",
    "Format",
    "KLayout",
    "Packing",
    "Rule",
    "Segment",
    "decode",
    "dtype_of",
    "encode",
    "get",
    "get_packing",
    "nvfp4",
    "round_to",
]
