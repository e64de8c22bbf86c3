"""Errors at several ranks from one SVD: against the formulas in float64, and against layers that were solved."""

from __future__ import annotations

import pytest
import torch

from bittern.errors import UserError
from bittern.scheme import Scheme
from bittern.solvers import SolverOptions, foresee, solve

N, K = 48, 64
RANKS = (0, 4, 16, 40)


def decaying(n: int, k: int, seed: int) -> torch.Tensor:
    """A weight whose singular values fall."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(n, k, generator=generator), full_matrices=False)
    return u @ torch.diag(0.9 ** torch.arange(min(n, k))) @ vt


@pytest.mark.parametrize("smoothing", ["none", "span"])
def test_without_data_it_is_near_what_solving_leaves(smoothing: str) -> None:
    """16-bit activations and white inputs: the error is that of the weights."""
    weights = [decaying(N, K, 4), 10 * decaying(2 * N, K, 5)]
    options = SolverOptions(smoothing=smoothing, svd_oversample=64, smoothing_exponent=0.3)  # type: ignore[arg-type]
    found = foresee(weights, Scheme(smooth=smoothing != "none"), options, (K,), RANKS, 0, ["a", "b"])
    for rank, foreseen in zip(RANKS[:3], found[:3], strict=True):
        scheme = Scheme(rank=rank, smooth=smoothing != "none")
        real = 0.0
        for weight, solution in zip(weights, solve(weights, scheme, options, (K,), 0), strict=True):
            missed = solution.reconstruct() - weight
            real += weight.numel() * float(missed.square().sum() / weight.square().sum())
        assert 0.4 < real / foreseen < 1.15, (rank, real, foreseen)
    assert found == sorted(found, reverse=True)


def test_rounded_activations_add_their_share() -> None:
    weight = decaying(N, K, 6)
    options = SolverOptions(svd_oversample=64)
    of = {bits: foresee([weight], Scheme(activations=bits), options, (K,), RANKS, 0, ["w"]) for bits in (4, 8, 16)}
    assert all(a > b > c for a, b, c in zip(of[4], of[8], of[16], strict=True))
    # Gaussian rows in groups of 64 miss .0935 of themselves in 4 bits (20.58 dB). In 8 bits they miss a step's
    # 12th, squared, and the largest of 64 is 2.6 large.
    assert (of[4][0] - of[16][0]) / weight.numel() == pytest.approx(0.0935**2, rel=0.15)
    assert (of[8][0] - of[16][0]) / weight.numel() == pytest.approx((2.6 / 127) ** 2 / 12, rel=0.1)


def test_weights_of_zeros_and_bad_ones() -> None:
    zeros = torch.zeros(N, K)
    assert foresee([zeros], Scheme(), SolverOptions(), (K,), RANKS, 0, ["w"]) == [0.0] * len(RANKS)
    zeros[0, 0] = torch.nan
    with pytest.raises(UserError, match="w holds 1 values that are NaN"):
        foresee([zeros], Scheme(), SolverOptions(), (K,), RANKS, 0, ["w"])
