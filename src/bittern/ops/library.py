"""Where torch finds the operations, and what all of their implementations have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("bittern", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Products have the types in which the numbers are defined, whatever autocast would make of them."""

    @functools.wraps(run)
    def implementation(first: Tensor | Sequence[Tensor], *args: Any) -> Any:
        kind = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(kind):
            return run(first, *args)
        with torch.autocast(kind, enabled=False):
            return run(first, *args)

    return implementation
