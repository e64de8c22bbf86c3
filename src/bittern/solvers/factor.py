"""Cholesky factors of what sums over tokens made: positive semidefinite up to rounding, and seldom more."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor

RAISE = 10.0
"""By how much the damping grows where there is no factor."""

_linalg = cast(Any, torch.linalg)


def damped_factor(matrix: Float[Tensor, "k k"], damping: float, floor: float = 0.0) -> Float64[Tensor, "k k"]:
    """The lower triangular L with L L^T = matrix + d, in float64.

    d is `damping` times the mean diagonal (which counts as `floor` at least), or 1 for a matrix of zeros. Sums over
    many tokens in float32 can be off by more than that in some direction: d then grows tenfold until there is a factor.

    Raises:
        ValueError: if the matrix is not finite.
    """
    exact = matrix.double()
    mean = max(float(exact.diagonal().mean()), floor)
    added = damping * mean if mean > 0 else 1.0
    largest = max(float(exact.abs().max()), added)
    if not largest < float("inf"):
        raise ValueError("a matrix with NaN or infinities has no factor")
    while True:
        damped = exact.clone()
        damped.diagonal().add_(added)
        factor, info = _linalg.cholesky_ex(damped)
        # Diagonally dominant: nothing can be missing.
        if not int(info) or added > len(exact) * largest:
            return factor
        added *= RAISE
