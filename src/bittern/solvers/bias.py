"""What a few-bit layer's outputs lack on average, which its bias can give back.

Rounding moves the mean of an output: the codes' error meets inputs whose mean is not zero, and activations without a
sign are rounded towards one side. For inputs x with the mean m, and Qa(x / s) with the mean q, the mean of

    x W^T - (Qa(x / s) What^T + x (U D)^T)   is   m (W - U D)^T - q What^T,

two products with vectors. It is added to the bias: empirical bias correction (Nagel et al. 2019, arXiv:1906.04721).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.formats import decode
from bittern.precision import exact_products
from bittern.scheme import Scheme
from bittern.solvers.inputs import rounded
from bittern.solvers.solution import Solution
from bittern.solvers.solve import SMALL
from bittern.threads import one_thread


@torch.no_grad()
def mean_error(
    weight: Float[Tensor, "n k"], solution: Solution, rows: Float[Tensor, "m k"], scheme: Scheme
) -> Float[Tensor, " n"]:
    """The mean over inputs of the output of a weight less that of its solution, in float32.

    Args:
        weight: Any float type.
        solution: What stands in for it.
        rows: Inputs, at least one.
        scheme: The activations of the solution.
    """
    with one_thread(weight.numel() <= SMALL), exact_products():
        plain = _mean(rows)
        rest = weight.float()
        if solution.up is not None and solution.down is not None:
            rest = torch.addmm(rest, solution.up.float(), solution.down.float(), alpha=-1)
        met = _mean(rounded(rows, solution.smooth, solution.layout, scheme))
        return rest @ plain - decode(solution.codes, solution.scales, solution.layout) @ met


def _mean(rows: Float[Tensor, "m k"]) -> Float[Tensor, " k"]:
    return rows.mean(dim=0, dtype=torch.float64).float()
