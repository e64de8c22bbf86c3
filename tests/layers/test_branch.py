"""Products added to a branch: the numbers of y + strength · unit · (x · down^T) · up^T, and every bit back again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from layers_helpers import few_bit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from bittern.errors import UserError
from bittern.layers import FewBitLayer, QuantConv2d, QuantLinear, flat_weight, group_linear
from bittern.layers.branch import Product, WidenedBranch
from bittern.scheme import Scheme

SCHEMES = {
    "svdquant": Scheme(rank=16, smooth=True, activations=4),
    "svdquant-fast": Scheme(rank=16, activations=4),
    "ternary": Scheme(weight="ternary", group_size=None, activations=8),
    "int4": Scheme(activations=8),
    "W4A16": Scheme(activations=16),
    "nvfp4": Scheme(weight="nvfp4", group_size=16, scale_dtype="e4m3", rank=8, activations=4),
    "odd rank": Scheme(rank=5, smooth=True, activations=4, branch_dtype="fp16"),
}
# Factors of 16 bits, two of them, and the float32 sums of a layer.
OF_THE_DELTA = 6e-3


def product(name: str, rows: tuple[int, int], k: int, rank: int, seed: int = 0, **others: Any) -> Product:
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, k, generator=g), torch.randn(rows[1] - rows[0], rank, generator=g) / 8
    return Product(name, rows, down, up, **others)


def added(x: Tensor, products: Sequence[Product], rows: tuple[int, int]) -> Tensor:
    """What products add to a layer's rows, in float64."""
    total = torch.zeros(*x.shape[:-1], rows[1] - rows[0], dtype=torch.float64)
    for p in products:
        if p.rows[0] <= rows[0] and rows[1] <= p.rows[1]:
            up = p.up.double()[rows[0] - p.rows[0] : rows[1] - p.rows[0]]
            total += p.strength * p.unit * (x.double() @ p.down.double().T) @ up.T
    return total


def assert_close(delta: Tensor, want: Tensor) -> None:
    assert float((delta - want).norm()) <= OF_THE_DELTA * float(want.norm())


def tensors(layer: FewBitLayer) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in layer.holder._buffers.items() if t is not None}


def assert_same(layer: FewBitLayer, before: dict[str, Tensor]) -> None:
    after = tensors(layer)
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].stride() == tensor.stride() for name, tensor in before.items()
    )


@pytest.mark.parametrize("path", ["auto", "a4"])
@pytest.mark.parametrize("segments", [None, (64, 128)])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_layer_gains_rank_and_loses_it(scheme: Scheme, segments: tuple[int, ...] | None, path: str) -> None:
    (layer,) = few_bit([40], 192, scheme, segments)
    if path == "a4":
        layer.path = path
    before, x = tensors(layer), torch.randn(3, 7, 192)
    plain = layer(x)
    products = [
        product("a", (0, 40), 192, 4, 1, unit=0.5, strength=0.7),
        product("b", (0, 40), 192, 16, 2, strength=-0.4),
    ]
    wide = WidenedBranch(layer, products)
    assert wide.rank == -(-(scheme.rank + 20) // 16) * 16 == layer.down.shape[0] == layer.up.shape[1]
    assert layer.scheme.rank == wide.rank
    fused = layer(x)
    assert_close((fused - plain).double(), added(x, products, (0, 40)))
    unfused = plain + added(x, products, (0, 40)).float()
    assert float((fused - unfused).norm() / unfused.norm()) <= 1e-2
    # The facade shows what is applied, and dequantizes the same.
    assert_close((layer.weight.dequantize() - dense(before, layer)).double(), weight_of(products, (0, 40)))
    wide.narrow()
    assert_same(layer, before)
    assert layer.scheme == scheme
    assert torch.equal(layer(x), plain)


def dense(before: dict[str, Tensor], layer: QuantLinear) -> Tensor:
    own = copy.deepcopy(layer)
    own.down = own.up = None
    weight = own.weight.dequantize()
    return weight + before["up"].float() @ before["down"].float() if "up" in before else weight


def weight_of(products: Sequence[Product], rows: tuple[int, int]) -> Tensor:
    return added(torch.eye(products[0].down.shape[1], dtype=torch.float64), products, rows).T


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_members_of_a_group_get_their_own_products_only(scheme: Scheme) -> None:
    outputs, k = (20, 8, 36), 64
    layers = few_bit(outputs, k, scheme)
    before, x = tensors(layers[0]), torch.randn(2, 5, k)
    plain = [layer(x) for layer in layers]
    products = [
        product("a", layers[0].rows, k, 4, 1, strength=0.5),
        product("a", layers[2].rows, k, 4, 2, strength=0.5),
        product("b", layers[1].rows, k, 8, 3, strength=-1.5),
    ]
    wide = WidenedBranch(layers[0].holder, products)
    together = group_linear(layers, x)
    for layer, y, alone in zip(layers, plain, together, strict=True):
        assert layer.scheme.rank == wide.rank
        own = [p for p in products if p.rows == layer.rows]
        assert_close((layer(x) - y).double(), added(x, own, layer.rows))
        assert torch.allclose(layer(x), alone, atol=1e-5)
    wide.narrow()
    assert_same(layers[0], before)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, plain, strict=True))


def test_an_equal_down_is_held_once_within_a_name() -> None:
    layers = few_bit((16, 16, 16), 64, SCHEMES["svdquant"])
    shared = torch.randn(16, 64)
    products = [Product("a", layer.rows, shared.clone(), torch.randn(16, 16)) for layer in layers]
    x = torch.randn(4, 64)
    plain = [layer(x) for layer in layers]
    wide = WidenedBranch(layers[0], products)
    assert wide.rank == 32
    for layer, y, p in zip(layers, plain, products, strict=True):
        assert_close((layer(x) - y).double(), added(x, [p], layer.rows))
    wide.narrow()
    # Under another name it may get another strength, and has rows of its own.
    wide = WidenedBranch(layers[0], [*products, Product("b", layers[0].rows, shared, torch.randn(16, 16))])
    assert wide.rank == 48


