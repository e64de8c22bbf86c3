"""Few-bit convolutions against float64, diffusers' doors and peft's."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bittern import ops
from bittern.errors import UserError
from bittern.layers import FewBitWeight, QuantConv2d, QuantLinear, conv, flat_weight, patches
from bittern.scheme import Scheme
from bittern.solvers import Solution, SolverOptions, solve

# Sums of up to 1,200 products: float32 by float32 rounding, 16-bit types by the rounding of the weight and the output.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

G16 = Scheme(group_size=16)

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 0},
    {"kernel_size": (3, 1), "padding": "same", "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "bias": False},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "padding": 1},
]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(c: int, n: int, **geometry: Any) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(c * n)
        return nn.Conv2d(c, n, **geometry)


def quantized(module: nn.Conv2d, scheme: Scheme = G16) -> tuple[QuantConv2d, Solution]:
    weight = flat_weight(module).detach()
    segments = (module.in_channels,) * (weight.shape[1] // module.in_channels)
    (solution,) = solve([weight], scheme, SolverOptions(rounds=1), segments, 0)
    return QuantConv2d.from_solution(module, scheme, segments, solution), solution


def oracle(module: nn.Conv2d, solution: Solution, x: Tensor, smooth: Tensor | None = None) -> Tensor:
    """The convolution with the solution's weight, in float64, tap by tap."""
    taps = (*module.kernel_size, module.in_channels)
    exact = copy.deepcopy(module).double()
    weight = solution.reconstruct().double()
    if smooth is not None:
        weight = weight / smooth.double().repeat(taps[0] * taps[1])
    exact.weight.data = weight.unflatten(1, taps).permute(0, 3, 1, 2)
    return exact(x.double()).detach()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_convolves_with_the_solutions_weight(geometry: dict[str, Any], dtype: torch.dtype) -> None:
    module = dense(24, 20, **geometry).to(dtype)
    layer, solution = quantized(module)
    x = randn(2, 24, 9, 7, dtype=dtype)
    want, got = oracle(module, solution, x), layer(x)
    assert got.shape == want.shape and got.dtype == dtype
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    # 4-bit weights in groups of 16 miss about a tenth.
    error = (want - module.double()(x.double())).norm() / want.norm()
    assert 0.01 < error < 0.12


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_a_convolution_is_the_product_of_its_patches_and_its_flat_weight(
    geometry: dict[str, Any], batch: tuple[int, ...]
) -> None:
    module = dense(5, 6, **geometry).double()
    x = randn(*batch, 5, 9, 7).double()
    got = patches(module, x) @ flat_weight(module).T
    if module.bias is not None:
        got = got + module.bias
    assert torch.allclose(got.movedim(-1, -3), module(x), atol=1e-12)


@pytest.mark.parametrize("channels", [1, 5, 16, 65])
@pytest.mark.parametrize("group_size", [None, 4, 64])
def test_channels_that_no_group_divides_are_padded_tap_by_tap(channels: int, group_size: int | None) -> None:
    module = dense(channels, 6, kernel_size=3, padding=1)
    layer, solution = quantized(module, Scheme(group_size=group_size))
    x = randn(1, channels, 6, 6)
    want = oracle(module, solution, x)
    assert (layer(x).double() - want).abs().max() <= 2e-6 * want.abs().max()


def test_no_group_spans_taps() -> None:
    module = dense(20, 4, kernel_size=3)
    _, before = quantized(module)
    with torch.no_grad():
        module.weight[:, :, 1, 2] *= 1000
    _, after = quantized(module)
    # Tap (1, 2) is the sixth; 20 channels fill two groups of 16.
    changed = (before.scales != after.scales).any(dim=0).nonzero().flatten().tolist()
    assert changed == [10, 11]


