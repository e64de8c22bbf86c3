"""The ternary solver with data: what it reports is what the layer does, and it falls."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bittern.errors import UserError
from bittern.ops import few_bit_linear
from bittern.scheme import Scheme
from bittern.solvers import Solution, SolverOptions, relative_error, solve, solve_ternary
from bittern.trajectories import Statistics

SCHEME = Scheme(weight="ternary", group_size=None, activations=8)
FULL = SolverOptions(rounding="gptq", refits=4, sweeps=4)


def inputs(k: int, m: int = 1500, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=torch.Generator().manual_seed(9)) / k**0.5 + torch.eye(k)
    return torch.randn(m, k, generator=generator) @ mix * torch.logspace(-0.5, 0.5, k)


def statistics(x: Tensor) -> Statistics:
    return Statistics(x[:10], x.T @ x, x.abs().amax(0), len(x))


def weights(k: int, *sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, k, generator=generator) for n in sizes]


def error(x: Tensor, weight: Tensor, solution: Solution, scheme: Scheme, path: str = "a16") -> float:
    got = few_bit_linear(
        list(x.split(solution.layout.segments, dim=-1)), scheme.format.pack(solution.codes), solution.scales,
        solution.smooth, solution.down, solution.up, solution.bias, "ternary", scheme.group_size, path,
    )  # fmt: skip
    y = x @ weight.T
    return float((got - y).norm() / y.norm())


@pytest.mark.parametrize(
    ("scheme", "options", "segments"),
    [
        (SCHEME, FULL, (96,)),
        (replace(SCHEME, group_size=32), FULL, (50, 46)),
        (replace(SCHEME, rank=4), FULL, (96,)),
        (replace(SCHEME, smooth=True), replace(FULL, smoothing="columns"), (96,)),
        (
            replace(SCHEME, smooth=True, rank=4, group_size=32, packing="trits"),
            replace(FULL, smoothing="columns"),
            (50, 46),
        ),
    ],
)
def test_the_reported_errors_are_those_of_the_layer_and_fall(
    scheme: Scheme, options: SolverOptions, segments: tuple[int, ...]
) -> None:
    x, parts = inputs(96), weights(96, 24, 40)
    found, stages = solve_ternary(parts, statistics(x), scheme, options, segments, 0)
    assert found[0].smooth is found[1].smooth
    assert found[0].down is found[1].down
    for weight, solution, table in zip(parts, found, stages, strict=True):
        assert list(table) == ["nearest", "gptq", "refit", "sweeps"]
        assert table["sweeps"] == pytest.approx(error(x, weight, solution, scheme), rel=1e-3)
        # Eight-bit activations are a small part of it.
        assert error(x, weight, solution, scheme, "a8-int8") == pytest.approx(table["sweeps"], rel=0.05)
    both = [sum(table[stage] ** 2 for table in stages) for stage in stages[0]]
    assert both[0] > both[1] > both[2] >= both[3]
    assert both[3] < 0.6 * both[0]


def test_it_nears_the_best_of_all_codes_and_scales() -> None:
    x, (weight,) = inputs(7, 4000), weights(7, 40)
    gram = (x.T @ x).double()
    options = replace(FULL, damping=1e-6)
    (found,), _ = solve_ternary([weight], statistics(x), replace(SCHEME, scale_dtype="fp32"), options, (7,), 0)
    codes = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=7))).double()
    square = ((codes @ gram) * codes).sum(dim=1).clamp(min=1e-30)
    plain = solve([weight], SCHEME, SolverOptions(), (7,), 0)[0].reconstruct()
    best = mine = nearest = 0.0
    for row in range(40):
        whole = weight[row].double() @ gram @ weight[row].double()
        best += float(whole - ((codes @ gram @ weight[row].double()) ** 2 / square).max())
        missed = (weight[row] - found.reconstruct()[row]).double()
        mine += float(missed @ gram @ missed)
        missed = (weight[row] - plain[row]).double()
        nearest += float(missed @ gram @ missed)
    assert best * (1 - 1e-6) <= mine
    # Seven codes are easily caught where no single one can be bettered; two thirds of what there is to gain.
    assert nearest - mine > 0.66 * (nearest - best)


def test_fresh_inputs_gain_as_much_over_the_data_free_solver() -> None:
    x, fresh, (weight,) = inputs(128), inputs(128, seed=5), weights(128, 48)
    plain = solve([weight], SCHEME, SolverOptions(), (128,), 0)[0]
    (found,), stages = solve_ternary([weight], statistics(x), SCHEME, FULL, (128,), 0)
    assert error(fresh, weight, found, SCHEME) < 0.8 * error(fresh, weight, plain, SCHEME)
    assert stages[0]["nearest"] == pytest.approx(error(x, weight, plain, SCHEME), rel=1e-3)
    # It is the output that counts.
    assert relative_error(weight, found) > relative_error(weight, plain)


def test_each_further_freedom_lowers_the_error() -> None:
    x, (weight,) = inputs(128), weights(128, 64)
    columns = replace(FULL, smoothing="columns")
    row, group, branch, smooth = (
        solve_ternary([weight], statistics(x), scheme, options, (128,), 0)[1][0]["sweeps"]
        for scheme, options in (
            (SCHEME, FULL),
            (replace(SCHEME, group_size=32), FULL),
            (replace(SCHEME, rank=16), FULL),
            (replace(SCHEME, smooth=True), columns),
        )
    )
    assert max(group, branch, smooth) < row


def test_biases_give_back_the_mean() -> None:
    x, parts = inputs(96) + torch.linspace(-3, 3, 96), weights(96, 24, 40)
    known = replace(statistics(x), rows=x)
    plain, _ = solve_ternary(parts, known, SCHEME, FULL, (96,), 0)
    found, stages = solve_ternary(parts, known, SCHEME, replace(FULL, bias_correction=True), (96,), 0)
    for weight, without, solution, table in zip(parts, plain, found, stages, strict=True):
        assert without.bias is None
        assert torch.equal(without.codes, solution.codes)
        assert table["bias"] == pytest.approx(error(x, weight, solution, SCHEME), rel=2e-3)
        assert table["bias"] < table["sweeps"]


def test_same_seed_same_bytes_whatever_the_global_state() -> None:
    x, parts = inputs(64, 300), weights(64, 16)
    scheme, options = replace(SCHEME, rank=3, smooth=True), replace(FULL, smoothing="columns")
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(solve_ternary(parts, statistics(x), scheme, options, (64,), 7)[0][0])
    for leaf in ("codes", "scales", "smooth", "down", "up"):
        assert torch.equal(getattr(results[0], leaf), getattr(results[1], leaf))


@pytest.mark.parametrize("unit", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("group", [None, 8])
def test_hostile_inputs(unit: float, group: int | None) -> None:
    """Dead inputs, copied inputs, rows of zeros, huge and tiny ones: finite, and no worse than nearest."""
    x, (weight,) = inputs(32, 100), weights(32, 6)
    x[:, 3] = 0
    x[:, 7] = x[:, 8]
    weight[1] = 0
    weight[2] *= 1e-20
    weight[3] *= 1e8
    known = replace(statistics(x), gram=unit * (x.T @ x))
    scheme = replace(SCHEME, group_size=group, smooth=True, rank=2)
    (found,), stages = solve_ternary([weight], known, scheme, replace(FULL, smoothing="columns"), (32,), 0)
    assert torch.isfinite(found.reconstruct()).all()
    assert stages[0]["sweeps"] < stages[0]["nearest"]
    assert set(found.codes.unique().tolist()) <= {-1, 0, 1}


def test_dead_layers_keep_the_nearest_codes_or_zeros() -> None:
    (weight,) = weights(64, 8)
    plain = solve([weight], SCHEME, SolverOptions(), (64,), 0)[0]
    (found,), stages = solve_ternary([weight], statistics(torch.zeros(40, 64)), SCHEME, FULL, (64,), 0)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)
    assert set(stages[0].values()) == {0.0}
    (found,), stages = solve_ternary([torch.zeros(8, 64)], statistics(inputs(64, 100)), SCHEME, FULL, (64,), 0)
    assert not found.reconstruct().any()
    assert set(stages[0].values()) == {0.0}


def test_what_cannot_be_solved_is_refused_by_name() -> None:
    known, (weight,) = statistics(inputs(64, 100)), weights(64, 8)
    with pytest.raises(UserError, match="fc: expected a ternary scheme, not int4"):
        solve_ternary([weight], known, Scheme(), FULL, (64,), 0, ["fc"])
    with pytest.raises(UserError, match="fc: ternary codes with data need the Gram matrix"):
        solve_ternary([weight], replace(known, gram=None), SCHEME, FULL, (64,), 0, ["fc"])
    with pytest.raises(UserError, match="fc: smoothing 'grid' of ternary weights"):
        options = replace(FULL, smoothing="grid")
        solve_ternary([weight], known, replace(SCHEME, smooth=True), options, (64,), 0, ["fc"])
    weight[2, 3] = torch.nan
    with pytest.raises(UserError, match="fc holds 1 values that are NaN"):
        solve_ternary([weight], known, SCHEME, FULL, (64,), 0, ["fc"])
