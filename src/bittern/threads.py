"""How many threads torch uses."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

SMALL_MODEL = 2**25
"""Numbers in a model that one thread runs by itself; SD 1.5's U-Net has 2^29.7."""


def is_small(model: nn.Module) -> bool:
    """Whether a model is best run by one thread."""
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) <= SMALL_MODEL


@contextmanager
def one_thread(small: bool) -> Generator[None]:
    """One thread for the time of the block, if the work is small; otherwise nothing changes.

    Small work has steps that are shorter than it takes threads to meet: on a busy machine they wait for each other,
    30 times as long as one alone needs. And one thread sums in one order, whatever the machine.
    """
    before = torch.get_num_threads()
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
