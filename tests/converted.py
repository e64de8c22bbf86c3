"""What the tests of conversion ask of models, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from bittern.layers import QuantLinear

TOLERANCE = 1e-5
"""Of the output's size. Sums over K in float32 are what is left."""


def load(folder: Path) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(folder, dtype=torch.float32)


def layer(model: torch.nn.Module, path: str) -> QuantLinear:
    found: Any = model.get_submodule(path)
    assert isinstance(found, QuantLinear)
    found.path = "a16"
    return found


def inputs(k: int) -> Tensor:
    return torch.randn(5, k, generator=torch.Generator().manual_seed(k)) * 3


def agree(y: Tensor, expected: Tensor) -> None:
    assert float((y.detach().double() - expected).norm() / expected.norm()) < TOLERANCE
