from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from ops_oracle import assert_close, expect, gelu, random_layer
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bittern import ops
from bittern.errors import UserError
from bittern.ops import contract, reference

OP = torch.ops.bittern.few_bit_linear.default


def test_autocast_changes_no_number() -> None:
    layer = random_layer(0, 24, (96,), rank=16, smooth=True)
    for path in ("a16", "a8-int8"):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
            want = ops.few_bit_linear([x], path=path, **layer.kwargs())
            with torch.autocast("cpu", torch.bfloat16):
                found = ops.few_bit_linear([x], path=path, **layer.kwargs())
            assert found.dtype == dtype and torch.equal(found, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 64.0}, "group_size is 64.0: expected a whole number, or None"),
        ({"gelu_from": True}, "gelu_from is True: expected a whole number, or None"),
        ({"shift": (float("nan"),)}, r"shift is \[nan\]: expected finite numbers"),
        ({"inputs": []}, "inputs: expected a list with a tensor for each K-segment"),
        ({"inputs": torch.zeros(1, 64)}, "inputs: expected a list with a tensor for each K-segment"),
        ({"codes": torch.tensor(1, dtype=torch.uint8)}, r"codes has shape \[\]: expected a matrix"),
        ({"codes": "meta"}, "codes is on meta: expected cpu"),
    ],
)
def test_arguments_that_are_none_are_refused(changes: dict[str, Any], message: str) -> None:
    layer = random_layer(0, 24, (64,), bias=False)
    given: dict[str, Any] = {"inputs": [torch.zeros(1, 64)], "path": "a16", **layer.kwargs()}
    if changes.get("codes") == "meta":
        # Whose plan is known.
        ops.few_bit_linear(**given)
        changes = {"codes": layer.codes.to("meta")}
    with pytest.raises(UserError, match=message):
        ops.few_bit_linear(**{**given, **changes})


