"""What a handful of pictures allows one to say: means with errors, intervals, and claims that respect them.

Scores are counts of right and wrong pictures, so the plug-in error sqrt(p (1 - p) / n) is zero for a perfect task
and would claim certainty from twenty pictures. The errors here use the "plus four" estimate of Agresti and Coull
(1998, https://doi.org/10.1080/00031305.1998.10480550): two successes and two failures are added for the error, never
for the mean. Two models that draw from the same noise are compared prompt by prompt; a difference is claimed only
when the bootstrap interval *and* the exact sign test both exclude zero, because on few disagreeing pairs the
percentile bootstrap alone is too sure of itself. One value that is no share tells nothing of its error: that is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
_FEWEST_TO_RESAMPLE = 5  # prompts; below them a task's own scatter tells nothing of its error


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, None where one value tells nothing of it, and the number of values behind it."""

    mean: float
    stderr: float | None
    n: int

    def __str__(self) -> str:
        return self.text(3)

    def text(self, places: int, unit: str = "") -> str:
        """The mean and its error for a reader, to so many places."""
        if self.stderr is None:
            return f"{self.mean:.{places}f}{unit} (error not known)"
        return f"{self.mean:.{places}f} ± {self.stderr:.{places}f}{unit}"


Estimator = Callable[[Sequence[float]], Estimate]
"""Gives the mean of a task's prompts and its error."""


@dataclass(frozen=True)
class Difference:
    """A paired difference (model minus reference) with its interval.

    Attributes:
        mean: unweighted mean over the tasks of the per-task mean difference.
        low: lower end of the 95 % interval; None where one prompt tells nothing of it.
        high: upper end of the 95 % interval, or None.
        better: prompts that the model got right more often than the reference.
        worse: prompts that the reference got right more often.
        n: prompts compared.
    """

    mean: float
    low: float | None
    high: float | None
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
        return self._apart and self.p_value < 1 - LEVEL

    @property
    def _apart(self) -> bool:
        """Whether the interval excludes "no difference"."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def claim(self) -> str:
        """What may be said of the model's score, as the rest of a sentence."""
        if self.low is None or self.high is None:
            return (
                f"cannot be told apart from the reference's (difference {self.mean:+.3f} on {self.n} "
                f"prompt{'' if self.n == 1 else 's'}: its error is not known)"
            )
        found = f"difference {self.mean:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}, "
        found += f"sign test p = {self.p_value:.2g}, {self.n} prompts"
        if self.significant:
            return f"is {'higher' if self.mean > 0 else 'lower'} than the reference's ({found})"
        why = ": the interval leaves out 0, the sign test does not rule out chance" if self._apart else ""
        return f"cannot be told apart from the reference's ({found}{why})"


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean (sample deviation / sqrt(n)); the error of a single value is not known."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no values to average")
    error = float(array.std(ddof=1)) / math.sqrt(array.size) if array.size > 1 else None
    return Estimate(float(array.mean()), error, int(array.size))


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
    """Mean of the tasks' means, each task counting alike; independent errors add in quadrature, if all are known."""
    estimates = list(tasks.values())
    if not estimates:
        raise ValueError("no tasks to average")
    errors = [e.stderr for e in estimates if e.stderr is not None]
    known = len(errors) == len(estimates)
    error = math.sqrt(sum(each**2 for each in errors)) / len(estimates) if known else None
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
        interval of shares never ends nearer than 3 / n (the rule of three). The interval of measures is widened by the
        ratio of Student's quantile to the normal one, with as many degrees of freedom as the resampled values have
        (Satterthwaite's for tasks apart, https://doi.org/10.2307/3002019); of one prompt alone it is not known.
    """
    if {t: len(v) for t, v in model.items()} != {t: len(v) for t, v in reference.items()}:
        raise ValueError("a paired difference needs the same prompts on both sides")
    rng = np.random.default_rng(seed)
    gaps = [np.asarray(model[t], np.float64) - np.asarray(reference[t], np.float64) for t in model if len(model[t])]
    n = sum(g.size for g in gaps)
    better, worse = (int(sum((np.sign(g) == sign).sum() for g in gaps)) for sign in (1, -1))
    mean = float(np.mean([g.mean() for g in gaps]))
    if not shares and n == 1:
        return Difference(mean, None, None, better, worse, n)
    if min(g.size for g in gaps) < _FEWEST_TO_RESAMPLE:
        pooled = np.concatenate([g * n / (g.size * len(gaps)) for g in gaps])
        moved = _deviations(pooled, rng, resamples)
        wider = 1.0 if shares else math.sqrt(n / (n - 1)) * _student(n - 1)
    else:
        apart = [_deviations(g, rng, resamples) * math.sqrt(g.size / (g.size - 1)) for g in gaps]
        moved = np.mean(apart, axis=0)
        wider = 1.0 if shares else _student(_freedom(gaps))
    tail = 50 * (1 - LEVEL)
    low, high = mean + wider * np.percentile(moved, [tail, 100 - tail])
    least = 3 / n if shares else 0.0
    low, high = max(-1.0, min(low, mean - least)), min(1.0, max(high, mean + least))
    return Difference(mean, float(low), float(high), better, worse, n)


def _freedom(gaps: Sequence[np.ndarray]) -> float:
    """Degrees of freedom of the mean of several means, after Satterthwaite (1946)."""
    errors = [float(g.var(ddof=1)) / g.size for g in gaps]
    if not any(errors):
        return math.inf
    return sum(errors) ** 2 / sum(error**2 / (g.size - 1) for error, g in zip(errors, gaps, strict=True))


def _student(freedom: float) -> float:
    """How much wider Student's interval is than the normal one; freedom: at least 1."""
    if math.isinf(freedom):
        return 1.0
    # t = sqrt(freedom) tan(a) turns the density into cos(a) ** (freedom - 1), which is smooth on a finite range.
    angles = np.linspace(0, math.pi / 2, 20001)
    density = np.cos(angles) ** (freedom - 1)
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = float(np.interp(LEVEL, share / share[-1], angles))
    return math.sqrt(freedom) * math.tan(angle) / NormalDist().inv_cdf((1 + LEVEL) / 2)


def _deviations(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """How far the mean of each resample of n values lies from the mean of the values."""
    distinct, counts = np.unique(values, return_counts=True)
    # Shares of right pictures take few values: how often each was drawn is all that a resample is.
    drawn = rng.multinomial(values.size, counts / values.size, size=resamples)
    return drawn @ distinct / values.size - values.mean()
