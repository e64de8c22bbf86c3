from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st

STORED = [torch.bfloat16, torch.float16, torch.float32]


def draw(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Random float32 weights of one kind, adversarial ones among them."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=g)
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "gaussian": lambda: normal,
        "laplace": lambda: normal.sign() * torch.rand(rows, columns, generator=g).clamp(min=1e-7).log().neg(),
        "outlier": lambda: normal.index_fill(1, torch.tensor([0]), 100.0),
        "sparse": lambda: normal * (torch.rand(rows, columns, generator=g) < 0.1),
        "ties": lambda: torch.randint(-2, 3, (rows, columns), generator=g).float(),
        "huge": lambda: normal * 1e37,
        "tiny": lambda: normal * 1e-37,
        "denormal": lambda: normal * 1e-43,
        "mixed": lambda: normal * 10 ** (20 * torch.rand(rows, columns, generator=g) - 10),
    }
    return kinds[kind]()


kinds = st.sampled_from(["gaussian", "laplace", "outlier", "sparse", "ties", "huge", "tiny", "denormal", "mixed"])
seeds = st.integers(0, 2**32)
stored = st.sampled_from(STORED)


def squared_error(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Per group, in float64."""
    return (weight.double() - codes.double() * scales.double()[..., None]).square().sum(dim=-1)


def sqnr(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    """Signal to quantization noise, dB."""
    noise = (weight.double() - decoded.double()).square().sum()
    return 10 * math.log10(weight.double().square().sum() / noise)
