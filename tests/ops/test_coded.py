"""What the compiler sees of a layer: codes made by torch's operations, with the numbers of the opaque operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_oracle import Layer, random_inputs, random_layer
from torch import Tensor
from torch.fx import GraphModule

from bittern import ops
from bittern.errors import UserError
from bittern.ops import coded, reference
from bittern.ops.triton import config

CODED = torch.ops.bittern.few_bit_linear_coded.default
OPAQUE = torch.ops.bittern.few_bit_linear.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs count as devices with a kernel; the reference computes."""
    torch._dynamo.reset()
    monkeypatch.setattr(coded, "has_kernel", lambda device, dtype: True)


def make(k: int = 256, rank: int = 0, smooth: bool = False, **kwargs: Any) -> Layer:
    return random_layer(0, 24, kwargs.pop("segments", (k,)), rank=rank, smooth=smooth, **kwargs)


def compiled(call: Callable[..., Tensor], **options: Any) -> tuple[Callable[..., Tensor], list[Any]]:
    """The call as compiled, and what its graphs call."""
    targets: list[Any] = []

    def backend(graph: GraphModule, example: list[Any]) -> Any:
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    return torch.compile(call, fullgraph=True, backend=backend, **options), targets


def check(inputs: list[Tensor], layer: Layer, *, opened: bool, path: str = "a8-fp8", **kwargs: Any) -> Tensor:
    """Compiled and eager are the same to the bit, and the graph has the one operation and not the other."""

    def call(inputs: list[Tensor]) -> Tensor:
        return ops.few_bit_linear(inputs, path=path, **layer.kwargs(), **kwargs)

    function, targets = compiled(call)
    got, want = function(inputs), call(inputs)
    assert (CODED in targets, OPAQUE in targets) == (opened, not opened)
    assert got.dtype == want.dtype and got.shape == want.shape and got.stride() == want.stride()
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and torch.equal(got.isnan(), want.isnan())
    return got


def rows(k: int = 256, m: int = 70, dtype: torch.dtype = torch.bfloat16, kind: str = "gaussian") -> Tensor:
    return random_inputs(1, kind, m, (k,), dtype)[0].contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gaussian", "zeros", "zero rows", "outlier", "denormal"])
def test_numbers_are_the_references_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    x = rows(dtype=dtype, kind=kind)
    check([x], make(), opened=True)
    codes, scales = coded.quantize(x)
    want, want_scales = reference.quantize(x.float(), "fp8")
    assert torch.equal(codes.float(), want) and torch.equal(scales, want_scales)


@pytest.mark.parametrize(("weight", "group_size"), [("ternary", None), ("ternary", 128), ("int4", 64), ("nvfp4", 16)])
@pytest.mark.parametrize(("gelu_from", "bias"), [(None, False), (0, True), (11, True)])
def test_every_weight_bias_and_gelu(weight: str, group_size: int | None, gelu_from: int | None, bias: bool) -> None:
    check([rows()], make(weight=weight, group_size=group_size, bias=bias), opened=True, gelu_from=gelu_from)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_spoils_no_other(value: float, dtype: torch.dtype) -> None:
    x = rows(dtype=dtype)
    x[5, 17] = value
    y = check([x], make(), opened=True)
    finite = y.isfinite()
    assert not finite[5].any() and finite.sum() == 24 * 69


def test_the_largest_number_does_not_overflow() -> None:
    """Every magnitude whose code might pass 448 by rounding."""
    x = torch.linspace(1, 2, 128 * 128).view(128, 128).sort(-1).values
    # The first 256 inputs foretell nothing.
    codes, _ = coded.quantize(torch.nn.functional.pad(torch.cat([x, -x]), (256, 0)))
    assert codes.float().abs().amax(-1).eq(448).all()


@pytest.mark.parametrize("kind", ["batch", "transposed", "sliced", "expanded", "vector-strided"])
def test_any_strides_and_batches(kind: str) -> None:
    x = {
        "batch": lambda: rows(m=72).view(2, 36, 256),
        "transposed": lambda: rows(k=70, m=256).T,
        "sliced": lambda: rows(k=300)[:, 3:259],
        "expanded": lambda: rows(m=1).expand(70, 256),
        "vector-strided": lambda: rows(m=72).view(36, 2, 256).transpose(0, 1),
    }[kind]()
    check([x], make(), opened=True)


@pytest.mark.parametrize(
    ("changes", "layer"),
    [
        ({"m": coded.FEW_TOKENS}, {}),
        ({"k": 192}, {}),
        ({"k": coded.MOST_INPUTS + 128}, {}),
        ({}, {"smooth": True}),
        ({}, {"rank": 16}),
        ({"path": "a8-int8"}, {}),
        ({"path": "a16"}, {}),
        ({"path": "a4"}, {}),
    ],
)
def test_what_stays_opaque(changes: dict[str, Any], layer: dict[str, Any]) -> None:
    path = changes.pop("path", "a8-fp8")
    check([rows(**changes)], make(k=changes.get("k", 256), **layer), opened=False, path=path)


