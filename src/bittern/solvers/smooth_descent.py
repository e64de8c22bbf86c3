"""The smoothing vector by gradient descent on the expected output error.

Of two roundings s moves error from one to the other, for every input j by itself, while SVDQuant's candidates have two
exponents for all. With R = W - U D what the branch leaves, and u = x / s,

    L(s) = E |C^T R diag(s) e(s)|^2
         + share * sum_n d_n sum_g (max_{j in g} |R_nj s_j| / span)^2 / 12 * sum_{j in g} E[x_j^2] / s_j^2

e is the rounding error of the inputs: their step, amax / 8.25 of a group, times an offset in [-1/2, 1/2] that counts
as a constant of the moment (straight through; for steps as in Esser et al. 2019, arXiv:1902.08153), so that the
gradient goes by the steps. The second term is uniform noise of the weights' steps, of which GPTQ leaves `share`; d is
the diagonal of G = C C^T (see weighted.py). The branch is solved again from time to time. Adam, on log s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.formats import KLayout, round_to
from bittern.ops.reference import RANGES, SPANS
from bittern.scheme import ACTIVATION_GROUP, Scheme

STEPS = 60
RATE = 0.02
RENEW = 20
"""Steps after which the branch is solved again."""

SHARE = 0.5
"""What GPTQ leaves of the squared rounding error of weights."""

SPAN = 7.5
"""Steps between 0 and the largest weight of a group."""

_SLOW, _FAST = 0.95, 0.9
_TINY = 1e-30

Residual = Callable[[Float[Tensor, " k"]], tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]]
"""For a smoothing, what the branch solved for it leaves of the raw weight: R, and C^T R."""


def descend(
    start: Float[Tensor, " k"],
    rows: Float[Tensor, "m k"],
    powers: Float[Tensor, " n"] | None,
    residual: Residual,
    layout: KLayout,
    scheme: Scheme,
    dtype: torch.dtype,
) -> Float[Tensor, " k"]:
    """The smoothing after `STEPS` steps, rounded to its stored type.

    Args:
        start: Where to begin; positive.
        rows: Sample of the input.
        powers: d, how much each output is felt; None for ones.
        residual: Solves the branch for a smoothing.
        layout: Segments and weight groups of K.
        scheme: Gives activations and shifts.
        dtype: Stored type.
    """
    x = rows.float()
    power = x.square().mean(dim=0)
    logs = start.float().log()
    first, second = torch.zeros_like(logs), torch.zeros_like(logs)
    rest = felt = x[:0]
    for step in range(STEPS):
        if step % RENEW == 0:
            rest, felt = residual(logs.exp())
        leaf = logs.clone().requires_grad_()
        with torch.enable_grad():
            smooth = leaf.exp()
            error = rounding_error(x, smooth, layout, scheme)
            loss = (error @ (felt * smooth).T).square().sum() / len(x)
            loss = loss + SHARE * _weight_noise(rest * smooth, power / smooth.square(), powers, layout)
            (gradient,) = torch.autograd.grad(loss, leaf)
        gradient = gradient / loss.detach().clamp(min=_TINY)
        first = _FAST * first + (1 - _FAST) * gradient
        second = _SLOW * second + (1 - _SLOW) * gradient.square()
        rate = RATE / (1 - _FAST ** (step + 1))
        logs = logs - rate * first / ((second / (1 - _SLOW ** (step + 1))).sqrt() + 1e-8)
    return round_to(logs.exp(), dtype)


def rounding_error(
    x: Float[Tensor, "m k"], smooth: Float[Tensor, " k"], layout: KLayout, scheme: Scheme
) -> Float[Tensor, "m k"]:
    """What rounding takes from the inputs, u - Qa(u), differentiable in the steps."""
    if scheme.activations == 16:
        return torch.zeros_like(x) * smooth
    errors: list[Tensor] = []
    shifts: Sequence[float] = scheme.shift if scheme.activations == 4 else ()
    for segment, shift in zip(layout, shifts or (0.0,) * len(layout.segments), strict=True):
        values = (x[:, segment.logical] + shift) / smooth[segment.logical]
        m, k = values.shape
        size = ACTIVATION_GROUP if scheme.activations == 4 else k
        groups = torch.nn.functional.pad(values, (0, -k % size)).view(m, -1, size)
        peak = groups.amax(dim=-1, keepdim=True) if shift else groups.abs().amax(dim=-1, keepdim=True)
        format = "int8" if scheme.activations == 8 else "uint4" if shift else "int4"
        steps = (peak / SPANS[format]).clamp(min=torch.finfo(torch.float32).tiny)
        if format == "int4":
            steps = torch.where(groups.amax(dim=-1, keepdim=True) > -groups.amin(dim=-1, keepdim=True), -steps, steps)
        codes = (groups / steps).detach()
        rounded = codes.round().clamp(*RANGES[format])
        errors.append(((codes - rounded) * steps).flatten(1)[:, :k])
    return torch.cat(errors, dim=1)


def _weight_noise(
    weight: Float[Tensor, "n k"],
    power: Float[Tensor, " k"],
    powers: Float[Tensor, " n"] | None,
    layout: KLayout,
) -> Tensor:
    total = weight.new_zeros(())
    wide, inputs = layout.pad(weight), layout.pad(power)
    for segment in layout:
        steps = wide[:, segment.padded].reshape(len(weight), -1, segment.size).abs().amax(dim=-1) / SPAN
        noise = (steps.square() / 12) @ inputs[segment.padded].view(-1, segment.size).sum(dim=-1)
        total = total + (noise if powers is None else noise * powers).sum()
    return total
