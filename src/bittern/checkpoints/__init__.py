"""Checkpoints: what a few-bit model is on disk. Readers and writers over plain state dicts."""

from __future__ import annotations

from bittern.checkpoints.config import FORMAT_VERSION, QUANT_METHOD, CheckpointConfig, Target
from bittern.checkpoints.files import TensorSpec, read_headers, read_tensor, weight_files
from bittern.checkpoints.native import check_headers, check_values, from_disk, is_few_bit, is_leaf, on_disk, to_disk

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "CheckpointConfig",
    "Target",
    "TensorSpec",
    "check_headers",
    "check_values",
    "from_disk",
    "is_few_bit",
    "is_leaf",
    "on_disk",
    "read_headers",
    "read_tensor",
    "to_disk",
    "weight_files",
]
