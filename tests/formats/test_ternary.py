from __future__ import annotations

import pytest
import torch
from coding_helpers import STORED, draw, kinds, seeds, sqnr, squared_error, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from bittern.formats import KLayout, decode, encode, round_to, ternary


def by_brute_force(weight: torch.Tensor, dtype: torch.dtype) -> float:
    """Least squared error over all 3^n codes, each under its best stored scale."""
    codes = torch.cartesian_prod(*[torch.arange(-1.0, 2.0, dtype=torch.float64)] * weight.numel())
    codes = codes.reshape(-1, weight.numel())
    scales = codes @ weight.double() / codes.square().sum(dim=1).clamp(min=1)
    return float(squared_error(weight, codes, round_to(scales, dtype)).min())


@settings(max_examples=150, deadline=None)
@given(kind=kinds, n=st.integers(1, 8), dtype=stored, seed=seeds)
def test_no_codes_beat_least_squares(kind, n, dtype, seed):
    weight = draw(kind, 1, n, seed)[0]
    codes, scales = ternary.least_squares(weight[None, None], torch.tensor([float(n)]), dtype)
    found = float(squared_error(weight[None, None], codes, scales))
    # Relative slack for float64 cancellation: the errors are differences of squares.
    assert found <= by_brute_force(weight, dtype) + 1e-7 * float(weight.double().square().sum())


@settings(max_examples=60, deadline=None)
@given(kind=kinds, size=st.sampled_from([4, 64, 300]), dtype=stored, seed=seeds)
def test_least_squares_beats_absmean_in_every_group(kind, size, dtype, seed):
    blocks = draw(kind, 4, 2 * size, seed).reshape(4, 2, size)
    lengths = torch.full((2,), float(size))
    best = squared_error(blocks, *ternary.least_squares(blocks, lengths, dtype))
    plain = squared_error(blocks, *ternary.absmean(blocks, lengths, dtype))
    assert (best <= plain + 1e-7 * blocks.double().square().sum(dim=-1)).all()


@settings(max_examples=60, deadline=None)
@given(
    segments=st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple),
    group=st.sampled_from([None, 4, 16]),
    seed=seeds,
)
@pytest.mark.parametrize("rule", [ternary.least_squares, ternary.absmean])
def test_padding_changes_nothing(rule, segments, group, seed):
    layout = KLayout(segments, group)
    weight = draw("gaussian", 2, layout.k, seed)
    codes, scales = encode(weight, layout, rule, torch.bfloat16)
    for segment in layout:
        part = weight[:, segment.logical]
        for i, g in enumerate(range(segment.groups.start, segment.groups.stop)):
            alone = part[:, i * segment.size : (i + 1) * segment.size]
            blocks = alone[:, None]
            _, expected = rule(blocks, torch.tensor([float(alone.shape[1])]), torch.bfloat16)
            assert torch.equal(scales[:, g], expected[:, 0])
    assert int((layout.pad(torch.ones_like(weight)) == 0).logical_and(codes != 0).sum()) == 0


@pytest.mark.parametrize("rule", [ternary.least_squares, ternary.absmean])
@pytest.mark.parametrize("dtype", STORED)
def test_a_group_of_zeros_stays_zero(rule, dtype):
    blocks = torch.zeros(1, 2, 64)
    blocks[0, 1, 3] = -2.0
    codes, scales = rule(blocks, torch.tensor([64.0, 64.0]), dtype)
    assert scales[0, 0] == 0
    assert not codes[0, 0].any()
    assert codes[0, 1].nonzero().tolist() == [[3]]


def test_one_large_weight_takes_the_scale_alone():
    weight = torch.tensor([[[100.0, 1.0, -1.0, 1.0]]])
    codes, scales = ternary.least_squares(weight, torch.tensor([4.0]), torch.float32)
    assert codes.tolist() == [[[1, 0, 0, 0]]]
    assert scales.item() == 100


# Published and confirmed values in dB; least squares at 64 a group.
@pytest.mark.parametrize(
    ("rule", "group", "gaussian", "laplace"),
    [(ternary.absmean, None, 5.8, 4.1), (ternary.least_squares, 64, 7.35, 6.1)],
)
def test_signal_to_noise(rule, group, gaussian, laplace):
    layout = KLayout((3072,), group)
    for kind, expected in (("gaussian", gaussian), ("laplace", laplace)):
        weight = draw(kind, 256, 3072, seed=0)
        codes, scales = encode(weight, layout, rule, torch.bfloat16)
        assert sqnr(weight, decode(codes, scales, layout)) == pytest.approx(expected, abs=0.08)
