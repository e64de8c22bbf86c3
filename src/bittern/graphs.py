"""CUDA graphs: what a call launches, written down once and launched again as a whole.

A replay reads and writes the addresses that the recorded call did, whatever lies there now, and asks the host nothing.
What may be recorded, and when a recording is worth nothing any more, is for those who record to know.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_broken: list[torch.cuda.CUDAGraph] = []


def record(
    call: Callable[[], T], *, warm_up: int = 0, stream: torch.cuda.Stream | None = None, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Records a call, which must have been made before, or be made now: kernels are compiled and libraries set up then.

    Args:
        call: What is recorded. Recording launches nothing.
        warm_up: How often to call it before, on the same stream.
        stream: Recorded on it; by default on one for all that are recorded without.
        pool: The memory of another graph (`graph.pool()`), shared with it; the two must not replay at a time.

    Returns:
        The graph, and what the call returned, which each replay fills.

    Raises:
        Exception: what the call raises where it cannot be recorded.
    """
    current = torch.cuda.current_stream()
    stream = stream or _side_stream(current.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()
    current.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    try:
        return graph, _recorded(graph, call, stream, pool)
    except BaseException:
        _tidy_up(graph, stream, pool)
        raise


def _tidy_up(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> None:
    """Does what torch leaves undone where the device refused something, and so the whole recording.

    Without it no memory would ever be given back to the device, and no random number be drawn.
    """
    try:
        graph.pool()
    except RuntimeError:
        # Torch's allocators go on asking the graph.
        _broken.append(graph)
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(stream.device.index, pool)
            torch._C._cuda_releasePool(stream.device.index, pool)
        # The generator of random numbers waits for an end, which another recording brings.
        with contextlib.suppress(RuntimeError):
            _recorded(torch.cuda.CUDAGraph(), lambda: torch.zeros(1, device=stream.device), stream, None)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _recorded(graph: torch.cuda.CUDAGraph, call: Callable[[], T], stream: torch.cuda.Stream, pool: Any) -> T:
    # Where recording fails torch leaves its stream the current one. Thread local: a compiler's or a library's own
    # threads may touch the device meanwhile.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        return call()


class Recorder:
    """Records calls on one device into graphs that share their memory, and so replay one after another.

    Attributes:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One for good: libraries keep memory for each stream that they meet.
        self._stream = torch.cuda.Stream(device)
        self._last: torch.cuda.Stream | None = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def record(self, call: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Records a call that has been made before.

        Returns:
            What replays it, and what it returned. Its memory is free once the first of them is gone.
        """
        # Memory whose last graph is gone cannot be shared any more.
        pool = next((graph.pool() for graph in self._graphs), None)
        try:
            with torch.cuda.device(self.device):
                graph, result = record(call, stream=self._stream, pool=pool)
        except BaseException:
            # Nor can memory that a recording was about to use.
            self._graphs.clear()
            raise
        self._graphs.add(graph)
        return graph.replay, result

    def take_turns(self) -> None:
        """Has the current stream wait for replays on another, with all that was done there to their results."""
        current = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def finish(self) -> None:
        """Waits for replays, before graphs are let go."""
        torch.cuda.synchronize(self.device)
