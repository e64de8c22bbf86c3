"""The Triton backend. What it accepts is declared here; Triton itself is imported when a kernel first runs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from bittern.ops.dispatch import NEWEST, Kernel

_DTYPES = (torch.bfloat16, torch.float16)
_GROUPS = (0, 16, 32, 64, 128, 256)


def _lazily(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(importlib.import_module("bittern.ops.triton.linear"), name)(*args)

    return run


def kernels() -> tuple[Kernel, ...]:
    """The kernels of this backend, the least preferred first."""
    common: dict[str, Any] = {
        "backend": "triton",
        "devices": ("cuda",),
        "dtypes": _DTYPES,
        "weights": ("int4", "nvfp4", "ternary"),
        "groups": _GROUPS,
        "outputs": 1,
        # Asked once: a compiler cannot trace the search.
        "lacks": None if importlib.util.find_spec("triton") else "triton",
    }
    prologue = _lazily("quantize_activations")
    few: dict[str, Any] = {
        **common,
        "plan": _lazily("plan"),
        "rows": (1, None),
        "segments": 2,
    }
    # On int8 tensor cores, since 4-bit ones cannot be reached. They take 32 codes at a time, which share their scales.
    four: dict[str, Any] = {**few, "weights": ("int4", "ternary"), "groups": _GROUPS[:1] + _GROUPS[2:]}
    return (
        Kernel("a4", capability=((8, 0), NEWEST), native=False, **four),
        Kernel("a8-int8", capability=((8, 0), NEWEST), prologue=prologue, **few),
        Kernel("a8-fp8", capability=((8, 9), NEWEST), prologue=prologue, **few),
        Kernel("a8-fp8-folded", capability=((8, 9), NEWEST), prologue=prologue, **few),
        Kernel("a16", plan=_lazily("plan"), capability=((8, 0), NEWEST), rows=(1, None), **common),
    )