def test_a_strength_changes_in_place() -> None:
    (layer,) = few_bit([24], 64, SCHEMES["svdquant"])
    products = [product("a", (0, 24), 64, 4, 1, unit=2.0), product("b", (0, 24), 64, 4, 2)]
    x = torch.randn(5, 64)
    plain = layer(x)
    wide = WidenedBranch(layer, products)
    place, down = layer.up.data_ptr(), layer.down.clone()
    for name, strength in (("a", -0.5), ("b", 3.0), ("a", 0.0), ("a", 1.0)):
        wide.scale(name, strength)
        assert layer.up.data_ptr() == place and torch.equal(layer.down, down)
        assert_close((layer(x) - plain).double(), added(x, products, (0, 24)))
    assert [p.strength for p in products] == [1.0, 3.0]
    wide.scale("a", 0)
    wide.scale("b", 0)
    assert torch.equal(layer(x), plain)


class Block(nn.Module):
    """A group, and a layer with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        scheme = SCHEMES["svdquant"]
        self.q, self.k, self.mlp = few_bit([64, 64, 128], 64, scheme)
        (self.out,) = few_bit([64], 192, scheme, (64, 128))

    def forward(self, x: Tensor) -> Tensor:
        q, k, mlp = group_linear([self.q, self.k, self.mlp], x)
        return x + self.out([q * k.sigmoid(), nn.functional.gelu(mlp)])


def test_another_strength_compiles_nothing() -> None:
    torch._dynamo.reset()
    block, x = Block().requires_grad_(False), torch.randn(2, 10, 64)
    products = [product("a", layer.rows, 64, 4, seed) for seed, layer in enumerate((block.q, block.k, block.mlp))]
    wide = [
        WidenedBranch(block.q.holder, products),
        WidenedBranch(block.out, [product("a", (0, 64), 192, 4, 9)]),
    ]
    counter = CompileCounter()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    first = compiled(x)
    assert torch.equal(first, block(x)) and counter.frame_count == 1
    for strength in (0.3, -2.0, 0.0):
        for branch in wide:
            branch.scale("a", strength)
        y = compiled(x)
        assert not torch.equal(y, first)
        assert torch.equal(y, block(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_gain_rank(kernel: int) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv_block": nn.Sequential(nn.Conv2d(32, 24, kernel, padding=kernel // 2))})
    conv = model["conv_block"][0]
    layer = quantized(conv)
    x = torch.randn(2, 32, 6, 5)
    plain, before = layer(x), tensors(layer)
    lora_a, lora_b = nn.Conv2d(32, 4, kernel, padding=kernel // 2, bias=False), nn.Conv2d(4, 24, 1, bias=False)
    wide = WidenedBranch(
        layer, [Product("a", (0, 24), flat_weight(lora_a).detach(), flat_weight(lora_b).detach(), strength=-0.8)]
    )
    with torch.no_grad():
        want = -0.8 * lora_b(lora_a(x))
    assert_close(layer(x) - plain, want)
    wide.narrow()
    assert_same(layer, before)
    assert torch.equal(layer(x), plain)


def quantized(conv: nn.Conv2d) -> QuantConv2d:
    from bittern.solvers import SolverOptions, solve

    scheme = Scheme(group_size=32, activations=16)
    segments = (conv.in_channels,) * (conv.kernel_size[0] * conv.kernel_size[1])
    (solution,) = solve([flat_weight(conv).detach()], scheme, SolverOptions(smoothing="none"), segments, 0)
    return QuantConv2d.from_solution(conv, scheme, segments, solution)


def test_copies_and_pickles_are_wide_on_their_own() -> None:
    layers = nn.ModuleList(few_bit((20, 8), 64, SCHEMES["svdquant"]))
    x = torch.randn(3, 64)
    wide = WidenedBranch(layers[0], [product("a", layers[1].rows, 64, 4)])
    y = [layer(x) for layer in layers]
    for layers_too, wide_too in (copy.deepcopy((layers, wide)), pickle.loads(pickle.dumps((layers, wide)))):
        assert all(torch.equal(layer(x), want) for layer, want in zip(layers_too, y, strict=True))
        wide_too.scale("a", 0.0)
        assert not torch.equal(layers_too[1](x), y[1])
        assert torch.equal(layers[1](x), y[1])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            Product("a", (0, 24), torch.ones(4, 65), torch.ones(24, 4)),
            r"'a' has a \[24, 65\].*\[24, 64\].*another model",
        ),
        (Product("a", (0, 24), torch.ones(4, 64), torch.ones(23, 4)), r"\[23, 64\] product for a \[24, 64\]"),
        (Product("a", (0, 25), torch.ones(4, 64), torch.ones(25, 4)), "another model"),
        (Product("a", (0, 24), torch.ones(4, 64), torch.ones(24, 3)), "down of rank 4 and an up of rank 3"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(bad: Product, message: str) -> None:
    (layer,) = few_bit([24], 64, SCHEMES["svdquant"])
    before = tensors(layer)
    with pytest.raises(UserError, match=message):
        WidenedBranch(layer, [product("b", (0, 24), 64, 4), bad])
    assert_same(layer, before)


def test_tensors_that_are_elsewhere_are_refused() -> None:
    (layer,) = few_bit([24], 64, SCHEMES["svdquant"])
    layer.to("meta")
    with pytest.raises(UserError, match="fuse before offloading"):
        WidenedBranch(layer, [product("b", (0, 24), 64, 4)])