def test_several_inputs_stay_opaque() -> None:
    check([rows(), rows(128)], make(segments=(256, 128)), opened=False)


def test_devices_without_a_kernel_stay_opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not coded.has_kernel(torch.device("cpu"), torch.bfloat16)
    check([rows()], make(), opened=False)


def test_a_gpu_needs_the_arithmetic_and_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pytest.importorskip("triton")
    device, capability = torch.device("cuda"), [(9, 0)]
    monkeypatch.setattr(ops.dispatch, "device_capability", lambda device: capability[0])
    assert coded.has_kernel(device, torch.bfloat16) and coded.has_kernel(device, torch.float16)
    assert not coded.has_kernel(device, torch.float32)
    with ops.use_backend("torch"):
        assert not coded.has_kernel(device, torch.bfloat16)
    capability[0] = (8, 6)
    assert not coded.has_kernel(device, torch.bfloat16)


def test_gradients_want_the_opaque_operation() -> None:
    layer = make()
    function, targets = compiled(lambda x: ops.few_bit_linear([x], path="a8-fp8", **layer.kwargs()))
    function(rows(dtype=torch.float32).requires_grad_()).sum().backward()
    assert OPAQUE in targets and CODED not in targets


@pytest.mark.parametrize("strict", [False, True])
def test_exported_graphs_keep_the_promised_operation(strict: bool) -> None:
    layer = make()

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.few_bit_linear([x], path="a8-fp8", **layer.kwargs())

    targets = [node.target for node in torch.export.export(Module(), (rows(),), strict=strict).graph.nodes]
    assert OPAQUE in targets and CODED not in targets


def test_eager_calls_never_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    monkeypatch.setattr(coded, "few_bit_linear", None)
    with torch.autograd.profiler.profile():
        ops.few_bit_linear([rows()], path="a8-fp8", **layer.kwargs())
    ops.few_bit_linear([rows()], path="a8-fp8", **layer.kwargs())


def test_any_number_of_tokens_is_one_graph_and_few_are_another() -> None:
    layer = make()
    function, targets = compiled(lambda x: ops.few_bit_linear([x], path="a8-fp8", **layer.kwargs()), dynamic=True)
    for m in (70, 65, 200):
        function(rows(m=m))
    assert targets.count(CODED) == 1 and OPAQUE not in targets
    function(rows(m=3))
    assert targets.count(CODED) == 1 and targets.count(OPAQUE) == 1


def test_layernorm_and_modulation_under_autocast() -> None:
    layer, x = make(), rows(dtype=torch.float32)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.nn.functional.layer_norm(x, (256,)) * 1.5 + 0.25
            return ops.few_bit_linear([y], path="a8-fp8", **layer.kwargs())

    function, targets = compiled(call)
    assert torch.equal(function(x), call(x)) and CODED in targets


@pytest.mark.slow
def test_inductor_makes_the_codes() -> None:
    layer, x = make(), rows()

    def call(x: Tensor) -> Tensor:
        y = torch.nn.functional.layer_norm(x.float(), (256,)) * 1.5 + 0.25
        return ops.few_bit_linear([y], path="a8-fp8", **layer.kwargs())

    with torch.no_grad():
        got, want = torch.compile(call, fullgraph=True)(x), call(x)
    assert (got.double() - want.double()).norm() <= 5e-3 * want.double().norm()


def test_the_multiple_is_the_kernels() -> None:
    assert coded.MULTIPLE == config.SCRATCH_MULTIPLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operation_keeps_torchs_rules(dtype: torch.dtype) -> None:
    layer = make()
    x, scales = coded.quantize(rows(m=4).view(2, 2, 256))
    args = (x, scales, layer.codes, layer.scales, layer.bias, "int4", 64, 11, dtype)
    # Torch cannot compare e4m3 on CPUs, as its check of schemas would.
    torch.library.opcheck(CODED, args, test_utils=("test_faketensor",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 256)}, r"coded is \[3, 256\] in torch.float32: expected torch.float8_e4m3fn"),
        ({1: torch.ones(3)}, r"token_scales is \[3\] in torch.float32: expected \[3, 1\]"),
        ({1: torch.ones(3, 1, dtype=torch.float16)}, "token_scales is .* in torch.float16"),
        ({2: torch.zeros(24, 3, dtype=torch.uint8)}, r"codes has shape \[24, 3\]: expected \[24, 128\]"),
        ({7: 25}, "gelu_from 25"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[int, Any], message: str) -> None:
    layer, args = make(), list[Any]()
    args += [*coded.quantize(rows(m=3)), layer.codes, layer.scales, layer.bias, "int4", 64, None, torch.bfloat16]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(UserError, match=message):
        CODED(*args)
