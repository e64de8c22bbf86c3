"""Configurations by kernel and problem, in a table for each family of devices.

A table is JSON: by kernel a list of rules, best first,

    {"when": {"max_m": 1024, "grouped": true}, "config": {"block_n": 64, "warps": 4}}

A rule holds where every `max_` is not passed, every `min_` is reached and everything else is equal; a configuration's
fields that it leaves out have their defaults. After a family's rules come those of `default.json`, which are safe on
devices that nobody measured. Tables are read once, when a kernel first asks; nothing is timed at run time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any, TypeVar

Config = TypeVar("Config")

FAMILIES: dict[int, str] = {0: "interpreter", 9: "sm90"}
"""Tables by the major number of the compute capability."""


def all_of(config: type[Config], kernel: str, capability: tuple[int, int], **facts: int) -> Iterator[Config]:
    """The configurations whose rules hold, best first.

    Args:
        config: What they are.
        kernel: The kernel's name in the tables.
        capability: Of the device; (0, 0) for the interpreter.
        facts: What rules ask for.
    """
    for rule in rules(FAMILIES.get(capability[0], "default"), kernel) + rules("default", kernel):
        if all(_holds(key, value, facts) for key, value in rule["when"].items()):
            yield _made(config, tuple(sorted(rule["config"].items())))


def first(config: type[Config], kernel: str, capability: tuple[int, int], **facts: int) -> Config:
    """The first of `all_of`."""
    return next(all_of(config, kernel, capability, **facts))


@functools.cache
def rules(family: str, kernel: str) -> list[dict[str, Any]]:
    """A family's rules for a kernel; none where its table has none."""
    return _table(family).get(kernel, [])


@functools.cache
def _table(family: str) -> dict[str, Any]:
    return json.loads(
        resources.files("bittern.ops.triton.tuned").joinpath(f"{family}.json").read_text(encoding="utf-8")
    )


@functools.cache
def _made(config: type[Config], fields: tuple[tuple[str, Any], ...]) -> Config:
    return config(**dict(fields))


def _holds(key: str, value: int, facts: dict[str, int]) -> bool:
    if key.startswith("max_"):
        return facts[key[4:]] <= value
    if key.startswith("min_"):
        return facts[key[4:]] >= value
    return facts[key] == value
