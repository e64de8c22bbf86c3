"""Which level every layer of every block gets, so that a budget of bytes buys the least error.

The problem. A model is made of blocks of several kinds; blocks of one kind are alike in names and shapes. Block b has
slots j (one for each set of layers that are solved together), a slot has levels l (ranks, say) that cost c[j, l] bytes,
the same in every block of the kind, and leave an error e[b, j, l] >= 0. A *profile* is a level for each slot of a
kind, and every block has one of its kind's profiles:

    minimise    sum over b, j of e[b, j, level(profile(b), j)]
    subject to  sum over b, j of c[j, level(profile(b), j)] <= budget
    and         at most max(P, number of kinds) profiles in all

The last line keeps repeated blocks repeated: without it every block could become another program to compile.

The method. Two choices meet: which blocks share a profile, and what the profiles are.

- *Who shares*, at a price a byte (a Lagrange multiplier): blocks are put in the order of the error that they have at
  their leanest, and the cheapest division into runs is found by dynamic programming; it would be the best of all if
  blocks differed by a factor only. Since they do not quite, blocks then move to the profile that suits them best, and
  profiles follow, until nothing moves. A sweep over prices, and over the ways in which kinds may divide the profiles,
  gives a few dozen different divisions.
- *Which levels*, for each of these divisions: a multiple-choice knapsack, whose slots are those of the profiles; it is
  solved exactly by dynamic programming over bytes (Dudzinski and Walukiewicz 1987), in steps of at most 1/32768 of what
  the budget leaves above the leanest choice.

The best of all is taken. Tests hold it against the enumeration of everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from bittern.errors import UserError

STEPS = 2**15
"""Bytes are counted in at most so many steps."""

PRICES = 24
"""Prices a byte that are tried, spread evenly in their logarithm."""

MOVES = 20
"""How often blocks may move between profiles at one price; they settle after two or three."""

Labels = tuple[int, ...]
"""Which of its kind's profiles every block has."""


@dataclass(frozen=True)
class Kind:
    """Blocks that are alike in names and shapes.

    Attributes:
        costs: Of each slot the bytes of each level, for one block, in rising order.
        errors: Of each slot the error of each level in each block, [blocks, levels].
    """

    costs: Sequence[Int[ndarray, " levels"]]
    errors: Sequence[Float[ndarray, "blocks levels"]]

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.errors[0])

    @cached_property
    def order(self) -> Int[ndarray, " blocks"]:
        """The blocks by falling error at their leanest."""
        leanest = sum(error[:, 0] for error in self.errors)
        return np.argsort(-np.asarray(leanest), kind="stable")


def allocate(kinds: Sequence[Kind], budget: int, profiles: int = 3) -> list[Int[ndarray, "blocks slots"]]:
    """The level of every slot of every block, of each kind; see the module's docstring.

    Args:
        kinds: What there is to choose.
        budget: Bytes for all of it.
        profiles: How many different profiles there may be, if there are not more kinds.

    Raises:
        UserError: if the budget is smaller than the leanest choice.
    """
    leanest = sum(kind.blocks * int(cost[0]) for kind in kinds for cost in kind.costs)
    if budget < leanest:
        raise UserError(f"a budget of {budget} bytes: expected at least {leanest}")
    best: tuple[float, list[Int[ndarray, "blocks slots"]]] | None = None
    for division in dict.fromkeys(_divisions(kinds, profiles)):
        found = _levels(kinds, division, budget - leanest)
        error = sum(_error(kind, levels) for kind, levels in zip(kinds, found, strict=True))
        if best is None or error < best[0]:
            best = error, found
    assert best is not None
    return best[1]


def _error(kind: Kind, levels: Int[ndarray, "blocks slots"]) -> float:
    rows = np.arange(kind.blocks)
    return float(sum(error[rows, levels[:, slot]].sum() for slot, error in enumerate(kind.errors)))


def _divisions(kinds: Sequence[Kind], profiles: int) -> Iterator[tuple[Labels, ...]]:
    """Ways to share profiles: the best ones at each price, for each way to deal the profiles out to the kinds."""
    spare = max(0, profiles - len(kinds))
    deals = {
        tuple(min(kind.blocks, 1 + extra.count(i)) for i, kind in enumerate(kinds))
        for extra in itertools.combinations_with_replacement(range(len(kinds)), spare)
    }
    for price in _prices(kinds):
        found = [_partitions(kind, price, max(deal[i] for deal in deals)) for i, kind in enumerate(kinds)]
        for deal in sorted(deals):
            yield tuple(found[i][count - 1] for i, count in enumerate(deal))


