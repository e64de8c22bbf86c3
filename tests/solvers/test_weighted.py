from __future__ import annotations

import pytest
import torch

from bittern.solvers.lowrank import random_start
from bittern.solvers.weighted import Metric, input_weight, refitted, stored, weighted_low_rank


def positive(k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(k, k, generator=generator) * torch.logspace(-1, 1, k)
    return root @ root.T / k


def cost(difference: torch.Tensor, weight: torch.Tensor, outputs: torch.Tensor | None = None) -> float:
    d, m = difference.double(), weight.double()
    g = torch.eye(len(d), dtype=torch.float64) if outputs is None else outputs.double()
    return float((g @ d @ m @ d.T).trace())


@pytest.fixture
def target() -> torch.Tensor:
    return torch.randn(20, 14, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("felt", [False, True])
def test_the_weighted_svd_is_the_best_of_its_rank(target: torch.Tensor, felt: bool) -> None:
    weight, rank, start = positive(14, 1), 4, random_start(14, 14, 0, torch.device("cpu"))
    metric = Metric([positive(12, 2), positive(8, 3)]) if felt else None
    outputs = torch.eye(20, dtype=torch.float64)
    if metric is not None:
        outputs = torch.block_diag(*(factor @ factor.T for factor in metric.factors))
        torch.testing.assert_close(metric.powers().double(), outputs.diagonal(), rtol=1e-5, atol=1e-6)
    found = weighted_low_rank(target, weight, metric, rank, start, 6)
    # Eckart-Young through symmetric square roots, in float64.
    roots = []
    for matrix in (outputs, weight.double()):
        values, vectors = torch.linalg.eigh(matrix)
        roots.append((vectors * values.sqrt()) @ vectors.T)
    best = torch.linalg.svdvals(roots[0] @ target.double() @ roots[1])[rank:].square().sum()
    reached = cost(target - found.up @ found.down, weight, outputs)
    assert reached == pytest.approx(float(best), rel=1e-3)
    plain = torch.linalg.svd(target, full_matrices=False)
    unweighted = (plain.U[:, :rank] * plain.S[:rank]) @ plain.Vh[:rank]
    assert reached < 0.8 * cost(target - unweighted, weight, outputs)


def test_left_and_unleft_are_inverse() -> None:
    metric, rows = Metric([positive(5, 4), torch.zeros(3, 3)]), torch.randn(8, 6)
    torch.testing.assert_close(metric.unleft(metric.left(rows)), rows, rtol=1e-3, atol=1e-3)
    silent = Metric([torch.zeros(4, 4)])
    assert torch.isfinite(silent.unleft(torch.ones(4, 2))).all()


def test_input_weight_is_the_expected_cost_of_rounding() -> None:
    u = torch.randn(500, 6, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.0, 2, 3, 4, 5, 6])
    rounded = u.round()
    residual = torch.randn(7, 6, generator=torch.Generator().manual_seed(6))
    by_inputs = ((u - rounded).double() @ residual.double().T).square().sum() / 500
    by_weights = 0.003 * (rounded.double().square().mean(0) * residual.double().square()).sum()
    assert cost(residual, input_weight(u, rounded)) == pytest.approx(float(by_inputs + by_weights), rel=1e-5)


def test_refit_is_reduced_rank_regression(target: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(7)
    u = torch.randn(4000, 14, generator=generator) @ positive(14, 8)
    rounded, coded = (2 * u).round() / 2, (2 * target).round() / 2
    start = random_start(14, 14, 0, torch.device("cpu"))
    found = refitted(target, coded, u, rounded, None, 3, start, 6)
    missed = (u @ target.T - rounded @ coded.T).double()
    # The textbook: project the unrestricted regression's fit on its first principal directions.
    gram = u.double().T @ u.double()
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(14)
    free = torch.linalg.solve(gram, u.double().T @ missed).T
    _values, vectors = torch.linalg.eigh(free @ gram @ free.T)
    expected = vectors[:, -3:] @ vectors[:, -3:].T @ free
    reached = (missed - u.double() @ (found.up @ found.down).double().T).square().sum()
    best = (missed - u.double() @ expected.T).square().sum()
    assert float(reached) == pytest.approx(float(best), rel=1e-3)
    assert reached < 0.9 * missed.square().sum()


def test_stored_factors_share_their_size_and_keep_their_product() -> None:
    up, down = torch.randn(9, 3) * 1e6, torch.randn(3, 7) * 1e-6
    down[2] = 0
    kept_up, kept_down = stored(up, down, torch.float32)
    torch.testing.assert_close(kept_up @ kept_down, up @ down)
    torch.testing.assert_close(kept_up[:, :2].norm(dim=0), kept_down[:2].norm(dim=1))
    assert torch.isfinite(kept_up).all()
