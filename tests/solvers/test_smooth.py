from __future__ import annotations

import pytest
import torch

from bittern.formats import KLayout
from bittern.solvers.smooth import span_smoothing


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spans = torch.rand(48, generator=generator) * 8 + 0.1
    return [torch.randn(n, 48, generator=generator) * spans for n in (5, 30)]


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_it_is_the_inverse_power_of_the_span_with_geometric_mean_one_per_segment(exponent):
    members = weights()
    layout = KLayout((32, 16), 16)
    smooth = span_smoothing(members, layout, exponent, torch.float32)
    span = torch.cat(members).double().abs().amax(dim=0)
    for segment in layout:
        part = span[segment.logical] ** -exponent
        expected = part / part.log().mean().exp()
        assert torch.allclose(smooth[segment.logical].double(), expected, rtol=1e-5)
        assert smooth[segment.logical].log().mean().abs() < 1e-5


def test_magnitudes_multiply_their_power():
    members, layout = weights(), KLayout((32, 16), 16)
    magnitudes = torch.rand(48, generator=torch.Generator().manual_seed(3)) * 5 + 0.1
    smooth = span_smoothing(members, layout, 0.2, torch.float32, magnitudes, 0.4).double()
    expected = magnitudes.double() ** 0.4 / torch.cat(members).double().abs().amax(dim=0) ** 0.2
    for segment in layout:
        part = expected[segment.logical]
        assert torch.allclose(smooth[segment.logical], part / part.log().mean().exp(), rtol=1e-5)


def test_a_dead_channel_stays_finite():
    smooth = span_smoothing(weights(), KLayout((48,), 16), 0.5, torch.bfloat16, torch.arange(48.0), 1.0)
    assert smooth.isfinite().all() and (smooth > 0).all()


def test_exponent_one_makes_all_spans_equal():
    members = weights()
    smooth = span_smoothing(members, KLayout((48,), 16), 1.0, torch.float32)
    span = (torch.cat(members) * smooth).abs().amax(dim=0)
    assert torch.allclose(span, span[0].expand_as(span), rtol=1e-5)


def test_exponent_zero_is_exactly_one():
    assert torch.equal(span_smoothing(weights(), KLayout((48,), 16), 0.0, torch.bfloat16), torch.ones(48).bfloat16())


def test_it_does_not_depend_on_the_scale_of_the_weights():
    layout = KLayout((48,), 16)
    small = span_smoothing([w * 2.0**-90 for w in weights()], layout, 0.5, torch.float32)
    assert torch.allclose(small, span_smoothing(weights(), layout, 0.5, torch.float32), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dead_inputs_stay_finite_and_positive(dtype):
    weight = torch.ones(4, 48)
    weight[:, :8] = 0
    weight[:, 8:12] = 1e-40
    smooth = span_smoothing([weight], KLayout((16, 32), 16), 1.0, dtype)
    assert smooth.dtype == dtype
    assert smooth.isfinite().all()
    assert (smooth > 0).all()
    assert torch.equal(span_smoothing([torch.zeros(4, 48)], KLayout((48,), 16), 1.0, dtype), torch.ones(48).to(dtype))
