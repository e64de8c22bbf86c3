from __future__ import annotations

import itertools

import pytest
import torch

from bittern.formats import KLayout, decode, encode, int4
from bittern.solvers.gptq import gptq


def correlated(k: int, m: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    return torch.randn(m, k, generator=generator) @ mix * torch.linspace(0.2, 3, k)


def output_error(weight: torch.Tensor, coded: torch.Tensor, x: torch.Tensor) -> float:
    return float((x.double() @ (weight - coded).double().T).square().sum())


def column_by_column(weight: torch.Tensor, hessian: torch.Tensor, steps: torch.Tensor, damping: float) -> torch.Tensor:
    """Optimal brain quantization in float64: after each column the best real values of those that are left."""
    k = weight.shape[1]
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(k)
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    w, codes = weight.double().clone(), torch.zeros_like(weight, dtype=torch.int8)
    for position, j in enumerate(order):
        code = (w[:, j] / steps[:, j].double()).round().clamp(-8, 7)
        codes[:, j] = code.to(torch.int8)
        error = w[:, j] - code * steps[:, j].double()
        w[:, j] -= error
        rest = order[position + 1 :]
        if rest:
            # Minimises tr(D H D^T) over the rest of D with D_j = error given.
            w[:, rest] += error[:, None] * torch.linalg.solve(h[rest][:, rest], h[rest, j])[None]
    return codes


@pytest.mark.parametrize("group", [4, 8, None])
def test_codes_are_those_of_optimal_brain_quantization(group: int | None) -> None:
    x, layout = correlated(24, 400), KLayout((16, 8), group)
    weight = torch.randn(11, 24, generator=torch.Generator().manual_seed(1))
    hessian = x.T @ x
    codes, scales = gptq(weight, hessian, layout, int4.absmax, torch.float32)
    _, expected_scales = encode(weight, layout, int4.absmax, torch.float32)
    assert torch.equal(scales, expected_scales)
    steps = layout.unpad(layout.expand_scales(scales))
    expected = column_by_column(weight, hessian, steps, 0.01)
    # Float32 may take the other side of a tie, and what follows in that row then differs.
    assert (layout.unpad(codes) == expected).all(1).float().mean() > 0.9


def test_output_error_falls_on_fresh_inputs_and_nears_brute_force() -> None:
    x, layout = correlated(6, 4000), KLayout((6,), 8)
    fresh = correlated(6, 4000)[2000:]
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    codes, scales = gptq(weight, x.T @ x, layout, int4.absmax, torch.float32)
    nearest, _ = encode(weight, layout, int4.absmax, torch.float32)
    found, plain = (output_error(weight, decode(c, scales, layout), fresh) for c in (codes, nearest))
    best = 0.0
    offsets = torch.tensor(list(itertools.product((-1, 0, 1), repeat=6)))
    for row in range(5):
        floor = nearest[row, :6]
        tried = (floor + offsets).clamp(-8, 7) * scales[row, 0]
        best += float((fresh @ (weight[row] - tried).T).double().square().sum(0).min())
    assert found < 0.75 * plain
    # The best of all codes beside the nearest ones; GPTQ may go further from them.
    assert found < 1.6 * best


def test_more_columns_than_a_block_and_padding() -> None:
    x, layout = correlated(300, 2000), KLayout((200, 100), 64)
    weight = torch.randn(9, 300, generator=torch.Generator().manual_seed(3))
    codes, scales = gptq(weight, x.T @ x, layout, int4.search, torch.bfloat16)
    assert codes.shape == (9, layout.padded_k)
    assert layout.pad(layout.unpad(codes)).equal(codes)
    nearest, _ = encode(weight, layout, int4.search, torch.bfloat16)
    found, plain = (output_error(weight, decode(c, scales, layout), x) for c in (codes, nearest))
    assert found < 0.6 * plain


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_hostile_inputs(scale: float) -> None:
    """Dead inputs, copied inputs, a weight of zeros: still codes, none worse than nearest."""
    x, layout = correlated(16, 100), KLayout((16,), 8)
    x[:, 3] = 0
    x[:, 7] = x[:, 8]
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(4))
    weight[1] = 0
    codes, scales = gptq(weight, scale * (x.T @ x), layout, int4.absmax, torch.bfloat16)
    nearest, _ = encode(weight, layout, int4.absmax, torch.bfloat16)
    found, plain = (output_error(weight, decode(c, scales, layout), x) for c in (codes, nearest))
    assert found <= plain
    assert not codes[1].any()
    dead, _ = gptq(weight, torch.zeros(16, 16), layout, int4.absmax, torch.bfloat16)
    assert torch.equal(dead, nearest)