def test_only_calls_that_nobody_watches_pass_by_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, straight = random_layer(0, 24, (96,), rank=16, smooth=True), list[int]()
    run = contract._run_linear
    monkeypatch.setattr(contract, "_run_linear", lambda *args: straight.append(1) or run(*args))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))

    def call(x: Tensor) -> Tensor:
        return ops.few_bit_linear([x], path="a16", **layer.kwargs())

    want = call(x)
    assert len(straight) == 1
    with torch.inference_mode():
        assert torch.equal(call(x), want) and len(straight) == 2
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Watch():
        assert torch.equal(call(x), want)
    assert "bittern.few_bit_linear.default" in seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(call(x), want)
    assert "bittern::few_bit_linear" in {event.key for event in profile.key_averages()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(x)).shape == want.shape
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(x), want)
    assert torch.equal(call(x.clone().requires_grad_()), want)
    with torch.autograd.forward_ad.dual_level():
        # No tangent rather than one of the rounding.
        dual = call(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(dual).tangent is None
    assert len(straight) == 2


@pytest.mark.parametrize("path", ops.PATHS)
@pytest.mark.parametrize("trained", [False, True])
def test_the_operation_keeps_torchs_rules(path: str, trained: bool) -> None:
    layer = random_layer(0, 24, (64, 72), rank=16, smooth=True)
    inputs = [torch.randn(2, 5, k, requires_grad=trained) for k in (64, 72)]
    for shift in ([], [0.2, 0.0]):
        torch.library.opcheck(OP, (inputs, *layer.args(), path, shift, None))
    bare = random_layer(0, 24, (64,), "ternary", None, bias=False)
    torch.library.opcheck(OP, ([torch.randn(3, 64, requires_grad=trained)], *bare.args(), path, [], None))


@pytest.mark.parametrize("path", ops.PATHS)
@pytest.mark.parametrize("gelu_from", [0, 10, 24])
def test_some_outputs_pass_through_a_gelu(path: str, gelu_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(0, 24, (64, 72), rank=16, smooth=True)
    inputs = [torch.randn(2, 5, k) for k in (64, 72)]
    torch.library.opcheck(OP, (inputs, *layer.args(), path, [], gelu_from))
    # Blocks of rows that lie before, across and behind the first.
    monkeypatch.setitem(reference._BLOCK, "cpu", 7 * layer.layout.padded_k)
    y = ops.few_bit_linear(inputs, path=path, gelu_from=gelu_from, **layer.kwargs())
    assert_close(y, *gelu(*expect(inputs, layer, path), gelu_from))


def test_a_gelu_passes_gradients() -> None:
    layer = random_layer(0, 24, (64,), rank=16)
    x, same = (torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    y = ops.few_bit_linear([x], path="a16", gelu_from=10, **layer.kwargs())
    plain = ops.few_bit_linear([same], path="a16", **layer.kwargs())
    want = torch.cat([plain[:, :10], torch.nn.functional.gelu(plain[:, 10:], approximate="tanh")], dim=1)
    y.square().sum().backward()
    want.square().sum().backward()
    assert torch.equal(y, want) and torch.equal(x.grad, same.grad)
    with pytest.raises(NotImplementedError, match="fused GELU has no gradient"):
        OP([x], *layer.args(), "a16", [], 10).sum().backward()


@pytest.mark.parametrize("format", ["int8", "fp8", "int4", "uint4"])
def test_the_prologue_keeps_torchs_rules(format: str) -> None:
    layer = random_layer(0, 4, (100,), rank=16, smooth=True)
    op = torch.ops.bittern.quantize_activations.default
    torch.library.opcheck(op, (torch.randn(3, 2, 100), layer.smooth, layer.down, format, 0.1))
    torch.library.opcheck(op, (torch.randn(4, 64, dtype=torch.bfloat16), None, None, format, 0.0))
    for dtype in (torch.float32, torch.bfloat16):
        columns = torch.randn(100, 7, dtype=dtype).T
        torch.library.opcheck(op, (columns, layer.smooth, layer.down, format, 0.1))
        torch.library.opcheck(op, (torch.randn(2, 100, 3, dtype=dtype).mT, None, None, format, 0.0))


@pytest.mark.parametrize("path", ops.PATHS)
def test_no_outputs_are_an_empty_result_as_of_a_linear(path: str) -> None:
    layer = random_layer(0, 0, (64, 72), rank=16, smooth=True)
    inputs = [torch.randn(2, 5, k, requires_grad=True) for k in (64, 72)]
    torch.library.opcheck(OP, (inputs, *layer.args(), path, [], None))
    y = ops.few_bit_linear(inputs, path=path, **layer.kwargs())
    assert y.shape == torch.nn.functional.linear(torch.cat(inputs, dim=-1), torch.empty(0, 136)).shape == (2, 5, 0)
    y.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in inputs)
    assert ops.dequantize(*layer.args()[:5], "int4", 64, (64, 72), torch.float32).shape == (0, 136)


def test_a_number_without_an_axis_is_refused() -> None:
    layer = random_layer(0, 24, (64,))
    for x in (torch.tensor(1.0), torch.tensor(1.0, device="meta")):
        with pytest.raises(UserError, match="a single number without an axis: expected a vector"):
            ops.few_bit_linear([x], path="a16", **layer.kwargs())
        with pytest.raises(UserError, match="a single number without an axis: expected a vector"):
            ops.quantize_activations(x, None, None, "int8")


def test_the_gradients_operation_keeps_torchs_rules() -> None:
    layer = random_layer(0, 24, (64, 72), rank=16, smooth=True)
    args = (torch.randn(2, 24), *layer.args()[:5], layer.weight, layer.group_size, [64, 72])
    torch.library.opcheck(torch.ops.bittern.few_bit_linear_backward.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantizing_keeps_torchs_rules(dtype: torch.dtype) -> None:
    layer = random_layer(0, 24, (64, 72), rank=16, smooth=True)
    args = (*layer.args()[:5], layer.weight, layer.group_size, [64, 72], dtype)
    torch.library.opcheck(torch.ops.bittern.dequantize.default, args)


@pytest.mark.parametrize("path", ops.PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_straight_through_the_rounding(path: str, dtype: torch.dtype) -> None:
    layer = random_layer(0, 24, (60, 72), rank=16, smooth=True)
    inputs = [torch.randn(3, k, dtype=dtype, requires_grad=True) for k in (60, 72)]
    assert layer.bias is not None
    layer.bias.requires_grad_()
    upstream = torch.randn(3, 24, dtype=dtype)
    ops.few_bit_linear(inputs, path=path, **layer.kwargs()).backward(upstream)
    weight = ops.dequantize(*layer.args()[:5], "int4", 64, (60, 72), torch.float32).double()
    want = upstream.double() @ weight
    got = torch.cat([x.grad for x in inputs if x.grad is not None], dim=-1)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert got.dtype == dtype and torch.allclose(got.double(), want, rtol=tolerance, atol=1e-5)
    assert layer.bias.grad is not None
    assert torch.allclose(layer.bias.grad.double(), upstream.double().sum(0), rtol=tolerance, atol=1e-5)


def test_the_layers_own_tensors_refuse_gradients() -> None:
    layer = random_layer(0, 24, (64,), rank=16)
    assert layer.up is not None
    layer.up.requires_grad_()
    with pytest.raises(NotImplementedError, match="train a LoRA"):
        ops.few_bit_linear([torch.randn(3, 64)], path="a16", **layer.kwargs()).sum().backward()


def _call(inputs: list[Tensor], layer: Any, path: str) -> Tensor:
    return torch.relu(ops.few_bit_linear([2 * x for x in inputs], path=path, **layer)) + 1


@pytest.mark.parametrize("path", ops.PATHS)
def test_compiles_whole_and_for_any_number_of_rows(path: str) -> None:
    torch._dynamo.reset()
    layer = random_layer(0, 24, (64, 72), rank=16, smooth=True)
    compiled = torch.compile(_call, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 5, 1):
        inputs = [torch.randn(m, k) for k in (64, 72)]
        want, size = expect([2 * x for x in inputs], layer, path)
        assert_close(compiled(inputs, layer.kwargs(), path), want.clip(0) + 1, size + 1)


def test_exports_and_loads() -> None:
    layer = random_layer(0, 24, (64,), rank=16, smooth=True)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.few_bit_linear([x], path="a8-int8", **layer.kwargs())

    x = torch.randn(4, 64)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Module(), (x,), dynamic_shapes={"x": {0: rows}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.randn(9, 64)
    assert torch.equal(torch.export.load(file).module()(again), Module()(again))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(24, 40, dtype=torch.uint8)}, r"codes has shape \[24, 40\]: expected \[24, 32\]"),
        ({"codes": torch.zeros(24, 32, dtype=torch.int8)}, "codes has dtype torch.int8: expected torch.uint8"),
        ({"bias": torch.ones(24, dtype=torch.int32)}, "bias has dtype torch.int32: expected a float type"),
        ({"inputs": [torch.ones(2, 64, dtype=torch.int8)]}, "the input has dtype torch.int8: expected a float type"),
        ({"scales": torch.ones(24, 2)}, r"scales has shape \[24, 2\]: expected \[24, 1\]"),
        ({"smooth": torch.ones(63)}, r"smooth has shape \[63\]: expected \[64\]"),
        ({"down": None}, r"up has shape \[24, 16\]: expected \[24, 0\]"),
        ({"bias": torch.ones(23)}, r"bias has shape \[23\]: expected \[24\]"),
        ({"weight": "int5"}, "int4"),
        ({"path": "a6"}, "unknown path 'a6'"),
        ({"shift": [0.1, 0.2]}, "shift has 2 values: expected 1"),
        ({"inputs": [torch.randn(2, 64, dtype=torch.float64)]}, "not torch.float64"),
        ({"scales": torch.ones(24, 1, device="meta")}, "scales is on meta: expected cpu, where the input is"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    layer = random_layer(0, 24, (64,), rank=16, smooth=True)
    call = {"inputs": [torch.randn(2, 64)], "path": "a16", **layer.kwargs()}
    with pytest.raises(UserError, match=message):
        ops.few_bit_linear(**{**call, **change})


def test_refuses_segments_that_differ() -> None:
    layer = random_layer(0, 24, (64, 64))
    with pytest.raises(UserError, match="differ in dtype or batch shape"):
        ops.few_bit_linear([torch.randn(2, 64), torch.randn(3, 64)], path="a16", **layer.kwargs())


def test_refuses_an_unknown_activation_format() -> None:
    with pytest.raises(UserError, match="unknown activation format 'int5'"):
        ops.quantize_activations(torch.randn(2, 64), None, None, "int5")
