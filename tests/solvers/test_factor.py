"""Cholesky factors of matrices that rounding has taken the definiteness of."""

from __future__ import annotations

import pytest
import torch

from bittern.solvers.factor import damped_factor


def test_a_definite_matrix_gets_the_damping_asked_for() -> None:
    rows = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    gram = rows.T @ rows
    factor = damped_factor(gram, 0.01)
    wanted = gram.double() + 0.01 * float(gram.double().diagonal().mean()) * torch.eye(24, dtype=torch.float64)
    assert factor.dtype == torch.float64
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T, wanted, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("off", [1e-4, 1e-2, 1.0, 100.0])
def test_a_matrix_that_lost_its_definiteness_gets_little_more_than_it_lacks(off: float) -> None:
    rows = torch.randn(8, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = rows.T @ rows
    lacking = off * float(gram.diagonal().mean())
    factor = damped_factor(gram - lacking * torch.eye(24, dtype=torch.float64), 1e-6)
    added = factor @ factor.T - (gram - lacking * torch.eye(24, dtype=torch.float64))
    assert torch.allclose(added, added.diagonal().mean() * torch.eye(24, dtype=torch.float64), atol=1e-9 * (1 + off))
    assert lacking <= float(added.diagonal().mean()) <= 10.1 * lacking


def test_zeros_count_as_ones_and_a_floor_holds() -> None:
    assert torch.equal(damped_factor(torch.zeros(4, 4), 0.01), torch.eye(4, dtype=torch.float64))
    factor = damped_factor(torch.zeros(4, 4), 0.01, floor=4.0)
    torch.testing.assert_close(factor, 0.2 * torch.eye(4, dtype=torch.float64))


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        damped_factor(torch.full((2, 2), float("nan")), 0.01)
