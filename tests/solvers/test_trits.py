"""The steps of the ternary solver, each against float64 or against trying everything."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bittern.formats import KLayout
from bittern.solvers.trits import columns, descended, fitted, output_errors, steps_of


def inputs(k: int, m: int = 300, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    return torch.randn(m, k, generator=generator) @ mix * torch.linspace(0.3, 2, k)


def draw(n: int, k: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A weight, and codes that have nothing to do with it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    return weight, torch.randint(-1, 2, (n, k), generator=generator).float()


def lacking(x: Tensor, weight: Tensor, coded: Tensor) -> Tensor:
    return (x.double() @ (weight.double() - coded.double()).T).square().sum(dim=0)


def test_the_trace_is_the_error_of_the_outputs() -> None:
    x, (weight, coded) = inputs(40), draw(7, 40)
    torch.testing.assert_close(output_errors(weight - coded, x.T @ x), lacking(x, weight, coded), rtol=1e-5, atol=0)
    assert not output_errors(weight - weight, x.T @ x).any()


@pytest.mark.parametrize(("segments", "group"), [((24,), None), ((24,), 8), ((10, 14), 4), ((10, 14), None)])
def test_scales_are_those_of_regression(segments: tuple[int, ...], group: int | None) -> None:
    layout = KLayout(segments, group)
    x, (weight, codes) = inputs(24), draw(9, 24)
    old = torch.ones(9, layout.num_groups)
    new_codes, scales = fitted(weight, x.T @ x, codes, old, layout)
    assert (scales >= 0).all()
    found = lacking(x, weight, new_codes * steps_of(scales, layout))
    for row in range(9):
        # One column of the design a group: what its codes make of the inputs.
        parts = [
            layout.unpad(layout.expand_scales(torch.eye(layout.num_groups)[g][None]))[0]
            for g in range(layout.num_groups)
        ]
        design = torch.stack([x.double() @ (codes[row] * part).double() for part in parts], dim=1)
        best = torch.linalg.pinv(design) @ (x.double() @ weight[row].double())[:, None]
        least = float((design @ best - (x.double() @ weight[row].double())[:, None]).square().sum())
        assert float(found[row]) == pytest.approx(least, rel=1e-4)


def test_a_group_without_codes_keeps_its_scale_and_others_are_not_disturbed() -> None:
    layout = KLayout((16,), 8)
    x, (weight, codes) = inputs(16), draw(5, 16)
    codes[2, 8:] = 0
    codes[3] = 0
    old = torch.full((5, 2), 0.75)
    new_codes, scales = fitted(weight, x.T @ x, codes, old, layout)
    assert scales[2, 1] == scales[3, 0] == scales[3, 1] == 0.75
    alone_codes, alone = fitted(weight[2:3, :8], (x.T @ x)[:8, :8], codes[2:3, :8], old[:1, :1], KLayout((8,), 8))
    coupled = weight[2, 8:] @ (x.T @ x)[8:, :8]
    # The first group also answers for what the second leaves undone.
    assert bool(coupled.any())
    assert float(lacking(x, weight, new_codes * steps_of(scales, layout))[2]) <= float(
        lacking(x, weight[2:3], torch.cat([alone_codes * alone, torch.zeros(1, 8)], dim=1))
    )


def one_by_one(weight: Tensor, x: Tensor, codes: Tensor, steps: Tensor) -> Tensor:
    """Coordinate descent as its definition says, trying all three codes in float64."""
    gram = x.T @ x
    found = codes.clone()
    for j in gram.diagonal().argsort(descending=True, stable=True).tolist():
        tried = []
        for code in (-1.0, 0.0, 1.0):
            candidate = found.clone()
            candidate[:, j] = code
            tried.append(lacking(x, weight, candidate * steps))
        found[:, j] = torch.stack(tried).argmin(dim=0).float() - 1
    return found


@pytest.mark.parametrize("k", [12, 150])
def test_a_sweep_sets_every_code_to_its_best(k: int) -> None:
    x, (weight, codes) = inputs(k, 400), draw(6, k)
    steps = torch.rand(6, 1, generator=torch.Generator().manual_seed(3)).add(0.3).expand(6, k)
    found = descended(weight, x.T @ x, codes, steps)
    # Float32 may take the other side of a tie, and what follows in that row then differs.
    assert (found == one_by_one(weight, x, codes, steps)).all(dim=1).float().mean() > 0.8
    assert (lacking(x, weight, found * steps) < lacking(x, weight, codes * steps)).all()


def test_sweeps_end_where_no_single_code_can_be_bettered() -> None:
    x, (weight, codes) = inputs(10), draw(8, 10)
    steps = torch.full((8, 10), 0.9)
    for _ in range(30):
        codes = descended(weight, x.T @ x, codes, steps)
    best = lacking(x, weight, codes * steps)
    for j, code in itertools.product(range(10), (-1.0, 0.0, 1.0)):
        candidate = codes.clone()
        candidate[:, j] = code
        assert (lacking(x, weight, candidate * steps) >= best * (1 - 1e-5)).all()


def test_a_scale_of_zero_leaves_codes_alone() -> None:
    x, (weight, codes) = inputs(10), draw(4, 10)
    steps = torch.full((4, 10), 0.9)
    steps[1] = 0
    assert torch.equal(descended(weight, x.T @ x, codes, steps)[1], codes[1])


def test_smoothing_is_that_of_regression() -> None:
    x, (weight, codes) = inputs(14), draw(30, 14)
    coded = codes * 0.8
    smooth = columns(weight, x.T @ x, coded, torch.ones(14))
    found = float(lacking(x, weight, coded / smooth).sum())
    # Outputs of all rows, one after another: linear in 1 / s.
    design = torch.cat([x.double() * row for row in coded.double()])
    wanted = (x.double() @ weight.double().T).T.reshape(-1, 1)
    best = (torch.linalg.pinv(design) @ wanted)[:, 0]
    bounded = best.clamp(1 / 8, 8)
    least = float(lacking(x, weight, coded * bounded).sum())
    assert found == pytest.approx(least, rel=0.02) or bool((best < 1 / 8).any())
    assert found < float(lacking(x, weight, coded).sum())


def test_columns_without_codes_keep_their_smoothing() -> None:
    x, (weight, codes) = inputs(8), draw(6, 8)
    codes[:, 3] = 0
    old = torch.linspace(0.5, 2, 8)
    smooth = columns(weight, x.T @ x, codes, old)
    assert float(smooth[3]) == pytest.approx(float(old[3]), rel=1e-6)
    ratio = smooth / old
    assert bool(((ratio > 0.124) & (ratio < 8.01)).all())
