"""Fewer cases of tests that have many: enough that every value of every `parametrize` occurs."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest

MARKER = "covering"
TIMES = 2
"""How often a value occurs, where it does so in as many cases."""


def slow_beyond(items: Iterable[pytest.Item]) -> None:
    """Marks as slow the cases that a test marked `covering` has beyond a cover of its values.

    Which these are is drawn, the same in every run: in the order in which they are written, the first values of one
    `parametrize` would only meet the first ones of another.
    """
    cases: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker(MARKER) and hasattr(item, "callspec"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for several in cases.values():
        # One name for each `parametrize`: values that were written as one case stay one.
        values = {item: list(enumerate(item.callspec._idlist)) for item in several}
        wanted = {value: min(TIMES, n) for value, n in Counter(v for each in values.values() for v in each).items()}
        for item in random.Random(0).sample(several, len(several)):
            if any(wanted[value] > 0 for value in values[item]):
                for value in values[item]:
                    wanted[value] -= 1
            else:
                item.add_marker(pytest.mark.slow)
