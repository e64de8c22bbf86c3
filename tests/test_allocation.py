"""Dealing out bytes: against the enumeration of everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bittern.errors import UserError
from bittern.quantization.allocation import Kind, allocate


def error_of(kinds: list[Kind], found: list[list[int]]) -> float:
    return sum(
        float(error[:, level].sum())
        for kind, levels in zip(kinds, found, strict=True)
        for error, level in zip(kind.errors, levels, strict=True)
    )


def bytes_of(kinds: list[Kind], found: list[list[int]]) -> int:
    return sum(
        kind.blocks * int(cost[level])
        for kind, levels in zip(kinds, found, strict=True)
        for cost, level in zip(kind.costs, levels, strict=True)
    )


def brute_force(kinds: list[Kind], budget: int) -> float:
    """The least error of all choices that keep to the budget."""
    tables = [list(itertools.product(*(range(len(cost)) for cost in kind.costs))) for kind in kinds]
    every = ([list(levels) for levels in found] for found in itertools.product(*tables))
    return min(error_of(kinds, found) for found in every if bytes_of(kinds, found) <= budget)


def random_kinds(rng: np.random.Generator, shapes: list[tuple[int, int, int]]) -> list[Kind]:
    """Errors that fall with bytes, larger in some blocks than in others."""
    kinds = []
    for blocks, slots, levels in shapes:
        costs = [np.sort(rng.choice(np.arange(1, 40), levels, replace=False)) for _ in range(slots)]
        size = np.exp(rng.normal(0, 1.5, (blocks, 1)))
        errors = [size * -np.sort(-rng.exponential(size=(blocks, levels)), axis=1) for _ in range(slots)]
        kinds.append(Kind(costs, errors))
    return kinds


SHAPES = [
    [(5, 2, 2)],
    [(4, 1, 4)],
    [(3, 3, 3), (2, 2, 2)],
    [(4, 2, 2), (3, 2, 3)],
    [(2, 1, 3), (2, 1, 2), (2, 1, 3), (2, 1, 2)],
]


def test_it_is_the_best_there_is() -> None:
    rng = np.random.default_rng(0)
    for trial in range(60):
        kinds = random_kinds(rng, SHAPES[trial % len(SHAPES)])
        leanest, richest = (sum(int(cost[i]) * kind.blocks for kind in kinds for cost in kind.costs) for i in (0, -1))
        budget = int(rng.integers(leanest, richest + 1))
        found = allocate(kinds, budget)
        assert bytes_of(kinds, found) <= budget
        assert error_of(kinds, found) == pytest.approx(brute_force(kinds, budget), rel=1e-12)
        with pytest.raises(UserError, match=f"a budget of {leanest - 1} bytes: expected at least {leanest}"):
            allocate(kinds, leanest - 1)


def test_real_sizes_are_kept_to_and_used() -> None:
    """57 blocks with billions of bytes: bytes are counted in steps, always to the safe side."""
    rng = np.random.default_rng(2)
    kinds = random_kinds(rng, [(19, 6, 8), (38, 3, 8)])
    kinds = [Kind([cost * 1_000_003 for cost in kind.costs], kind.errors) for kind in kinds]
    leanest, richest = (sum(int(cost[i]) * kind.blocks for kind in kinds for cost in kind.costs) for i in (0, -1))
    before = np.inf
    for share in (0.0, 0.1, 0.3, 0.6, 1.01):
        budget = round(leanest + share * (richest - leanest))
        found = allocate(kinds, budget)
        assert bytes_of(kinds, found) <= budget
        assert error_of(kinds, found) < before
        before = error_of(kinds, found)
    assert before == pytest.approx(sum(error[:, -1].sum() for kind in kinds for error in kind.errors), rel=1e-12)
