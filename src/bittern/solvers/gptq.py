"""GPTQ: codes that answer for each other's rounding errors.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization" (2022, arXiv:2210.17323). Columns are
rounded one after another; each one's error is made good, as well as the inputs' correlation allows, by the columns
that are not rounded yet. With H = X^T X the squared output error is tr((W - What) H (W - What)^T).

Choices: columns in the order of falling H_jj (act-order); scales of all groups fixed beforehand, so that the order
does not matter to the format (static groups); H damped by a share of its mean diagonal; blocks of columns, whose
errors reach the columns behind the block in one product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor

from bittern.formats import KLayout, Rule, encode, int4
from bittern.solvers.factor import damped_factor

BLOCK = 128

_linalg = cast(Any, torch.linalg)


def gptq(
    weight: Float[Tensor, "n {layout.k}"],
    hessian: Float[Tensor, "{layout.k} {layout.k}"],
    layout: KLayout,
    rule: Rule,
    scale_dtype: torch.dtype,
    damping: float = 0.01,
    on_grid: Callable[[Tensor], Tensor] = int4.on_grid,
) -> tuple[Int8[Tensor, "n {layout.padded_k}"], Float[Tensor, "n {layout.num_groups}"]]:
    """Codes and scales of a float32 weight.

    Args:
        weight: [n, k], finite.
        hessian: X^T X of the inputs as the layer will see them, up to a factor.
        layout: Segments and groups of K.
        rule: How each group gets its scale; the codes it would choose are not used.
        scale_dtype: Stored type of the scales.
        damping: Share of the mean diagonal of the Hessian that is added to it.
        on_grid: Gives the code nearest to each number.
    """
    _, scales = encode(weight, layout, rule, scale_dtype)
    order, factor = ordered_factor(hessian, damping)
    steps = layout.unpad(layout.expand_scales(scales.float()))
    return layout.pad(compensated(weight, steps, order, factor, on_grid).to(torch.int8)), scales


def ordered_factor(hessian: Float[Tensor, "k k"], damping: float) -> tuple[Int64[Tensor, " k"], Float[Tensor, "k k"]]:
    """The columns in the order of falling H_jj, and the triangular factor of the inverse of the Hessian so ordered."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return order, _inverse_factor(hessian[order][:, order], damping)


def compensated(
    weight: Float[Tensor, "n k"],
    steps: Float[Tensor, "n k"],
    order: Int64[Tensor, " k"],
    factor: Float[Tensor, "k k"],
    on_grid: Callable[[Tensor], Tensor],
) -> Float[Tensor, "n k"]:
    """The codes of GPTQ for scales that are given.

    Args:
        weight: [n, k] in float32.
        steps: The scale of each weight.
        order: Of the columns: `ordered_factor`'s.
        factor: Of the inverse Hessian: `ordered_factor`'s.
        on_grid: Gives the code nearest to each number.
    """
    k = weight.shape[1]
    steps = steps[:, order]
    # A group of zeros has scale 0, and code 0.
    inverse = torch.where(steps == 0, 0.0, steps.reciprocal())
    rest = weight[:, order]
    chosen = torch.empty_like(rest)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.empty_like(rest[:, start:stop])
        for column in range(start, stop):
            value = rest[:, column]
            code = on_grid(value * inverse[:, column])
            chosen[:, column] = code
            error = (value - code * steps[:, column]) / factor[column, column]
            rest[:, column + 1 : stop].addr_(error, factor[column, column + 1 : stop], alpha=-1)
            errors[:, column - start] = error
        rest[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    codes = torch.empty_like(chosen)
    codes[:, order] = chosen
    return codes


def _inverse_factor(hessian: Float[Tensor, "k k"], damping: float) -> Float[Tensor, "k k"]:
    """The upper triangular U with U^T U = (H + damping)^-1, in float32; computed in float64."""
    # Inputs that are always zero: every code is as good as another, and the nearest one is natural.
    inverse = torch.cholesky_inverse(damped_factor(hessian, damping))
    return _linalg.cholesky(inverse, upper=True).float()
