from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bittern.formats import KLayout
from bittern.ops import few_bit_linear
from bittern.scheme import Scheme
from bittern.solvers.inputs import rounded, smoothed
from bittern.solvers.smooth_descent import descend, rounding_error
from bittern.solvers.smooth_grid import best_smoothing, candidates, smoothing

SCHEME = Scheme(activations=4, smooth=True)
SHIFTED = replace(SCHEME, shift=(0.0, 0.171875))


def rows(k: int, m: int = 200, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator) * torch.logspace(-1, 1.2, k)[torch.randperm(k, generator=generator)]


def test_the_39_published_candidates() -> None:
    found = list(candidates())
    assert len(found) == len(set(found)) == 39
    assert found[0] == (0.0, 0.0)
    assert {(0.05, 0.0), (0.95, 0.0), (0.05, 0.95), (0.95, 0.050000000000000044)} <= set(found)


def test_the_formula_by_segment() -> None:
    layout = KLayout((3, 2), 4)
    x, w = torch.tensor([1.0, 4, 16, 9, 1]), torch.tensor([2.0, 2, 8, 4, 1])
    found = smoothing(x, w, 0.5, 0.25, layout, torch.float32)
    raw = x**0.5 / w**0.25
    for part in (slice(0, 3), slice(3, 5)):
        expected = raw[part] / raw[part].log().mean().exp()
        torch.testing.assert_close(found[part], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dead_and_huge_inputs_stay_in_range(dtype: torch.dtype) -> None:
    x, w = torch.tensor([0.0, 1e-30, 1e30, 1.0]), torch.tensor([1e30, 0.0, 1.0, 1e-30])
    for a, b in candidates():
        found = smoothing(x, w, a, b, KLayout((4,), 4), dtype)
        assert torch.isfinite(found).all()
        assert (found > 0).all()
    assert torch.equal(smoothing(0 * x, 0 * w, 0.5, 0.5, KLayout((4,), 4), dtype), torch.ones(4, dtype=dtype))


def test_the_least_error_wins_and_the_first_of_equals() -> None:
    layout, x = KLayout((4,), 4), torch.tensor([1.0, 2, 4, 8])
    wanted = smoothing(x, x.flip(0), 0.3, 0.7, layout, torch.float32)
    found, error = best_smoothing(x, x.flip(0), layout, torch.float32, lambda s: float((s - wanted).norm()))
    assert torch.equal(found, wanted)
    assert error == 0
    first, _ = best_smoothing(x, x, layout, torch.float32, lambda s: 1.0)
    assert torch.equal(first, torch.ones(4))


@pytest.mark.parametrize("scheme", [SCHEME, SHIFTED, replace(SCHEME, activations=8), replace(SCHEME, activations=16)])
def test_rounded_inputs_are_what_the_layer_multiplies(scheme: Scheme) -> None:
    """An identity weight shows them: codes -8 under scales of -1/8, which fold exactly; no branch."""
    segments, k = (64, 72), 136
    layout = scheme.layout(segments)
    x = rows(k, 30)
    x[:, 64:] = torch.nn.functional.gelu(x[:, 64:])
    smooth = torch.linspace(0.5, 2, k)
    codes = layout.pad(-8 * torch.eye(k, dtype=torch.int8))
    path = {4: "a4", 8: "a8-int8", 16: "a16"}[scheme.activations]
    y = few_bit_linear(
        list(x.split(segments, dim=-1)), scheme.format.pack(codes), torch.full((k, layout.num_groups), -0.125), smooth,
        None, None, None, "int4", 64, path, scheme.shift,
    )  # fmt: skip
    torch.testing.assert_close(rounded(x, smooth, layout, scheme), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", [SCHEME, SHIFTED, replace(SCHEME, activations=8)])
def test_the_differentiable_error_is_the_real_one(scheme: Scheme) -> None:
    segments = (64, 70)
    layout, x = scheme.layout(segments), rows(134, 40)
    x[:, 64:] = torch.nn.functional.gelu(x[:, 64:])
    smooth = torch.linspace(0.5, 2, 134).requires_grad_()
    error = rounding_error(x, smooth, layout, scheme)
    expected = smoothed(x, smooth.detach()) - rounded(x, smooth.detach(), layout, scheme)
    # A value on the edge between two codes may fall on either side: equally wrong.
    torch.testing.assert_close(error.detach().abs(), expected.abs(), rtol=1e-3, atol=2e-3)
    error.square().sum().backward()
    assert smooth.grad is not None
    assert smooth.grad.abs().max() > 0


def test_descent_lowers_the_output_error_and_beats_every_candidate() -> None:
    """Inputs that peak alike, some in every token and some in one: no power of the peaks tells them apart."""
    k, layout = 128, KLayout((128,), 64)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2000, k, generator=generator)
    x[:, ::8] *= 10
    x[::500, 1::8] *= 10
    weight = torch.randn(64, k, generator=generator)
    inputs, spans = x.abs().amax(0), weight.abs().amax(0)

    def error(smooth: Tensor, seen: Tensor) -> float:
        missed = smoothed(seen, smooth) - rounded(seen, smooth, layout, SCHEME)
        return float((missed @ (weight * smooth.float()).T).norm())

    start, _ = best_smoothing(inputs, spans, layout, torch.float32, lambda s: error(s, x[:500]))
    found = descend(start, x[:500], None, lambda s: (weight, weight), layout, SCHEME, torch.float32)
    assert error(found, x[500:]) < 0.99 * error(start, x[500:])
