"""The same launch again, without what Triton does for each: a compiled kernel, its grid and its arguments made ready.

For every launch Triton 3.6 makes a record for hooks that nobody set, calls both chains of them, encodes each tensor
descriptor for the driver, and asks for a stream. Encoded descriptors stay what they are as long as addresses do, and
so the driver's launcher is handed what it was handed before. All of this is the inside of one version of Triton: with
another, with a launcher that is not known, or with hooks (profilers set them) launches are Triton's own.
"""

# A type checker knows little of Triton.
# pyright: basic

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.compiler import CompiledKernel

Ready = Callable[[int, bool], None]
"""Launches on a stream, given as the driver's number, and tells hooks of it."""

_KNOWN = ("3.6.",)
_LAUNCHER = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "launch")


def ready(compiled: CompiledKernel, grid: tuple[int, int, int], arguments: Sequence[Any]) -> Ready:
    """A launch of a compiled kernel that can be repeated.

    Args:
        compiled: What `kernel[grid](...)` returned.
        grid: Programs along each axis.
        arguments: All of the kernel's, in order; descriptors as Triton takes them.
    """
    ordinary = compiled[grid]
    straight = _straight(compiled, arguments)

    if straight is None:
        return lambda stream, hooked: ordinary(*arguments, stream=stream)
    launcher, rest = straight

    def run(stream: int, hooked: bool) -> None:
        if hooked:
            ordinary(*arguments, stream=stream)
        else:
            launcher(*grid, stream, *rest)

    return run


class _Launcher(NamedTuple):
    """The driver's launcher of a kernel, what it takes before the arguments, and how those that are encoded lie."""

    launch: Callable[..., None]
    settings: tuple[Any, ...]
    layouts: dict[int, Any]


# Looking inside takes longer than a launch.
@functools.lru_cache(maxsize=1024)
def _launcher_of(compiled: CompiledKernel) -> _Launcher | None:
    """None if this Triton is not known."""
    outer: Any = compiled.run
    if not triton.__version__.startswith(_KNOWN) or not all(hasattr(outer, name) for name in _LAUNCHER):
        return None
    if outer.global_scratch_size or outer.profile_scratch_size:
        return None
    launch, layouts = outer.launch, dict[int, Any]()
    if inspect.isfunction(launch):
        # What turns descriptors into the driver's own, and then calls the launcher.
        inside = inspect.getclosurevars(launch).nonlocals
        if not {"launcher", "tensordesc_indices", "tensordesc_meta"} <= inside.keys():
            return None
        launch = inside["launcher"]
        layouts = dict(zip(sorted(inside["tensordesc_indices"]), inside["tensordesc_meta"], strict=True))
    settings = (
        compiled.function, outer.launch_cooperative_grid, outer.launch_pdl, None, None, compiled.packed_metadata,
        None, None, None,
    )  # fmt: skip
    return _Launcher(launch, settings, layouts)


def _straight(compiled: CompiledKernel, arguments: Sequence[Any]) -> tuple[Callable[..., None], tuple[Any, ...]] | None:
    """The driver's launcher, and what it takes after grid and stream; None if this Triton is not known."""
    known = _launcher_of(compiled)
    if known is None:
        return None
    given: list[Any] = []
    for i, argument in enumerate(arguments):
        given += _encoded(argument, known.layouts[i]) if i in known.layouts else [argument]
    return known.launch, (*known.settings, *given)


def _encoded(described: Any, layout: Any) -> list[Any]:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return make_tensordesc_arg(described, layout)


def is_hooked() -> bool:
    """Whether somebody wants to know of launches."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
