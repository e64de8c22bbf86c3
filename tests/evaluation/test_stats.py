from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from bittern.evaluation import stats

OUTCOMES = st.lists(st.booleans(), min_size=1, max_size=60)


def test_mean_and_error_agree_with_numpy() -> None:
    values = np.random.default_rng().normal(size=37)
    estimate = stats.mean_estimate(values.tolist())
    assert estimate.mean == pytest.approx(values.mean(), abs=1e-12)
    assert estimate.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(37), abs=1e-12)
    assert stats.mean_estimate([4.0]) == stats.Estimate(4.0, None, 1)
    assert stats.mean_estimate([4.0]).text(1, " dB") == "4.0 dB (error not known)"
    assert stats.Estimate(4.0, 0.25, 3).text(2, " dB") == "4.00 ± 0.25 dB" and str(estimate).count("±") == 1
    mixed = {"a": stats.mean_estimate([1.0, 2.0]), "b": stats.mean_estimate([4.0])}
    assert stats.unweighted_mean(mixed) == stats.Estimate(2.75, None, 3)
    assert stats.unweighted_mean({"a": mixed["a"]}).stderr == pytest.approx(0.5)


@given(OUTCOMES)
def test_a_proportion_is_never_certain(outcomes: list[bool]) -> None:
    estimate = stats.proportion(outcomes)
    n, p = len(outcomes), sum(outcomes) / len(outcomes)
    assert estimate.mean == p
    assert estimate.stderr >= math.sqrt(p * (1 - p) / n) - 1e-12
    assert estimate.stderr > 0


def test_error_of_a_proportion_approaches_the_binomial_one() -> None:
    assert stats.proportion([True] * 7000 + [False] * 3000).stderr == pytest.approx(math.sqrt(0.21 / 10000), rel=1e-3)


def test_overall_counts_tasks_alike_whatever_their_size() -> None:
    tasks = {"a": stats.proportion([True] * 10), "b": stats.proportion([False] * 1000)}
    overall = stats.unweighted_mean(tasks)
    assert overall.mean == 0.5
    assert overall.stderr == pytest.approx(math.hypot(tasks["a"].stderr, tasks["b"].stderr) / 2)
    assert overall.n == 1010


@pytest.mark.parametrize(("better", "worse", "p"), [(0, 0, 1.0), (0, 5, 0.0625), (0, 6, 0.03125), (1, 8, 0.0390625)])
def test_sign_test_against_hand_computed_tails(better: int, worse: int, p: float) -> None:
    assert stats.sign_test(better, worse) == pytest.approx(p)
    assert stats.sign_test(worse, better) == pytest.approx(p)


def test_a_clear_loss_is_claimed_and_a_faint_one_is_not() -> None:
    reference = {"a": [True] * 20, "b": [True] * 20}
    clear = stats.paired_difference({"a": [False] * 12 + [True] * 8, "b": [True] * 20}, reference)
    assert clear.mean == pytest.approx(-0.3) and clear.significant and clear.high < 0
    assert clear.claim.startswith("is lower than the reference's (difference -0.300")
    # Four losses and no win: the bootstrap interval excludes zero, the sign test (p = .125) does not.
    faint = stats.paired_difference({"a": [False] * 4 + [True] * 16, "b": [True] * 20}, reference)
    assert faint.high < 0 and not faint.significant
    assert faint.claim.startswith("cannot be told apart")
    # A reader who sees an interval without 0 is told why that is no claim.
    assert "p = 0.12, 40 prompts: the interval leaves out 0, the sign test does not rule out chance)" in faint.claim
    even = stats.paired_difference({"a": [False, True] * 20}, {"a": [True, False] * 20})
    assert even.claim.startswith("cannot be told apart") and "leaves out" not in even.claim
    assert "leaves out" not in clear.claim


def test_agreement_everywhere_still_has_an_interval() -> None:
    same = {"a": [True, False] * 30}
    difference = stats.paired_difference(same, same)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.0, -0.05, 0.05))
    assert not difference.significant


def test_disagreement_everywhere_is_no_certainty_either() -> None:
    worse = stats.paired_difference({"a": [False] * 6}, {"a": [True] * 6})
    assert (worse.mean, worse.low, worse.high) == (-1.0, -1.0, -0.5)
    assert worse.significant
    one = stats.paired_difference({"a": [False] + [True] * 9}, {"a": [True] * 10})
    assert one.low <= -0.4 + 1e-9 and one.high >= 0.2 - 1e-9 and not one.significant


GENEVAL = (80, 99, 80, 94, 100, 100)
BASE = (0.9, 0.7, 0.6, 0.8, 0.3, 0.5)


