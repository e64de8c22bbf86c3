from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bittern.solvers.lowrank import low_rank, random_start, recompress

CPU = torch.device("cpu")


def decaying(n: int, k: int, seed: int, power: float = 1.0) -> torch.Tensor:
    """A matrix whose singular values fall like i^-power."""
    generator = torch.Generator().manual_seed(seed)
    r = min(n, k)
    u = torch.linalg.qr(torch.randn(n, r, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(k, r, generator=generator)).Q
    return (u * torch.arange(1.0, r + 1).pow(-power)) @ v.T


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 90), k=st.integers(1, 90), rank=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_close_to_the_best_of_that_rank_in_float64(n, k, rank, seed):
    matrix = decaying(n, k, seed)
    branch = low_rank(matrix, rank, random_start(k, min(rank + 10, n, k), seed, CPU), iterations=4)
    assert branch.up.shape == (n, rank)
    assert branch.down.shape == (rank, k)
    missed = (matrix.double() - branch.up.double() @ branch.down.double()).norm()
    values = torch.linalg.svdvals(matrix.double())
    best = values[rank:].square().sum().sqrt()
    assert missed <= best * 1.02 + 1e-5 * values[0]


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (300, 64)])
def test_a_matrix_of_that_rank_is_found_exactly(shape):
    matrix = decaying(*shape, seed=1)[:, :5] @ decaying(5, shape[1], seed=2)
    branch = low_rank(matrix, 8, random_start(shape[1], min(18, *shape), 0, CPU), iterations=2)
    assert torch.allclose(branch.up @ branch.down, matrix, atol=1e-5)


def test_missing_components_are_zero():
    branch = low_rank(decaying(3, 9, seed=0), 5, random_start(9, 3, 0, CPU), iterations=1)
    assert not branch.up[:, 3:].any()
    assert not branch.down[3:].any()
    assert branch.down[:3].any(dim=1).all()


def test_zeros_give_zeros():
    branch = low_rank(torch.zeros(20, 30), 4, random_start(30, 14, 0, CPU), iterations=4)
    assert not (branch.up @ branch.down).any()
    assert branch.up.isfinite().all()


def test_both_factors_carry_the_same_weight_and_a_fixed_sign():
    branch = low_rank(decaying(50, 60, seed=3), 6, random_start(60, 16, 0, CPU), iterations=4)
    assert torch.allclose(branch.up.norm(dim=0), branch.down.norm(dim=1), rtol=1e-4)
    largest = branch.down.gather(1, branch.down.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def test_the_start_depends_on_the_seed_alone():
    state = torch.random.get_rng_state()
    first = random_start(30, 5, 7, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(random_start(30, 5, 7, CPU), first)
    assert not torch.equal(random_start(30, 5, 8, CPU), first)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60),
    k=st.integers(1, 60),
    q=st.integers(1, 24),
    rank=st.integers(1, 24),
    seed=st.integers(0, 2**32),
)
def test_a_product_is_cut_as_the_best_of_that_rank(n, k, q, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(n, q, generator=generator) * torch.logspace(0, -2, q)
    down = torch.randn(q, k, generator=generator)
    matrix = up.double() @ down.double()
    short_up, short_down, lost = recompress(up, down, rank)
    missed = (matrix - short_up.double() @ short_down.double()).square().sum()
    squares = torch.linalg.svdvals(matrix).square()
    assert missed <= squares[rank:].sum() + 1e-10 * squares.sum()
    assert lost == pytest.approx(float(squares[rank:].sum() / squares.sum()), rel=1e-3, abs=1e-10)
    assert short_up.shape[1] == short_down.shape[0] <= rank


def test_nothing_is_cut_from_nothing():
    up, down, lost = recompress(torch.zeros(5, 3), torch.ones(3, 4), 2)
    assert lost == 0 and not (up @ down).any()
