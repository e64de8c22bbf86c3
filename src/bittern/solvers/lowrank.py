"""The best low-rank approximation, by a randomised SVD that repeats itself exactly.

Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1: multiply by a random
matrix, sharpen with a few power iterations, solve the small problem. Six times faster than the full SVD for a
whole FLUX and no worse in the image (SVDQuant's own measurement).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

# torch.linalg has no type stubs.
_linalg = cast(Any, torch.linalg)


@dataclass(frozen=True)
class LowRank:
    """matrix ~ up @ down, each carrying the square root of the singular values.

    Attributes:
        up: [n, r]
        down: [r, k]
        basis: [k, q] right singular vectors with the oversampled ones: where a later call may start.
    """

    up: Float[Tensor, "n r"]
    down: Float[Tensor, "r k"]
    basis: Float[Tensor, "k q"]


def low_rank(matrix: Float[Tensor, "n k"], rank: int, start: Float[Tensor, "k q"], iterations: int) -> LowRank:
    """The first `rank` singular components of a float32 matrix.

    Args:
        matrix: [n, k]
        rank: Components wanted; where the matrix has fewer, the others are zero.
        start: [k, q] directions to start from, such as `random_start` or the `basis` of a similar matrix.
        iterations: Power iterations; each reads the matrix twice.
    """
    basis = start
    for _ in range(iterations):
        basis = _orthonormal(matrix.T @ _orthonormal(matrix @ basis))
    left = _orthonormal(matrix @ basis)
    u, values, vt = _linalg.svd(left.T @ matrix, full_matrices=False)
    # Singular vectors are defined up to a sign: the largest entry of each right one is made positive.
    largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    roots = values[:rank].sqrt()
    up = left @ (u[:, :rank] * (signs[:rank, 0] * roots))
    down = vt[:rank] * (signs[:rank] * roots[:, None])
    missing = rank - down.shape[0]
    if missing > 0:
        up, down = torch.nn.functional.pad(up, (0, missing)), torch.nn.functional.pad(down, (0, 0, 0, missing))
    return LowRank(up, down, vt.T)


def random_start(k: int, columns: int, seed: int, device: torch.device) -> Float[Tensor, "k q"]:
    """Gaussian directions that depend on the seed alone: drawn on the CPU, apart from torch's global state."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(k, columns, generator=generator).to(device)


def _orthonormal(columns: Float[Tensor, "rows q"]) -> Float[Tensor, "rows q"]:
    return _linalg.qr(columns).Q