@pytest.mark.parametrize(
    ("prompts", "pictures", "rates"),
    [
        # GenEval with four pictures a prompt; losses that differ from task to task as much as they can.
        (GENEVAL, 4, (0.8, 0.3, 0.1, 0.6, 0.05, 0.45)),
        (GENEVAL, 1, BASE),
        # What the scenes suite draws on a CPU.
        ((20,) * 6, 1, (0.8, 0.6, 0.5, 0.7, 0.25, 0.4)),
    ],
)
def test_interval_covers_the_truth_as_often_as_it_says(
    prompts: tuple[int, ...], pictures: int, rates: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(11)
    truth = float(np.mean(np.subtract(rates, BASE)))
    hits = 0
    for trial in range(1000):
        model: dict[str, list[float]] = {}
        reference: dict[str, list[float]] = {}
        for task, (n, mine, base) in enumerate(zip(prompts, rates, BASE, strict=True)):
            # A prompt is as hard for the one as for the other, in proportion.
            ease = rng.beta(2 * base, 2 * (1 - base), n)
            reference[str(task)] = list(rng.binomial(pictures, ease) / pictures)
            model[str(task)] = list(rng.binomial(pictures, ease * mine / base) / pictures)
        found = stats.paired_difference(model, reference, seed=trial, resamples=500)
        hits += found.low <= truth <= found.high
    assert 930 <= hits <= 970


@pytest.mark.parametrize(
    "prompts", [(120,), (30, 20, 40), (3,) * 8, (1,) * 8, (5,) * 8, (20,) * 2, (5,), (3,), (10,)], ids=str
)
def test_interval_of_measures_covers_the_truth_as_often_as_it_says(prompts: tuple[int, ...]) -> None:
    # Cosines differ by thousandths and hardly ever agree: the rule of three would drown them.
    rng, hits, widths = np.random.default_rng(13), 0, []
    for trial in range(500):
        model: dict[str, list[float]] = {}
        reference: dict[str, list[float]] = {}
        for task, n in enumerate(prompts):
            base = rng.normal(0.3, 0.03, n)
            reference[str(task)], model[str(task)] = list(base), list(base + rng.normal(0.002, 0.01, n))
        found = stats.paired_difference(model, reference, shares=False, seed=trial, resamples=1000)
        hits += found.low <= 0.002 <= found.high
        widths.append(found.high - found.low)
    assert 465 <= hits <= 487
    assert min(widths) > 0 and (sum(prompts) < 8 or np.mean(widths) < 0.02)


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 4, 7, 39, 600])
def test_students_ratio_is_scipys(freedom: float) -> None:
    student, normal = (each.ppf(0.975) for each in (scipy.stats.t(freedom), scipy.stats.norm))
    assert stats._student(freedom) == pytest.approx(student / normal, rel=1e-5)
    assert stats._student(math.inf) == 1


def test_one_measure_says_nothing_of_its_error() -> None:
    found = stats.paired_difference({"a": [0.30]}, {"a": [0.254]}, shares=False)
    assert found.mean == pytest.approx(0.046) and (found.low, found.high, found.significant) == (None, None, False)
    assert found.claim == (
        "cannot be told apart from the reference's (difference +0.046 on 1 prompt: its error is not known)"
    )
    same = stats.paired_difference({"a": [0.3] * 6}, {"a": [0.3] * 6}, shares=False)
    assert (same.low, same.high) == (0, 0) and not same.significant


def test_several_pictures_of_a_prompt_are_one_witness() -> None:
    one = stats.proportion([True, False] * 20)
    assert stats.proportion([1.0, 0.0] * 20) == one
    # Prompts that are always right or always wrong say no more for being drawn four times.
    assert one.stderr == pytest.approx(math.sqrt(0.25 / 40))
    assert stats.proportion([0.5] * 40).mean == one.mean and stats.proportion([0.5] * 40).stderr < one.stderr / 2
    difference = stats.paired_difference({"a": [0.75, 0.5, 0.0, 1.0, 0.5]}, {"a": [0.5, 0.5, 0.25, 0.0, 0.5]})
    assert difference.mean == pytest.approx(0.2) and (difference.better, difference.worse, difference.n) == (2, 1, 5)


def test_few_prompts_a_task_are_resampled_across_tasks() -> None:
    model, reference = {"a": [1.0], "b": [0.0]}, {"a": [0.0], "b": [0.0]}
    found = stats.paired_difference(model, reference)
    assert found.low == -1.0 and found.high == 1.0


def test_two_equal_models_are_rarely_told_apart() -> None:
    rng = np.random.default_rng(12)
    claims = 0
    for trial in range(200):
        draws = rng.random((2, 6, 4)) < 0.8
        one, two = ({str(t): list(d[t]) for t in range(6)} for d in draws)
        claims += stats.paired_difference(one, two, seed=trial).significant
    assert claims <= 14


def test_difference_weighs_tasks_alike_and_refuses_other_prompts() -> None:
    model = {"a": [True], "b": [False] * 99}
    reference = {"a": [False], "b": [False] * 99}
    assert stats.paired_difference(model, reference).mean == pytest.approx(0.5)
    with pytest.raises(ValueError, match="same prompts"):
        stats.paired_difference({"a": [True]}, {"a": [True, False]})


def test_bootstrap_is_reproducible() -> None:
    rng = np.random.default_rng()
    one, two = ({"t": [bool(b) for b in row]} for row in rng.random((2, 50)) < 0.5)
    assert stats.paired_difference(one, two, seed=3) == stats.paired_difference(one, two, seed=3)


@given(st.integers(1, 40))
def test_more_prompts_mean_less_error(n: int) -> None:
    errors = [stats.proportion([True] * m + [False] * m).stderr for m in (n, 2 * n, 4 * n)]
    assert all(a > b for a, b in pairwise(errors))
