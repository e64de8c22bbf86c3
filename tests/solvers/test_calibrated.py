from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bittern.errors import UserError
from bittern.ops import few_bit_linear
from bittern.scheme import Scheme
from bittern.solvers import Solution, SolverOptions, solve, solve_calibrated
from bittern.trajectories import Statistics

FULL = SolverOptions(smoothing="descent", branch="outputs", rounding="gptq", refits=1, svd_iterations=2)
SCHEME = Scheme(activations=4, rank=4, smooth=True)


def inputs(k: int, m: int = 1500, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=torch.Generator().manual_seed(9)) / k**0.5 + torch.eye(k)
    return torch.randn(m, k, generator=generator) @ mix * torch.logspace(-0.5, 0.7, k)


def statistics(x: Tensor) -> Statistics:
    return Statistics(x, x.T @ x, x.abs().amax(0), len(x))


def weights(k: int, *sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, k, generator=generator) for n in sizes]


def output(x: Tensor, solution: Solution, scheme: Scheme) -> Tensor:
    path = {4: "a4", 16: "a16"}[scheme.activations]
    return few_bit_linear(
        list(x.split(solution.layout.segments, dim=-1)), scheme.format.pack(solution.codes), solution.scales,
        solution.smooth, solution.down, solution.up, None, "int4", scheme.group_size, path, scheme.shift,
    )  # fmt: skip


def error(x: Tensor, weight: Tensor, solution: Solution, scheme: Scheme) -> float:
    y = x @ weight.T
    return float((output(x, solution, scheme) - y).norm() / y.norm())


def test_the_reported_errors_are_those_of_the_layer_and_fall() -> None:
    x, parts = inputs(128), weights(128, 24, 40)
    found, stages = solve_calibrated(parts, statistics(x), SCHEME, FULL, (128,), 0)
    assert found[0].smooth is found[1].smooth
    assert found[0].down is found[1].down
    judged = x[:: -(-len(x) // 2048)]
    for weight, solution, table in zip(parts, found, stages, strict=True):
        assert list(table) == ["nearest", "smoothing", "descent", "branch", "gptq", "refit"]
        assert table["refit"] == pytest.approx(error(judged, weight, solution, SCHEME), rel=1e-3)
        assert table["nearest"] > table["smoothing"] > table["gptq"]
    both = [sum(table[stage] ** 2 for table in stages) for stage in ("branch", "gptq", "refit")]
    assert both[0] > both[1] >= both[2]


def test_fresh_inputs_gain_as_much_over_the_data_free_solver() -> None:
    x, fresh, (weight,) = inputs(128), inputs(128, seed=5), weights(128, 48)
    plain = solve([weight], replace(SCHEME, smooth=False), SolverOptions(), (128,), 0)[0]
    found, _ = solve_calibrated([weight], statistics(x), SCHEME, FULL, (128,), 0)
    assert error(fresh, weight, found[0], SCHEME) < 0.85 * error(fresh, weight, plain, SCHEME)


def test_segments_shifts_and_padding() -> None:
    scheme = replace(SCHEME, shift=(0.0, 0.171875))
    x, (weight,) = inputs(64 + 40), weights(104, 32)
    x[:, 64:] = torch.nn.functional.gelu(x[:, 64:])
    found, stages = solve_calibrated([weight], statistics(x), scheme, FULL, (64, 40), 0)
    assert found[0].codes.shape == (32, 128)
    assert stages[0]["refit"] == pytest.approx(error(x, weight, found[0], scheme), rel=1e-3)
    assert stages[0]["refit"] < 0.7 * stages[0]["nearest"]


def test_16_bit_activations_use_the_sums_over_all_tokens() -> None:
    scheme, options = Scheme(), SolverOptions(rounding="gptq")
    x, (weight,) = inputs(64), weights(64, 16)
    known = replace(statistics(x), rows=x[:10])
    found, stages = solve_calibrated([weight], known, scheme, options, (64,), 0)
    assert list(stages[0]) == ["nearest", "gptq"]
    plain = solve([weight], scheme, SolverOptions(), (64,), 0)[0]
    assert error(x, weight, found[0], scheme) < 0.8 * error(x, weight, plain, scheme)


def test_outputs_that_are_felt_come_first() -> None:
    x, parts = inputs(128), weights(128, 24, 24)
    options = replace(FULL, refits=0, smoothing="grid")
    felt = [torch.eye(24), 1e-4 * torch.eye(24)]
    alike, _ = solve_calibrated(parts, statistics(x), SCHEME, options, (128,), 0)
    found, _ = solve_calibrated(parts, statistics(x), SCHEME, options, (128,), 0, sensitivity=felt)
    before, after = ([error(x, w, s, SCHEME) for w, s in zip(parts, given, strict=True)] for given in (alike, found))
    assert after[0] < 0.97 * before[0]
    assert after[1] > before[1]


def test_same_seed_same_bytes_whatever_the_global_state() -> None:
    x, parts = inputs(64, 300), weights(64, 16)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(solve_calibrated(parts, statistics(x), SCHEME, FULL, (64,), 7)[0][0])
    for leaf in ("codes", "scales", "smooth", "down", "up"):
        assert torch.equal(getattr(results[0], leaf), getattr(results[1], leaf))


def test_dead_layers_get_zeros() -> None:
    x = torch.zeros(40, 64)
    (found,), _ = solve_calibrated(weights(64, 8), statistics(x), SCHEME, FULL, (64,), 0)
    assert not output(x, found, SCHEME).any()
    zero = [torch.zeros(8, 64)]
    (found,), stages = solve_calibrated(zero, statistics(inputs(64, 100)), SCHEME, FULL, (64,), 0)
    assert not found.reconstruct().any()
    assert set(stages[0].values()) == {0.0}


def test_what_cannot_be_solved_is_refused_by_name() -> None:
    x, bad = inputs(64, 100), weights(64, 8)
    with pytest.raises(UserError, match="fc: calibrated stages are for int4"):
        solve_calibrated(bad, statistics(x), Scheme(weight="ternary"), FULL, (64,), 0, ["fc"])
    bad[0][2, 3] = torch.nan
    with pytest.raises(UserError, match="fc holds 1 values that are NaN"):
        solve_calibrated(bad, statistics(x), SCHEME, FULL, (64,), 0, ["fc"])
