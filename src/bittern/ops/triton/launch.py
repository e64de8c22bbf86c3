"""What every launch needs."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's device the current one, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run at once; a handful in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
