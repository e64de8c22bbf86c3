"""Few-bit layers: modules that hold tensors and call the operations."""

from __future__ import annotations

from bittern.layers.facade import FewBitWeight
from bittern.layers.group import Group, group_linear, join_group
from bittern.layers.linear import LEAVES, QuantLinear
from bittern.layers.walk import paths, quant_layers, set_path

__all__ = [
    "LEAVES",
    "FewBitWeight",
    "Group",
    "QuantLinear",
    "group_linear",
    "join_group",
    "paths",
    "quant_layers",
    "set_path",
]