def test_smoothing_is_per_channel_and_the_branch_reads_the_raw_input() -> None:
    module = dense(12, 10, kernel_size=3, padding=1)
    smooth = torch.linspace(0.5, 2, 12).to(torch.bfloat16)
    scheme = Scheme(group_size=12, rank=4, smooth=True)
    weight = flat_weight(module).detach()
    target = weight * smooth.float().repeat(9)
    (plain,) = solve([target], Scheme(group_size=12), SolverOptions(), (12,) * 9, 0)
    down, up = randn(4, 108, seed=1).to(torch.bfloat16), randn(10, 4, seed=2).to(torch.bfloat16)
    solution = SimpleNamespace(codes=plain.codes, scales=plain.scales, smooth=smooth, down=down, up=up, bias=None)
    layer = QuantConv2d.from_solution(module, scheme, (12,) * 9, solution)
    assert layer.tensors()["smooth"].shape == (12,)
    x = randn(2, 12, 5, 5)
    branch = copy.deepcopy(module).double()
    branch.weight.data = (up.double() @ down.double()).unflatten(1, (3, 3, 12)).permute(0, 3, 1, 2)
    want = oracle(module, plain, x / smooth.float().view(-1, 1, 1)) + branch(x.double()) - branch.bias.view(-1, 1, 1)
    assert (layer(x).double() - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("path", ops.PATHS)
def test_a_pointwise_convolution_is_a_linear_over_channels_on_every_path(path: str) -> None:
    module = dense(40, 24, kernel_size=1)
    scheme = Scheme(group_size=16, rank=4, activations=4)
    layer, solution = quantized(module, scheme)
    linear = nn.Linear(40, 24)
    linear.bias = module.bias
    same = QuantLinear.from_solution(linear, scheme, (40,), solution)
    layer.path = same.path = path
    x = randn(2, 40, 6, 5)
    assert torch.equal(layer(x), same(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert layer.choice().path == path
    # A BLAS may sum another number of tokens in another order.
    assert_close(layer(x[0]), layer(x)[0], rtol=0, atol=TOLERANCE[x.dtype] * layer(x).abs().max().item())


def test_larger_kernels_have_16_bit_activations_whatever_is_forced() -> None:
    layer, _ = quantized(dense(16, 8, kernel_size=3))
    want = layer(randn(1, 16, 5, 5))
    layer.path = "a4"
    choice = layer.choice()
    assert (choice.path, choice.reason) == ("a16", "a 3 x 3 convolution has no other")
    assert torch.equal(layer(randn(1, 16, 5, 5)), want)
    with pytest.raises(UserError, match="unknown path 'a5'"):
        layer.path = "a5"


def test_it_dequantizes_a_block_of_output_channels_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = quantized(dense(16, 30, kernel_size=3, padding=1))
    x = randn(2, 16, 6, 6)
    want, sizes = layer(x), []
    real = ops.dequantize
    monkeypatch.setattr(ops, "dequantize", lambda *args: sizes.append(args[0].shape[0]) or real(*args))
    monkeypatch.setitem(conv.BLOCK, "cpu", 7 * 16 * 9)
    assert torch.allclose(layer(x), want, atol=1e-6)
    assert sizes == [7, 7, 7, 7, 2]


def test_gradients_reach_the_input_and_the_bias() -> None:
    for kernel in (1, 3):
        module = dense(16, 8, kernel_size=kernel)
        layer, solution = quantized(module)
        module.weight.data = solution.reconstruct().unflatten(1, (kernel, kernel, 16)).permute(0, 3, 1, 2)
        ours, theirs = (randn(2, 16, 5, 5).requires_grad_() for _ in range(2))
        layer.bias = nn.Parameter(module.bias.detach().clone())
        layer(ours).square().sum().backward()
        module(theirs).square().sum().backward()
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        assert torch.allclose(layer.bias.grad, module.bias.grad, rtol=1e-4, atol=1e-5)


def test_training_keeps_no_dequantized_weight_for_the_backward_pass() -> None:
    layer, _ = quantized(dense(32, 64, kernel_size=3, padding=1))
    x = randn(1, 32, 4, 4).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert max(kept, default=0) < 64 * 32 * 9
    y.square().sum().backward()
    weight = layer.weight.dequantize().double()
    exact = x.detach().double().requires_grad_()
    nn.functional.conv2d(exact, weight, layer.bias.double(), padding=1).square().sum().backward()
    assert torch.allclose(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_the_weight_is_a_read_only_kernel() -> None:
    module = dense(16, 8, kernel_size=3)
    layer, solution = quantized(module)
    assert isinstance(layer, nn.Conv2d) and isinstance(layer.weight, FewBitWeight)
    assert layer.weight.shape == module.weight.shape and layer.weight.dim() == 4
    want = solution.reconstruct().unflatten(1, (3, 3, 16)).permute(0, 3, 1, 2)
    assert torch.allclose(layer.weight.dequantize(), want, atol=1e-6)
    assert torch.allclose(layer.weight + 0, want, atol=1e-6)
    with pytest.raises(UserError, match="read-only"):
        layer.weight.add_(1)
    assert "3" in repr(layer) and "int4 g16" in repr(layer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_state_dicts_carry_everything(duplicate: Any) -> None:
    layer, _ = quantized(dense(16, 8, kernel_size=3, padding=1), Scheme(group_size=16, rank=2))
    x = randn(1, 16, 5, 5)
    assert torch.equal(duplicate(layer)(x), layer(x))
    other = QuantConv2d.like(dense(16, 8, kernel_size=3, padding=1), layer.scheme, (16,) * 9)
    assert str(other.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(other(x), layer(x))
    half = duplicate(layer).to(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16 and half.scales.dtype == torch.bfloat16
    assert torch.equal(half.codes, layer.codes)


def test_what_has_no_few_bit_form_is_refused() -> None:
    with pytest.raises(UserError, match="grouped and transposed"):
        QuantConv2d.like(nn.Conv2d(8, 8, 3, groups=8), Scheme(), (1,) * 9)
    with pytest.raises(UserError, match=r"segments \(72,\): expected"):
        QuantConv2d.like(nn.Conv2d(8, 8, 3), Scheme(), (72,))


class Net(nn.Module):
    """Two convolutions, as a U-Net has them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = dense(16, 12, kernel_size=3, stride=2, padding=1)
        self.point = dense(12, 8, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.wide(x).relu())


def test_a_lora_does_what_it_does_to_the_dequantized_model() -> None:
    from peft import LoraConfig, get_peft_model

    few = Net()
    few.wide, few.point = quantized(few.wide)[0], quantized(few.point)[0]
    exact = Net()
    for name in ("wide", "point"):
        getattr(exact, name).weight.data = getattr(few, name).weight.dequantize().contiguous()
    config = LoraConfig(r=4, target_modules=["wide", "point"])
    few_lora, exact_lora = get_peft_model(few, config), get_peft_model(exact, config)
    x = randn(2, 16, 8, 8)
    plain = few_lora(x)
    assert torch.allclose(plain, exact_lora(x), atol=1e-5)
    adapters = {name: p for name, p in few_lora.named_parameters() if "lora_" in name}
    assert {type(m) for m in few_lora.modules() if isinstance(m, nn.Conv2d)} == {QuantConv2d, nn.Conv2d}
    assert len(adapters) == 4
    for index, (name, parameter) in enumerate(adapters.items()):
        parameter.data = 0.2 * randn(*parameter.shape, seed=index)
        exact_lora.get_parameter(name).data = parameter.data.clone()
    assert (few_lora(x) - plain).abs().max() > 0.1
    assert torch.allclose(few_lora(x), exact_lora(x), rtol=1e-4, atol=1e-4)
    few_lora(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in adapters.values())
    with pytest.raises(UserError, match="read-only"):
        few_lora.merge_adapter()


def test_it_compiles_without_a_break() -> None:
    net = Net().eval()
    net.wide, net.point = quantized(net.wide)[0], quantized(net.point)[0]
    x = randn(1, 16, 8, 8)
    with torch.no_grad():
        want = net(x)
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), want, atol=1e-5)
