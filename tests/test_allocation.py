"""Dealing out bytes: against the enumeration of everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bittern.errors import UserError
from bittern.quantization.allocation import Kind, allocate


def error_of(kinds: list[Kind], found: list[np.ndarray]) -> float:
    return sum(
        float(error[row, levels[row, slot]])
        for kind, levels in zip(kinds, found, strict=True)
        for slot, error in enumerate(kind.errors)
        for row in range(kind.blocks)
    )


def bytes_of(kinds: list[Kind], found: list[np.ndarray]) -> int:
    return sum(
        int(cost[level])
        for kind, levels in zip(kinds, found, strict=True)
        for slot, cost in enumerate(kind.costs)
        for level in levels[:, slot]
    )


def profiles_of(found: list[np.ndarray]) -> int:
    return sum(len({tuple(row) for row in levels}) for levels in found)


def brute_force(kinds: list[Kind], budget: int, profiles: int) -> float:
    """The least error of all choices of levels for every block that keep to the budget and the profiles."""
    choices = []
    for kind in kinds:
        tables = list(itertools.product(*(range(len(cost)) for cost in kind.costs)))
        found: dict[tuple[int, int], float] = {}
        for rows in itertools.product(tables, repeat=kind.blocks):
            key = len(set(rows)), sum(int(kind.costs[s][level]) for row in rows for s, level in enumerate(row))
            error = sum(float(kind.errors[s][b, level]) for b, row in enumerate(rows) for s, level in enumerate(row))
            found[key] = min(found.get(key, np.inf), error)
        choices.append(found)
    return min(
        sum(error for _, error in parts)
        for parts in itertools.product(*(found.items() for found in choices))
        if sum(count for (count, _), _ in parts) <= max(profiles, len(kinds))
        and sum(nbytes for (_, nbytes), _ in parts) <= budget
    )


def random_kinds(rng: np.random.Generator, shapes: list[tuple[int, int, int]], noise: float) -> list[Kind]:
    """Errors that fall with bytes, larger in some blocks than in others, and not by one factor only."""
    kinds = []
    for blocks, slots, levels in shapes:
        costs = [np.sort(rng.choice(np.arange(1, 40), levels, replace=False)) for _ in range(slots)]
        size = np.exp(rng.normal(0, 1.5, (blocks, 1)))
        errors = [
            size
            * np.exp(noise * rng.normal(size=(blocks, 1)))
            * -np.sort(-rng.exponential(size=(blocks, levels)), axis=1)
            for _ in range(slots)
        ]
        kinds.append(Kind(costs, errors))
    return kinds


SHAPES = [
    [(5, 2, 2)],
    [(4, 1, 4)],
    [(3, 2, 2), (2, 2, 2)],
    [(4, 2, 2), (3, 1, 3)],
    [(2, 1, 3), (2, 1, 2), (2, 1, 3), (2, 1, 2)],
]


def test_it_comes_within_a_hair_of_the_best() -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for trial in range(60):
        kinds = random_kinds(rng, SHAPES[trial % len(SHAPES)], noise=float(rng.choice([0.0, 0.5])))
        leanest, richest = (sum(int(cost[i]) * kind.blocks for kind in kinds for cost in kind.costs) for i in (0, -1))
        budget = int(rng.integers(leanest, richest + 1))
        found = allocate(kinds, budget)
        assert bytes_of(kinds, found) <= budget
        assert profiles_of(found) <= max(3, len(kinds))
        ratios.append(error_of(kinds, found) / brute_force(kinds, budget, 3))
    assert min(ratios) > 1 - 1e-9
    assert np.mean(np.array(ratios) < 1 + 1e-9) >= 0.9
    assert np.mean(ratios) < 1.01 and max(ratios) < 1.25


@pytest.mark.parametrize("profiles", [0, 1])
def test_one_profile_is_solved_exactly(profiles: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        kinds = random_kinds(rng, [(3, 3, 2)], noise=0.5)
        leanest = sum(int(cost[0]) * 3 for cost in kinds[0].costs)
        budget = leanest + int(rng.integers(0, 200))
        found = allocate(kinds, budget, profiles)
        assert profiles_of(found) == 1
        assert error_of(kinds, found) == pytest.approx(brute_force(kinds, budget, 1), rel=1e-12)
        with pytest.raises(UserError, match=f"a budget of {leanest - 1} bytes: expected at least {leanest}"):
            allocate(kinds, leanest - 1, profiles)


def test_blocks_that_differ_by_a_factor_only_are_parted_by_it() -> None:
    """Two sensitive blocks among six get what the budget has to spare, wherever they stand."""
    factors = np.array([1, 100, 1, 1, 100, 1.0])[:, None]
    kind = Kind([np.array([10, 20, 40])], [factors * np.array([[4.0, 2.0, 1.0]])])
    (found,) = allocate([kind], 6 * 10 + 2 * 30, profiles=2)
    assert found[:, 0].tolist() == [0, 2, 0, 0, 2, 0]


def test_real_sizes_are_kept_to_and_used() -> None:
    """57 blocks with billions of bytes: bytes are counted in steps, always to the safe side."""
    rng = np.random.default_rng(2)
    kinds = random_kinds(rng, [(19, 6, 8), (38, 3, 8)], noise=0.3)
    kinds = [Kind([cost * 1_000_003 for cost in kind.costs], kind.errors) for kind in kinds]
    leanest, richest = (sum(int(cost[i]) * kind.blocks for kind in kinds for cost in kind.costs) for i in (0, -1))
    before = np.inf
    for share in (0.0, 0.1, 0.3, 0.6, 1.01):
        budget = round(leanest + share * (richest - leanest))
        found = allocate(kinds, budget)
        assert profiles_of(found) <= 3 and bytes_of(kinds, found) <= budget
        assert error_of(kinds, found) < before
        before = error_of(kinds, found)
    assert before == pytest.approx(sum(error[:, -1].sum() for kind in kinds for error in kind.errors), rel=1e-12)
