"""Fewer cases of tests that have many: enough that every value of every `parametrize` occurs."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

import pytest

MARKER = "covering"


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
        met: set[tuple[int, str]] = set()
        for item in random.Random(0).sample(several, len(several)):
            if met.issuperset(values[item]):
                item.add_marker(pytest.mark.slow)
            met.update(values[item])
