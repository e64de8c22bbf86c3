"""Milliseconds of a call, and what several runs of it allow to say.

A run is a number of calls; its value is their median. The spread is what the medians of runs differ by. A ratio of two
calls lies between the least and the most that any pair of runs gives; if 1 is among these, the two cannot be told
apart, and there is no ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each call, run by run."""

    runs: tuple[tuple[float, ...], ...]

    @property
    def medians(self) -> list[float]:
        """The value of each run."""
        return [statistics.median(run) for run in self.runs]

    @property
    def ms(self) -> float:
        """The median of all calls."""
        return statistics.median(call for run in self.runs for call in run)

    @property
    def spread(self) -> float:
        """What the runs differ by, as a part of the median."""
        return (max(self.medians) - min(self.medians)) / self.ms

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        calls = [call for run in self.runs for call in run]
        return {
            "ms": round(self.ms, 3),
            "ms_runs": [round(median, 3) for median in self.medians],
            "ms_least": round(min(calls), 3),
            "ms_most": round(max(calls), 3),
            "spread": round(self.spread, 4),
        }


@dataclass(frozen=True)
class Ratio:
    """How many times faster one call is than another, and the least and the most that pairs of runs give."""

    value: float
    low: float
    high: float
    has_spread: bool = True

    @classmethod
    def of(cls, base: Sequence[float], other: Sequence[float]) -> Ratio:
        """`base` over `other`, from the medians of their runs."""
        low, high = min(base) / max(other), max(base) / min(other)
        several = min(len(base), len(other)) > 1
        return cls(statistics.median(base) / statistics.median(other), low, high, several)

    @property
    def told(self) -> bool:
        """Whether the spread between runs leaves a ratio to be told."""
        return self.has_spread and not self.low <= 1 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the ratio is None where it cannot be told."""
        value = round(self.value, 3) if self.told else None
        return {"ratio": value, "low": round(self.low, 3), "high": round(self.high, 3)}

    def __str__(self) -> str:
        if not self.has_spread:
            return "not told: a single run has no spread"
        span = f"{self.low:.2f} to {self.high:.2f}"
        return f"{self.value:.2f}x ({span})" if self.told else f"not told: runs give {span}"


def timed(call: Callable[[], object], device: torch.device | str, *, steps: int, runs: int) -> Timing:
    """Times a call that has been warmed up.

    On a GPU a call is timed by events around it, so that the time is the device's, launches included that it waits for.

    Args:
        call: What is timed.
        device: Where its work is done.
        steps: Calls a run.
        runs: How many.
    """
    once = _on_gpu if torch.device(device).type == "cuda" else _on_cpu
    return Timing(tuple(tuple(once(call) for _ in range(steps)) for _ in range(runs)))


def _on_gpu(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _on_cpu(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)
