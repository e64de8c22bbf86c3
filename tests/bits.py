"""Tensors that must be the same to the last bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def expect_bits(again: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """The same names, shapes, dtypes and bits; NaN is like NaN, and -0 is not like 0."""
    assert again.keys() == before.keys()
    for name, tensor in before.items():
        assert (again[name].shape, again[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name
