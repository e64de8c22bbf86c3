"""What every launch needs."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, cast

import torch
from torch import Tensor

_HERE = contextlib.nullcontext()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's device the current one, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _HERE


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up. Triton's own takes microseconds on the host."""
    return -(-a // b)


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for a matrix: rows contiguous, everything at multiples of 16 bytes."""
    size = x.element_size()
    return x.stride(1) == 1 and x.stride(0) * size % 16 == 0 and x.data_ptr() % 16 == 0 and x.numel() > 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; a handful in the interpreter."""
    if device.type != "cuda":
        return 3
    properties = cast(Any, torch.cuda.get_device_properties(device))
    return int(properties.multi_processor_count)