def _prices(kinds: Sequence[Kind]) -> Float[ndarray, " prices"]:
    """From the dearest to the cheapest byte that any slot offers."""
    rates = [
        ratio
        for kind in kinds
        for cost, error in zip(kind.costs, kind.errors, strict=True)
        for ratio in (-np.diff(error) / np.diff(cost)).ravel()
        if ratio > 0
    ]
    return np.geomspace(max(rates), min(rates), PRICES) if rates else np.ones(1)


def _partitions(kind: Kind, price: float, most: int) -> list[Labels]:
    """The best division into 1, 2, ... profiles at a price."""
    n = kind.blocks
    if most == 1:
        return [(0,) * n]
    # run[a, b]: the least cost of blocks a to b - 1, in order, with one profile.
    run = np.zeros((n + 1, n + 1))
    counts = np.arange(n + 1)[None, :] - np.arange(n + 1)[:, None]
    for cost, error in zip(kind.costs, kind.errors, strict=True):
        sums = np.concatenate([np.zeros((1, len(cost))), error[kind.order].cumsum(axis=0)])
        run += (sums[None] - sums[:, None] + price * counts[..., None] * cost).min(axis=-1)
    run[counts <= 0] = np.inf
    found: list[Labels] = []
    least, starts = run[0], list[Int[ndarray, " ends"]]()
    for count in range(1, most + 1):
        if count > 1:
            totals = least[:, None] + run
            starts.append(totals.argmin(axis=0))
            least = totals.min(axis=0)
        labels, end = np.zeros(n, dtype=int), n
        for label in range(count - 1, 0, -1):
            start = int(starts[label - 1][end])
            labels[kind.order[start:end]] = label
            end = start
        found.append(_settled(kind, labels, price, count))
    return found


def _settled(kind: Kind, labels: Int[ndarray, " blocks"], price: float, count: int) -> Labels:
    """Labels once every block has the profile that suits it best, and every profile its best levels."""
    for _ in range(MOVES):
        costs = np.zeros((kind.blocks, count))
        for cost, error in zip(kind.costs, kind.errors, strict=True):
            for label in range(count):
                members = labels == label
                level = int((error[members].sum(axis=0) + price * members.sum() * cost).argmin())
                costs[:, label] += error[:, level] + price * cost[level]
        moved = np.where(costs.min(axis=1) < costs[np.arange(kind.blocks), labels], costs.argmin(axis=1), labels)
        if (moved == labels).all():
            break
        labels = moved
    # Numbered as they first occur, so that equal divisions are equal.
    names: dict[int, int] = {}
    return tuple(names.setdefault(int(label), len(names)) for label in labels)


def _levels(kinds: Sequence[Kind], division: tuple[Labels, ...], spare: int) -> list[Int[ndarray, "blocks slots"]]:
    """The best levels of a division's profiles within `spare` bytes above the leanest."""
    step = max(1, -(-spare // STEPS))
    room = spare // step
    least = np.zeros(room + 1)
    picked: list[tuple[Int[ndarray, " room"], Int[ndarray, " levels"]]] = []
    items = [
        (i, slot, label)
        for i, labels in enumerate(division)
        for label in range(max(labels) + 1)
        for slot in range(len(kinds[i].costs))
    ]
    for i, slot, label in items:
        members = np.array(division[i]) == label
        cost, error = kinds[i].costs[slot], kinds[i].errors[slot][members].sum(axis=0)
        steps = -(-(cost - cost[0]) * int(members.sum()) // step)
        totals = np.full((len(cost), room + 1), np.inf)
        for level, taken in enumerate(steps):
            if taken <= room:
                totals[level, taken:] = least[: room + 1 - taken] + error[level]
        choice = totals.argmin(axis=0)
        least = totals.min(axis=0)
        picked.append((choice, steps))
    found = [np.zeros((kind.blocks, len(kind.costs)), dtype=int) for kind in kinds]
    for (i, slot, label), (choice, steps) in zip(reversed(items), reversed(picked), strict=True):
        level = int(choice[room])
        found[i][np.array(division[i]) == label, slot] = level
        room -= int(steps[level])
    return cast("list[Int[ndarray, 'blocks slots']]", found)
