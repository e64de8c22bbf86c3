"""How a training goes: what is known of it at any moment, and its learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bittern.recipes import Distillation


@dataclass
class Course:
    """How a training has gone.

    Attributes:
        log: A record for each validation.
        seconds: Of training and validation.
        best: Least validation error.
        missed: Validations since then.
        best_average: The averaged parameters of that time, on the host.
        replaced: Trajectories of the bank that are the student's own.
        saves: How often it was written down, by one of several processes.
    """

    log: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    best: float = math.inf
    missed: int = 0
    best_average: list[Tensor] = field(default_factory=list)
    replaced: int = 0
    saves: int = 0


def rate_at(step: int, done: float, settings: Distillation) -> float:
    """Share of the learning rates: a rise over `warmup` steps, and a cosine over the whole training."""
    return min(1.0, (step + 1) / max(1, settings.warmup)) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))
