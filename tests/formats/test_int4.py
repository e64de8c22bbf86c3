from __future__ import annotations

import pytest
import torch
from coding_helpers import draw, kinds, seeds, sqnr, squared_error, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from bittern.formats import KLayout, decode, encode, int4


def lengths(blocks: torch.Tensor) -> torch.Tensor:
    return torch.full((blocks.shape[1],), float(blocks.shape[2]))


@pytest.mark.parametrize("rule", [int4.absmax, int4.search])
@settings(max_examples=60, deadline=None)
@given(kind=kinds, size=st.sampled_from([4, 16, 64, 300]), dtype=stored, seed=seeds)
def test_codes_are_the_nearest_to_the_scale_as_stored(rule, kind, size, dtype, seed):
    blocks = draw(kind, 3, 2 * size, seed).reshape(3, 2, size)
    codes, scales = rule(blocks, lengths(blocks), dtype)
    assert scales.dtype == dtype
    assert scales.isfinite().all()
    grid = torch.arange(-8, 8).double()
    distances = (blocks.double()[..., None] - grid * scales.double()[..., None, None]).abs()
    chosen = distances.gather(-1, (codes.long() + 8)[..., None])[..., 0]
    best = distances.amin(dim=-1)
    # Half-way cases may fall on either side of a rounded division.
    assert (chosen <= best * (1 + 1e-6)).all()


@settings(max_examples=100, deadline=None)
@given(kind=kinds, size=st.sampled_from([4, 16, 64, 300]), dtype=stored, seed=seeds)
def test_search_is_never_worse_than_absmax_in_any_group(kind, size, dtype, seed):
    blocks = draw(kind, 4, 2 * size, seed).reshape(4, 2, size)
    searched = squared_error(blocks, *int4.search(blocks, lengths(blocks), dtype))
    plain = squared_error(blocks, *int4.absmax(blocks, lengths(blocks), dtype))
    assert (searched <= plain * (1 + 1e-12)).all()


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_search_ends_within_a_percent_of_the_best_of_four_thousand_scales(kind):
    blocks = draw(kind, 32, 8 * 64, seed=1).reshape(32, 8, 64)
    found = squared_error(blocks, *int4.search(blocks, lengths(blocks), torch.float32)).sum()
    amax = blocks.abs().amax(dim=-1)
    best = torch.full(amax.shape, torch.inf, dtype=torch.float64)
    for span in torch.cat([torch.linspace(6, 20, 2000), -torch.linspace(6, 20, 2000)]):
        scales = amax / span
        codes = (blocks / scales[..., None]).round().clamp(-8, 7)
        best = best.minimum(squared_error(blocks, codes, scales))
    assert found <= best.sum() * 1.01


def test_the_largest_weight_may_fall_on_minus_eight_whatever_its_sign():
    ramp = torch.arange(-7.0, 9.0)
    for weight in (ramp, -ramp):
        codes, scales = int4.search(weight[None, None], torch.tensor([16.0]), torch.bfloat16)
        assert torch.equal(codes[0, 0] * scales.float()[0, 0], weight)
        assert int(codes.min()) == -8


@pytest.mark.parametrize("rule", [int4.absmax, int4.search])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_group_of_zeros_stays_zero(rule, dtype):
    blocks = torch.zeros(2, 3, 64)
    blocks[0, 1] = 1.0
    codes, scales = rule(blocks, lengths(blocks), dtype)
    decoded = codes.float() * scales.float()[..., None]
    assert torch.equal(decoded == 0, blocks == 0)
    assert scales.isfinite().all()


@pytest.mark.parametrize("rule", [int4.absmax, int4.search])
def test_a_scale_beyond_fp16_saturates(rule):
    blocks = torch.full((1, 1, 64), 1e9)
    codes, scales = rule(blocks, lengths(blocks), torch.float16)
    assert scales.abs().item() == 65504
    assert int(codes.abs().min()) >= 7


# Measured elsewhere for abs-max rounding; the search is our own and held to what it reached.
@pytest.mark.parametrize(
    ("rule", "group", "gaussian", "laplace"),
    [(int4.absmax, 64, 19.4, 17.0), (int4.absmax, None, 16.2, 12.2), (int4.search, 64, 20.9, 18.5)],
)
def test_signal_to_noise(rule, group, gaussian, laplace):
    layout = KLayout((3072,), group)
    for kind, expected in (("gaussian", gaussian), ("laplace", laplace)):
        weight = draw(kind, 256, 3072, seed=0)
        codes, scales = encode(weight, layout, rule, torch.bfloat16)
        assert sqnr(weight, decode(codes, scales, layout)) == pytest.approx(expected, abs=0.12)
