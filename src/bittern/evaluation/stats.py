"""What a handful of pictures allows one to say: means with errors, intervals, and claims that respect them.

Scores are counts of right and wrong pictures, so the plug-in error sqrt(p (1 - p) / n) is zero for a perfect task
and would claim certainty from twenty pictures. The errors here use the "plus four" estimate of Agresti and Coull
(1998, https://doi.org/10.1080/00031305.1998.10480550): two successes and two failures are added for the error, never
for the mean. Two models that draw from the same noise are compared prompt by prompt; a difference is claimed only
when the bootstrap interval *and* the exact sign test both exclude zero, because on few disagreeing pairs the
percentile bootstrap alone is too sure of itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
_FEWEST_TO_RESAMPLE = 5  # prompts; below them a task's own scatter tells nothing of its error


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error and the number of values behind it."""

    mean: float
    stderr: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.stderr:.3f}"


Estimator = Callable[[Sequence[float]], Estimate]
"""Gives the mean of a task's prompts and its error."""


@dataclass(frozen=True)
class Difference:
    """A paired difference (model minus reference) with its interval.

    Attributes:
        mean: unweighted mean over the tasks of the per-task mean difference.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        better: prompts that the model got right more often than the reference.
        worse: prompts that the reference got right more often.
        n: prompts compared.
    """

    mean: float
    low: float
    high: float
    better: int
    worse: int
    n: int

    @property
    def p_value(self) -> float:
        """Exact two-sided sign test on the prompts where the two disagree."""
        return sign_test(self.better, self.worse)

    @property
    def significant(self) -> bool:
        """Whether both the interval and the sign test exclude "no difference"."""
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - LEVEL

    @property
    def claim(self) -> str:
        """What may be said of the model's score, as the rest of a sentence."""
        found = f"difference {self.mean:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}, "
        found += f"sign test p = {self.p_value:.2g}, {self.n} prompts"
        if not self.significant:
            return f"cannot be told apart from the reference's ({found})"
        return f"is {'higher' if self.mean > 0 else 'lower'} than the reference's ({found})"


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean (sample deviation / sqrt(n)); the error of a single value is 0."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no values to average")
    spread = float(array.std(ddof=1)) if array.size > 1 else 0.0
    return Estimate(float(array.mean()), spread / math.sqrt(array.size), int(array.size))


def proportion(outcomes: Sequence[float]) -> Estimate:
    """Mean share of successes over prompts; the error takes the plus-four share, so it is never zero.

    Args:
        outcomes: a prompt each: right or wrong, or the share of its pictures that are right, 0 to 1.
    """
    n = len(outcomes)
    if n == 0:
        raise ValueError("no outcomes to average")
    mean = sum(outcomes) / n
    # Two prompts that are wholly right and two wholly wrong; for yes and no this is p (1 - p) of the plus-four share.
    smoothed = (sum(outcomes) + 2) / (n + 4)
    variance = (sum(value * value for value in outcomes) + 2) / (n + 4) - smoothed**2
    return Estimate(mean, math.sqrt(variance / n), n)


def unweighted_mean(tasks: Mapping[str, Estimate]) -> Estimate:
    """Mean of the tasks' means, each task counting alike; independent errors add in quadrature."""
    estimates = list(tasks.values())
    if not estimates:
        raise ValueError("no tasks to average")
    error = math.sqrt(sum(e.stderr**2 for e in estimates)) / len(estimates)
    return Estimate(sum(e.mean for e in estimates) / len(estimates), error, sum(e.n for e in estimates))


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p-value that `better` and `worse` come from a fair coin."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_difference(
    model: Mapping[str, Sequence[float]],
    reference: Mapping[str, Sequence[float]],
    *,
    shares: bool = True,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Difference of two models' scores on the same prompts and noise.

    Args:
        model: per task, the outcome of every prompt, 0 to 1.
        reference: the same tasks and prompts, in the same order.
        shares: whether outcomes are shares of right pictures, of which most prompts have the same on both sides, and
            not measures that hardly ever agree.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        The difference with a percentile bootstrap over prompts. Every task is resampled by itself, its deviations
        widened by sqrt(n / (n - 1)), since a resample of n scatters too little by that factor. Where a task has fewer
        than five prompts they are resampled across tasks, each weighing as much as in the mean of tasks: a little
        wide, but honest with one prompt a task. Where few or all prompts disagree the bootstrap collapses; the
        interval of shares never ends nearer than 3 / n (the rule of three).
    """
    if {t: len(v) for t, v in model.items()} != {t: len(v) for t, v in reference.items()}:
        raise ValueError("a paired difference needs the same prompts on both sides")
    rng = np.random.default_rng(seed)
    gaps = [np.asarray(model[t], np.float64) - np.asarray(reference[t], np.float64) for t in model if len(model[t])]
    n = sum(g.size for g in gaps)
    better, worse = (int(sum((np.sign(g) == sign).sum() for g in gaps)) for sign in (1, -1))
    mean = float(np.mean([g.mean() for g in gaps]))
    if min(g.size for g in gaps) < _FEWEST_TO_RESAMPLE:
        moved = _deviations(np.concatenate([g * n / (g.size * len(gaps)) for g in gaps]), rng, resamples)
    else:
        apart = [_deviations(g, rng, resamples) * math.sqrt(g.size / (g.size - 1)) for g in gaps]
        moved = np.mean(apart, axis=0)
    tail = 50 * (1 - LEVEL)
    low, high = mean + np.percentile(moved, [tail, 100 - tail])
    least = 3 / n if shares else 0.0
    low, high = max(-1.0, min(low, mean - least)), min(1.0, max(high, mean + least))
    return Difference(mean, float(low), float(high), better, worse, n)


def _deviations(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """How far the mean of each resample of n values lies from the mean of the values."""
    distinct, counts = np.unique(values, return_counts=True)
    # Shares of right pictures take few values: how often each was drawn is all that a resample is.
    drawn = rng.multinomial(values.size, counts / values.size, size=resamples)
    return drawn @ distinct / values.size - values.mean()
