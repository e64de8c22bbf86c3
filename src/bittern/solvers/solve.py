"""Weights that share an input -> codes, scales, smoothing and a joint low-rank branch, without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bittern.errors import UserError
from bittern.formats import KLayout, decode, dtype_of, encode, round_to
from bittern.precision import exact_products
from bittern.scheme import Scheme
from bittern.solvers.lowrank import low_rank, random_start
from bittern.solvers.options import SolverOptions
from bittern.solvers.smooth import span_smoothing
from bittern.solvers.solution import Solution, frobenius
from bittern.threads import one_thread

LARGEST = 1e30
"""Weights beyond this would overflow float32 in the products of the SVD."""

SMALL = 2**22
"""Weights that one thread solves by itself; FLUX.1's layers have 2^23 and more."""


@dataclass(frozen=True)
class _Round:
    error: float
    codes: Int8[Tensor, "n padded_k"]
    scales: Float[Tensor, "n groups"]
    down: Float[Tensor, "r k"] | None
    up: Float[Tensor, "n r"] | None


def solve(
    weights: Sequence[Tensor],
    scheme: Scheme,
    options: SolverOptions,
    segments: Sequence[int],
    seed: int,
    names: Sequence[str] | None = None,
    magnitudes: Float[Tensor, " k"] | None = None,
) -> list[Solution]:
    """Quantizes the weights of layers that read one input.

    With s the smoothing, the residual W diag(s) - U D diag(s) is what the codes carry. Branch and residual are
    solved in turn: the branch takes the first singular components of what the codes miss, is rounded to its stored
    type, and only then do the codes take the rest, its rounding included. The rounds end when the error no longer
    falls, and the best round counts (SVDQuant, Li et al. 2024). The error is the Frobenius norm in the smoothed
    space, the output error for smoothed activations that are white.

    The members share `smooth` and `down` by solving their rows as one matrix. Segments share one branch over the
    concatenated input. Three float32 copies of the stacked weights are alive at once.

    Args:
        weights: [n_i, k] each, any float type, finite and at most 1e30.
        scheme: Formats, group, rank and stored types.
        options: How to solve.
        segments: Lengths of the K-segments; their sum is k.
        seed: The same seed gives the same result, whatever torch's global random state.
        names: What to call the weights in errors.
        magnitudes: How large the input's channels are, up to a common factor; smoothing "modulation" needs them.

    Returns:
        One solution a weight, in order.

    Raises:
        UserError: for weights that are not finite, not float or of the wrong shape, and for options that do not
            fit the scheme.
    """
    layout = scheme.layout(segments)
    check_weights(weights, layout, names or [f"weights[{i}]" for i in range(len(weights))])
    smooth = data_free_smoothing(weights, layout, scheme, options, magnitudes)
    target = torch.cat([weight.float() for weight in weights])
    if smooth is not None:
        target *= smooth.float()
    with one_thread(target.numel() <= SMALL), exact_products():
        best = _alternate(target, layout, scheme, options, smooth, seed)
    rows = [weight.shape[0] for weight in weights]
    ups = [None] * len(rows) if best.up is None else torch.split(best.up, rows)
    parts = zip(torch.split(best.codes, rows), torch.split(best.scales, rows), ups, strict=True)
    return [Solution(codes, scales, smooth, best.down, up, layout) for codes, scales, up in parts]


def _alternate(
    target: Float[Tensor, "n k"],
    layout: KLayout,
    scheme: Scheme,
    options: SolverOptions,
    smooth: Float[Tensor, " k"] | None,
    seed: int,
) -> _Round:
    """The best of at most 1 + options.rounds rounds; target is the smoothed weight."""
    rule, scale_dtype = options.rule(scheme.weight), scheme.solved_scale_dtype
    if not scheme.rank:
        return _Round(0.0, *encode(target, layout, rule, scale_dtype), None, None)

    branch_dtype = dtype_of(scheme.branch_dtype)
    divisor = torch.ones_like(target[0]) if smooth is None else smooth.float()
    columns = min(scheme.rank + options.svd_oversample, *target.shape)
    basis, iterations = random_start(layout.k, columns, seed, target.device), options.svd_iterations
    best, missed = None, target
    for _ in range(1 + options.rounds):
        branch = low_rank(missed, scheme.rank, basis, iterations)
        # The old basis is close to the new one, since only the codes' error has changed.
        basis, iterations = branch.basis, 1
        up, down = round_to(branch.up, branch_dtype), round_to(branch.down / divisor, branch_dtype)
        residual = torch.addmm(target, up.float(), down.float() * divisor, alpha=-1)
        codes, scales = encode(residual, layout, rule, scale_dtype)
        coded = decode(codes, scales, layout)
        error = frobenius(residual.sub_(coded))
        if best is not None and error >= best.error:
            break
        best = _Round(error, codes, scales, down, up)
        missed = torch.sub(target, coded, out=residual)
    assert best is not None
    return best


def data_free_smoothing(
    weights: Sequence[Float[Tensor, "_ k"]],
    layout: KLayout,
    scheme: Scheme,
    options: SolverOptions,
    magnitudes: Float[Tensor, " k"] | None,
) -> Float[Tensor, " k"] | None:
    """The smoothing that the options ask for; None for a scheme without.

    Raises:
        UserError: for options that do not fit the scheme, and for magnitudes that are not there.
    """
    if not scheme.smooth:
        return None
    if options.smoothing not in ("span", "modulation"):
        raise UserError(f"the scheme has smooth: true and the solver smoothing: {options.smoothing}; make them agree")
    dtype = dtype_of(scheme.branch_dtype)
    if options.smoothing == "span":
        return span_smoothing(weights, layout, options.smoothing_exponent, dtype)
    if magnitudes is None or magnitudes.shape != (layout.k,) or not bool(torch.isfinite(magnitudes).all()):
        raise UserError(f"smoothing {options.smoothing}: expected finite magnitudes of {layout.k} inputs; give them")
    exponents = options.smoothing_exponent, options.activation_exponent
    return span_smoothing(weights, layout, exponents[0], dtype, magnitudes, exponents[1])


def check_weights(weights: Sequence[Tensor], layout: KLayout, names: Sequence[str]) -> None:
    """Refuses weights that no solver could take.

    Raises:
        UserError: for a wrong shape or type, NaN, infinities and numbers beyond `LARGEST`.
    """
    if not weights:
        raise UserError("no weights to solve: expected at least one")
    for weight, name in zip(weights, names, strict=True):
        if weight.ndim != 2 or weight.shape[1] != layout.k or not weight.shape[0]:
            raise UserError(f"{name} has shape {tuple(weight.shape)}: expected [N, {layout.k}]")
        if not weight.is_floating_point():
            raise UserError(f"{name} has dtype {weight.dtype}: expected a float type")
        # NaN compares false, so it is counted too.
        bad = weight.numel() - int((weight.abs() <= LARGEST).sum())
        if bad:
            raise UserError(f"{name} holds {bad} values that are NaN, infinite or beyond {LARGEST:g}; mend the weights")
