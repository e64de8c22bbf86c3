"""Which level every layer gets, so that a budget of bytes buys the least error.

The problem. A model is made of blocks of several kinds; blocks of one kind are alike in names and shapes, and have to
stay so, or each would be another program to compile. A kind has slots j (one for each set of layers that are solved
together), a slot has levels l (ranks, say) that cost c[j, l] bytes in each block and leave an error e[b, j, l] >= 0 in
block b:

    minimise    sum over b, j of e[b, j, level(j)]
    subject to  sum over b, j of c[j, level(j)] <= budget

The method. A multiple-choice knapsack, solved exactly by dynamic programming over bytes (Dudzinski and Walukiewicz
1987), in steps of at most 1/32768 of what the budget leaves above the leanest choice. Tests hold it against the
enumeration of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from bittern.errors import UserError

STEPS = 2**15
"""Bytes are counted in at most so many steps."""


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


def allocate(kinds: Sequence[Kind], budget: int) -> list[list[int]]:
    """The level of every slot, of each kind; see the module's docstring.

    Args:
        kinds: What there is to choose.
        budget: Bytes for all of it.

    Raises:
        UserError: if the budget is smaller than the leanest choice.
    """
    leanest = sum(kind.blocks * int(cost[0]) for kind in kinds for cost in kind.costs)
    if budget < leanest:
        raise UserError(f"a budget of {budget} bytes: expected at least {leanest}")
    step = max(1, -(-(budget - leanest) // STEPS))
    room = (budget - leanest) // step
    least = np.zeros(room + 1)
    picked: list[tuple[Int[ndarray, " room"], Int[ndarray, " levels"]]] = []
    for kind in kinds:
        for cost, error in zip(kind.costs, kind.errors, strict=True):
            steps = -(-(cost - cost[0]) * kind.blocks // step)
            totals = np.full((len(cost), room + 1), np.inf)
            for level, taken in enumerate(steps):
                if taken <= room:
                    totals[level, taken:] = least[: room + 1 - taken] + error[:, level].sum()
            picked.append((totals.argmin(axis=0), steps))
            least = totals.min(axis=0)
    levels: list[int] = []
    for choice, steps in reversed(picked):
        levels.append(int(choice[room]))
        room -= int(steps[levels[-1]])
    backwards = iter(reversed(levels))
    return [[next(backwards) for _ in kind.costs] for kind in kinds]
