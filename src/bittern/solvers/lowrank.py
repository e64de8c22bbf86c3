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

from bittern.solvers.factor import damped_factor

_NOTHING = 1e-15
"""Share of the mean diagonal that keeps a Cholesky factor from failing, and changes nothing else."""

_LEAST = 1e-7
"""Singular values below this share of the largest are rounding, and count as zeros."""

# torch.linalg has no type stubs.
_linalg = cast(Any, torch.linalg)


@dataclass(frozen=True)
class LowRank:
    """matrix ~ up @ down, each carrying the square root of the singular values.

    Attributes:
        up: [n, r]
        down: [r, k]
        basis: [k, q] orthonormal, spanning the right singular vectors with the oversampled ones: where a later call may
            start.
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
    left = _orthonormal(_orthonormal(matrix @ basis))
    u, values, vt = _thin_svd(left.T @ matrix)
    # Singular vectors are defined up to a sign: the largest entry of each right one is made positive.
    largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    roots = values[:rank].sqrt()
    up = left @ (u[:, :rank] * (signs[:rank, 0] * roots))
    down = vt[:rank] * (signs[:rank] * roots[:, None])
    missing = rank - down.shape[0]
    if missing > 0:
        up, down = torch.nn.functional.pad(up, (0, missing)), torch.nn.functional.pad(down, (0, 0, 0, missing))
    return LowRank(up, down, _orthonormal(matrix.T @ left))


def random_start(k: int, columns: int, seed: int, device: torch.device) -> Float[Tensor, "k q"]:
    """Gaussian directions that depend on the seed alone: drawn on the CPU, apart from torch's global state."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(k, columns, generator=generator).to(device)


def _orthonormal(columns: Float[Tensor, "rows q"]) -> Float[Tensor, "rows q"]:
    # Cholesky QR; done twice it is as exact as Householder's, which on a GPU takes longer than a layer's products.
    wide = columns.double()
    return _linalg.solve_triangular(damped_factor(wide.T @ wide, _NOTHING), wide.T, upper=False).T.float()


def _thin_svd(matrix: Float[Tensor, "q k"]) -> tuple[Float[Tensor, "q q"], Float[Tensor, " q"], Float[Tensor, "q k"]]:
    """Singular components of a wide matrix of few rows, from the eigenvectors of its square in float64."""
    wide = matrix.double()
    # So few numbers are done on the CPU before a GPU has begun.
    squares, vectors = _linalg.eigh((wide @ wide.T).cpu())
    values = squares.clamp(min=0).sqrt().flip(0)
    u = vectors.flip(1)
    there = values > _LEAST * values[:1]
    inverse = torch.where(there, values, 1.0).reciprocal() * there
    values, u, inverse = (part.to(matrix.device) for part in (values * there, u, inverse))
    vt = inverse[:, None] * (u.T @ wide)
    return u.float(), values.float(), vt.float()


def recompress(
    up: Float[Tensor, "n q"], down: Float[Tensor, "q k"], rank: int
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "r k"], float]:
    """The best product of a lower rank in place of up @ down, which is never written.

    The factors' orthonormal bases are set aside; what is left between them is small, and has the same singular values
    (Golub, Van Loan, "Matrix Computations", 4th edition, 2013, 8.6).

    Args:
        up: [n, q]
        down: [q, k]
        rank: Components that are kept, at most as many as there are.

    Returns:
        up [n, r] and down [r, k], each carrying the square root of the singular values, and what is lost of
        |up @ down|^2, as a share of it.
    """
    left, r_left = _linalg.qr(up.float())
    right, r_right = _linalg.qr(down.float().T)
    u, values, vt = _linalg.svd(r_left @ r_right.T, full_matrices=False)
    squares = values.double().square()
    total = float(squares.sum())
    lost = float(squares[rank:].sum()) / total if total else 0.0
    roots = values[:rank].sqrt()
    return left @ (u[:, :rank] * roots), roots[:, None] * (vt[:rank] @ right.T), lost
