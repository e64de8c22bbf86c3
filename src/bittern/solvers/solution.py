"""What a solver hands to a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bittern.formats import KLayout, decode

Stages = dict[str, float]
"""Relative output error after each of a solver's stages, in their order."""


@dataclass(frozen=True)
class Solution:
    """One weight as codes, scales and branch; dtypes are the stored ones.

    Attributes:
        codes: [n, padded_k]
        scales: [n, groups]; int4 scales may be negative.
        smooth: [k] or None; one tensor for all members of a group.
        down: [r, k] or None; one tensor for all members of a group. It reads the raw input.
        up: [n, r] or None.
        layout: Segments, groups and padding of K.
        bias: [n] in float32, what to add to the layer's bias; None for nothing.
    """

    codes: Int8[Tensor, "n padded_k"]
    scales: Float[Tensor, "n groups"]
    smooth: Float[Tensor, " k"] | None
    down: Float[Tensor, "r k"] | None
    up: Float[Tensor, "n r"] | None
    layout: KLayout
    bias: Float[Tensor, " n"] | None = None

    def reconstruct(self) -> Float[Tensor, "n k"]:
        """The float32 weight that the layer applies to its input: What / s + U D."""
        weight = decode(self.codes, self.scales, self.layout)
        if self.smooth is not None:
            weight /= self.smooth.float()
        if self.down is not None and self.up is not None:
            weight.addmm_(self.up.float(), self.down.float())
        return weight


def relative_error(weight: Float[Tensor, "n k"], solution: Solution) -> float:
    """Frobenius norm of what the solution misses of the weight, over the weight's; 0 for a weight of zeros."""
    missed = frobenius(solution.reconstruct().sub_(weight))
    return missed / frobenius(weight) if missed else 0.0


def frobenius(matrix: Float[Tensor, "n k"]) -> float:
    """Square root of the sum of squares, summed in float64: 1e30 squared fits."""
    return float(cast(Any, torch.linalg).vector_norm(matrix, dtype=torch.float64))
