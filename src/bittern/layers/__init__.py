"""Few-bit layers: modules that hold tensors and call the operations."""

from __future__ import annotations

from bittern.layers.conv import QuantConv2d, flat_weight, patches
from bittern.layers.facade import FewBitWeight
from bittern.layers.few_bit import LEAVES, FewBitLayer
from bittern.layers.group import Group, group_linear, join_group
from bittern.layers.hooks import is_unhooked
from bittern.layers.linear import QuantLinear
from bittern.layers.walk import paths, quant_layers, set_path, swap

__all__ = [
    "LEAVES",
    "FewBitLayer",
    "FewBitWeight",
    "Group",
    "QuantConv2d",
    "QuantLinear",
    "flat_weight",
    "group_linear",
    "is_unhooked",
    "join_group",
    "patches",
    "paths",
    "quant_layers",
    "set_path",
    "swap",
]
