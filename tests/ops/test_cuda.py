"""The reference on a GPU gives the numbers that it gives on a CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ops_oracle import Layer, assert_close, expect, random_inputs, random_layer
from torch import Tensor

from bittern import ops
from bittern.scheme import Scheme

pytestmark = pytest.mark.gpu


def on_gpu(layer: Layer) -> Layer:
    fields = vars(layer).items()
    return dataclasses.replace(layer, **{name: t.cuda() for name, t in fields if isinstance(t, Tensor)})


@pytest.mark.parametrize("path", ops.PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gaussian", "zero rows", "outlier"])
@pytest.mark.parametrize(("weight", "group"), [("int4", 64), ("nvfp4", 16), ("ternary", None)])
def test_agrees_with_the_formula_in_float64(
    path: str, dtype: torch.dtype, kind: str, weight: str, group: int | None
) -> None:
    segments, shift = (1000, 300), (0.0, 0.171875)
    layer = random_layer(0, 200, segments, weight, group, rank=16, smooth=True)
    for m in (0, 1, 33):
        inputs = random_inputs(1, kind, m, segments, dtype)
        moved = [x.cuda() for x in inputs]
        with ops.use_backend("torch"):
            y = ops.few_bit_linear(moved, path=path, shift=shift, **on_gpu(layer).kwargs())
        assert y.is_cuda and y.dtype == dtype
        assert_close(y.cpu(), *expect(inputs, layer, path, shift))


def test_gradients_pass() -> None:
    layer = random_layer(0, 64, (128,), rank=16, smooth=True)
    x = torch.randn(5, 128)
    here, there = x.clone().requires_grad_(), x.cuda().requires_grad_()
    ops.few_bit_linear([here], path="a16", **layer.kwargs()).sum().backward()
    ops.few_bit_linear([there], path="a16", **on_gpu(layer).kwargs()).sum().backward()
    assert here.grad is not None and there.grad is not None
    assert torch.allclose(there.grad.cpu(), here.grad, atol=1e-4)


def test_the_device_is_asked_for_its_capability() -> None:
    capability = torch.cuda.get_device_capability()
    for activations in (4, 8, 16):
        scheme = Scheme(activations=activations)
        assert ops.choose_path(scheme, "cuda") == ops.choose_path(scheme, "cuda", capability=capability)
