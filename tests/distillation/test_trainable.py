"""Layers that learn compute what their deployed layers compute, and their gradients are the ones that are meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bittern.distillation.trainable import TrainableLayer, trainable
from bittern.layers import FewBitLayer, QuantConv2d, QuantLinear, flat_weight
from bittern.scheme import Scheme
from bittern.solvers import SolverOptions, solve

CASES = {
    "ternary, one scale a row": (Scheme(weight="ternary", group_size=None), (48,), None),
    "ternary in groups": (Scheme(weight="ternary", group_size=16, packing="trits"), (48,), None),
    "padded": (Scheme(weight="ternary", group_size=64), (50,), None),
    "two inputs": (Scheme(weight="ternary", group_size=None), (24, 30), None),
    "two inputs, padded groups": (Scheme(weight="ternary", group_size=16), (24, 30), None),
    "int4": (Scheme(weight="int4", group_size=16, scale_dtype="fp16"), (48,), None),
    "smoothed, with a branch": (Scheme(weight="ternary", group_size=16, rank=4, smooth=True), (48,), None),
    "kernel": (Scheme(weight="ternary", group_size=8), (8,) * 9, (3, 3)),
}


def layers(case: str) -> tuple[nn.Linear | nn.Conv2d, FewBitLayer]:
    scheme, segments, kernel = CASES[case]
    torch.manual_seed(len(case))
    module = nn.Conv2d(segments[0], 10, kernel, 2, padding=1) if kernel else nn.Linear(sum(segments), 10)
    options = SolverOptions(smoothing="span" if scheme.smooth else "none")
    (solution,) = solve([flat_weight(module).detach()], scheme, options, segments, seed=0)
    kind = QuantLinear if kernel is None else QuantConv2d
    return module, kind.from_solution(module, scheme, segments, solution)


def moved(layer: TrainableLayer) -> TrainableLayer:
    """As if it had learned."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return layer


def inputs(module: nn.Linear | nn.Conv2d) -> Tensor:
    shape = (2, module.in_channels, 6, 6) if isinstance(module, nn.Conv2d) else (3, module.in_features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_what_is_deployed_is_what_was_trained(case: str) -> None:
    module, few_bit = layers(case)
    few_bit.path = "a16"
    start = trainable(module, few_bit, reach=0.5)
    assert_same(_weight(few_bit), start.flat(), few_bit.scheme, 1e-6)
    learned = moved(start)
    assert (_weight(few_bit) - learned.flat()).norm() > 0.1 * learned.flat().norm()
    learned.export(few_bit)
    # What a branch has learned is rounded to its stored type only here.
    assert_same(_weight(few_bit), learned.flat(), few_bit.scheme, 0.01)
    if not few_bit.scheme.rank:
        x = inputs(module)
        torch.testing.assert_close(few_bit(x), learned(x), rtol=1e-5, atol=1e-5)


def assert_same(deployed: Tensor, learned: Tensor, scheme: Scheme, tolerance: float) -> None:
    """To the last bit, but for the sums of a branch."""
    if scheme.rank:
        torch.testing.assert_close(deployed, learned, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(deployed, learned)


def _weight(few_bit: FewBitLayer) -> Tensor:
    weight = few_bit.parts().dequantize(torch.float32)
    return weight.permute(0, 2, 3, 1).flatten(1) if isinstance(few_bit, QuantConv2d) else weight


def test_gradients_pass_the_rounding_and_are_exact_in_the_scales() -> None:
    module, few_bit = layers("ternary in groups")
    layer = moved(trainable(module, few_bit, reach=0.5))
    x, y = inputs(module), torch.randn(3, 10, generator=torch.Generator().manual_seed(2))
    (layer(x) - y).square().sum().backward()
    codes = layer.latent.detach().double().round().clamp(-1, 1)
    scales = (layer.base.double() * layer.gain.detach().double().exp()).float().to(torch.bfloat16).double()
    spread = scales.repeat_interleave(16, dim=1)
    error = x.double() @ (codes * spread).T + layer.bias.double() - y.double()
    felt = 2 * error.T @ x.double()
    torch.testing.assert_close(layer.latent.grad.double(), felt * spread, rtol=1e-4, atol=1e-5)
    whole = (layer.base.double() * layer.gain.detach().double().exp()).repeat_interleave(16, dim=1)
    in_scales = (felt * codes * whole).unflatten(1, (-1, 16)).sum(dim=2)
    torch.testing.assert_close(layer.gain.grad.double(), in_scales, rtol=1e-4, atol=1e-5)


def test_codes_that_a_solver_chose_against_the_nearest_survive() -> None:
    module, few_bit = layers("ternary, one scale a row")
    other = few_bit.scheme.format.unpack(few_bit.codes, 48).roll(1, dims=1)
    few_bit.load("codes", few_bit.scheme.format.pack(other))
    layer = trainable(module, few_bit, reach=0.5)
    assert torch.equal(layer.latent.round().clamp(-1, 1), other.float())
    assert layer.latent.abs().max() <= 1.5
