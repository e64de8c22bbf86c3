"""Low-rank branches that lower the error of the output, in closed form.

With the codes' rounding still to come, an error D of the smoothed weight W diag(s) costs tr(G D M D^T), where
M [k, k] says how much inputs matter and G [n, n] how much outputs do. For M = A A^T and G = C C^T (Cholesky) that is
|C^T D A|^2, and by Eckart and Young the branch of rank r that costs least is C^-T SVD_r(C^T W diag(s) A) A^-1. Plain
SVD is M = G = 1.

What M should be: the branch hands its complement, the residual, to two noises. Rounding the inputs by e = u - Qa(u)
costs tr(R E[e e^T] R^T), and rounding the residual itself costs in proportion to its size, times the inputs' power.
So M = E[e e^T] + share * diag(E[Qa(u)^2]); `WEIGHT_SHARE` was measured on tiny-flux.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.formats import round_to
from bittern.solvers.factor import damped_factor
from bittern.solvers.lowrank import LowRank, low_rank

WEIGHT_SHARE = 0.003
"""Squared rounding error of a weight, over its square, times what GPTQ leaves of it."""

OUTPUT_DAMPING = 0.01
"""Share of the mean diagonal of G that is added to it."""

_linalg = cast(Any, torch.linalg)


def input_weight(u: Float[Tensor, "m k"], rounded: Float[Tensor, "m k"]) -> Float[Tensor, "k k"]:
    """M of the module's docstring from inputs and their rounding."""
    error = u - rounded
    weight = error.T @ error
    weight.diagonal().add_(WEIGHT_SHARE * rounded.square().sum(dim=0))
    return weight / len(u)


class Metric:
    """G of layers that share an input: one block each, as its Cholesky factor C in float64.

    Layers are weighed against each other as their G say.
    """

    def __init__(self, matrices: Sequence[Float[Tensor, "n n"]]) -> None:
        total = sum(float(matrix.diagonal().double().sum()) for matrix in matrices)
        mean = total / sum(len(matrix) for matrix in matrices)
        self.factors: list[Tensor] = []
        for matrix in matrices:
            felt = matrix.double() / mean if mean > 0 else torch.eye(len(matrix), device=matrix.device)
            # A layer that the output does not feel at all still gets codes.
            self.factors.append(damped_factor(felt, OUTPUT_DAMPING, floor=1e-6))
        self._transposed = [factor.T.float() for factor in self.factors]

    def left(self, rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """C^T rows."""
        return torch.cat([factor @ part for factor, part in zip(self._transposed, self._split(rows), strict=True)])

    def unleft(self, rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """C^-T rows."""
        parts = zip(self.factors, self._split(rows), strict=True)
        solved = [_linalg.solve_triangular(factor.T, part.double(), upper=True) for factor, part in parts]
        return torch.cat(solved).to(rows.dtype)

    def powers(self) -> Float[Tensor, " n"]:
        """The diagonal of G: how much each output is felt, in float32."""
        return torch.cat([factor.square().sum(dim=1) for factor in self.factors]).float()

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows, [len(factor) for factor in self.factors])


def weighted_low_rank(
    target: Float[Tensor, "n k"],
    weight: Float[Tensor, "k k"],
    metric: Metric | None,
    rank: int,
    start: Float[Tensor, "k q"],
    iterations: int,
) -> LowRank:
    """The factors of least weighted distance from `target`; see the module's docstring.

    Args:
        target: [n, k] in float32.
        weight: M, positive definite up to rounding.
        metric: G; None for 1.
        rank: Of the branch.
        start: Directions in which the randomised SVD starts.
        iterations: Its power iterations.
    """
    factor = input_factor(weight)
    whitened = (target if metric is None else metric.left(target)) @ factor.float()
    found = low_rank(whitened, rank, start, iterations)
    up = found.up if metric is None else metric.unleft(found.up)
    down = _linalg.solve_triangular(factor, found.down.double(), upper=False, left=False).float()
    return LowRank(up, down, found.basis)


def input_factor(weight: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """The lower Cholesky factor of M in float64, with as much on the diagonal as rounding may have taken."""
    return damped_factor(weight, 1e-6)


def stored(
    up: Float[Tensor, "n r"], down: Float[Tensor, "r k"], dtype: torch.dtype
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "r k"]]:
    """Factors in their stored type, each component's size shared evenly between the two."""
    tiny = torch.finfo(torch.float32).tiny
    sizes: list[Tensor] = [_linalg.vector_norm(down, dim=1), _linalg.vector_norm(up, dim=0).clamp(min=tiny)]
    ratio = (sizes[0] / sizes[1]).sqrt()
    ratio = torch.where(ratio > 0, ratio, 1.0)
    return round_to(up * ratio, dtype), round_to(down / ratio[:, None], dtype)


def refitted(
    target: Float[Tensor, "n k"],
    coded: Float[Tensor, "n k"],
    u: Float[Tensor, "m k"],
    rounded: Float[Tensor, "m k"],
    metric: Metric | None,
    rank: int,
    start: Float[Tensor, "k q"],
    iterations: int,
) -> LowRank:
    """The branch that, the codes being fixed, leaves the least output error: reduced-rank regression.

    The output misses Z = u T^T - Qa(u) What^T. Regressed on u without a limit of rank it gives
    B = (T (u^T u) - What (Qa(u)^T u)) (u^T u)^-1, and the best B of rank r is weighted by u^T u (Izenman 1975): a
    weighted SVD of B. A damping of 0.001 of the mean diagonal keeps directions out that no row shows.
    """
    gram = (u.T @ u).double()
    missed = gram @ target.double().T - (u.T @ rounded).double() @ coded.double().T
    gram.diagonal().add_(1e-3 * max(float(gram.diagonal().mean()), 1e-30))
    regression = _linalg.solve(gram, missed).T.float()
    return weighted_low_rank(regression, gram.float(), metric, rank, start, iterations)
