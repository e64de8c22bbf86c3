"""Ternary codes and scales of least output error, in closed-form or exact steps on the Gram matrix of the inputs.

With H = X^T X of a layer's inputs, a weight W [n, k] that is replaced by What misses of its outputs

    E = tr((W - What) H (W - What)^T) = sum over rows i of  d_i H d_i^T,      d_i = w_i - what_i,

and so every row is a problem by itself: codes t_i in {-1, 0, 1}^k, and a scale for each group. Three steps lower E:

    compensated   codes given scales: GPTQ's error feedback on the grid                  (gptq.py)
    fitted        scales given codes: what_i = a_i B_i with one row of B a group, so that E is quadratic in the scales
                  a_i, and (B_i H B_i^T) a_i = B_i H w_i gives the best ones
    descended     codes given scales, one at a time: all others fixed, E is a parabola in what_ij with its vertex at
                  what_ij + (d_i H)_j / H_jj, and the code nearest to it is the best one (coordinate descent, as
                  QuantEase: Behdin et al. 2023, arXiv:2309.01885)

and a fourth, for layers with smoothing, whose effective weight is What diag(1 / s):

    columns       1 / s given codes and scales, of all rows at once: with c = 1 / s
                  ((What^T What) * H) c = diag(What^T W H), elementwise product
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from bittern.formats import KLayout, round_to, ternary

BLOCK = 128
"""Columns whose changes reach the others in one product."""

SOLVED = 2**24
"""Numbers of the systems of equations for scales that are held at a time."""

RIDGE = 1e-3
"""How strongly columns hold on to their old scale, as a share of what their weights say of it."""

REACH = 8.0
"""A column's scale changes at most by this factor at a time."""

_linalg = cast(Any, torch.linalg)


def output_errors(missed: Float[Tensor, "n k"], gram: Float[Tensor, "k k"]) -> Float64[Tensor, " n"]:
    """The squared output error of each row, d H d^T, summed in float64."""
    return ((missed @ gram) * missed).sum(dim=1, dtype=torch.float64).clamp(min=0)


def steps_of(scales: Float[Tensor, "n groups"], layout: KLayout) -> Float[Tensor, "n k"]:
    """The scale of each weight, in float32."""
    return layout.unpad(layout.expand_scales(scales.float()))


def fitted(
    target: Float[Tensor, "n k"],
    gram: Float[Tensor, "k k"],
    codes: Float[Tensor, "n k"],
    scales: Float[Tensor, "n groups"],
    layout: KLayout,
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n groups"]]:
    """Codes with the scales of least output error, rounded to their stored type; see the module's docstring.

    Scales come out positive: a group whose best one is negative has its codes turned round. A group without codes keeps
    its scale.

    Args:
        target: [n, k] in float32.
        gram: H, positive definite.
        codes: [n, k]
        scales: What the groups have so far, in their stored type.
        layout: Segments and groups of K.
    """
    members = _members(layout, codes.device)
    wanted = ((target @ gram) * codes).double() @ members.double()
    found = torch.empty_like(wanted)
    block = max(1, SOLVED // layout.num_groups**2)
    for start in range(0, len(codes), block):
        rows = slice(start, start + block)
        part = codes[rows]
        system = torch.stack(
            [((part[:, chosen] @ gram[chosen]) * part) @ members for chosen in members.bool().T], dim=1
        ).double()
        empty = system.diagonal(dim1=1, dim2=2) <= 0
        # Rounding may take the last of a system that says nothing of some combination of scales.
        ridge = system.diagonal(dim1=1, dim2=2) * 1e-6
        system += torch.diag_embed(torch.where(empty, 1.0, ridge))
        best = _linalg.solve(system, wanted[rows])
        found[rows] = torch.where(empty, scales[rows].double(), best)
    turned = torch.where(found < 0, -1.0, 1.0)
    # Powers of two apart, float64 has room for what the stored type has none for.
    new = round_to(found.abs().float(), scales.dtype)
    return codes * steps_of(turned, layout), new


def descended(
    target: Float[Tensor, "n k"],
    gram: Float[Tensor, "k k"],
    codes: Float[Tensor, "n k"],
    steps: Float[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """Codes after each has been set to its best value once, the others given, in the order of falling H_jj.

    Args:
        target: [n, k] in float32.
        gram: H, with a positive diagonal.
        codes: [n, k]
        steps: The scale of each weight.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    slope = (target - codes * steps) @ gram
    inverse = torch.where(steps == 0, 0.0, steps.reciprocal())
    codes = codes.clone()
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        near = gram[block][:, block]
        local, old, step = slope[:, block], codes[:, block], steps[:, block]
        # In units of a code: where the vertex is, beside the code that is there.
        reach = inverse[:, block] / near.diagonal()
        changes = torch.zeros_like(local)
        for j in range(len(block)):
            code = ternary.on_grid(old[:, j] + local[:, j] * reach[:, j])
            change = (code - old[:, j]) * step[:, j]
            codes[:, block[j]] = code
            changes[:, j] = change
            local.addr_(change, near[j], alpha=-1)
        slope.addmm_(changes, gram[block], alpha=-1)
    return codes


def columns(
    weight: Float[Tensor, "n k"],
    gram: Float[Tensor, "k k"],
    coded: Float[Tensor, "n k"],
    smooth: Float[Tensor, " k"],
) -> Float[Tensor, " k"]:
    """The smoothing of least output error for codes and scales that are given, in float32.

    Args:
        weight: [n, k], what the effective weight coded / s is to be.
        gram: H of the inputs as they come, not smoothed.
        coded: What, codes times scales.
        smooth: The smoothing so far, which a column keeps that has no codes.
    """
    old = smooth.double().reciprocal()
    system = (coded.T @ coded).double() * gram.double()
    hold = system.diagonal() * RIDGE
    hold = torch.where(hold > 0, hold, 1.0)
    wanted = (coded * (weight @ gram)).sum(dim=0, dtype=torch.float64) + hold * old
    system.diagonal().add_(hold)
    best = _linalg.solve(system, wanted)
    return torch.maximum(torch.minimum(best, old * REACH), old / REACH).reciprocal().float()


def _members(layout: KLayout, device: torch.device) -> Float[Tensor, "k groups"]:
    """1 where an input belongs to a group."""
    groups = torch.arange(layout.num_groups, dtype=torch.float32, device=device)
    owner = layout.unpad(layout.expand_scales(groups[None]))[0]
    return (owner[:, None] == groups).float()
