"""What every launch needs."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's device the current one, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for a matrix: rows contiguous, everything at multiples of 16 bytes."""
    size = x.element_size()
    return x.stride(1) == 1 and x.stride(0) * size % 16 == 0 and x.data_ptr() % 16 == 0 and x.numel() > 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run at once; a handful in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
