from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_oracle import Layer, assert_close, expect, random_inputs, random_layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bittern import ops
from bittern.ops import cpu, reference

FORMATS = [("int4", 64), ("int4", 32), ("int4", None), ("ternary", 64), ("ternary", 128), ("ternary", None)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["gaussian", "zeros", "zero rows", "outlier", "denormal", "positive", "equal"]
PATHS = ["a8-int8", "a16"]
# Both operands are rounded to 8 bits of significand, and `low` once more.
BF16 = 3 * 2.0**-9
HAS = {"has": True, "lacks": False}


@pytest.fixture(autouse=True)
def no_layer_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALL", 0)


@pytest.fixture(params=[*HAS])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What this CPU has, and a CPU with neither int8 nor bf16 instructions."""
    has = HAS[request.param]
    for name in ("multiplies_integers", "multiplies_bf16"):
        found: Callable[[], bool] = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda found=found: has and found())
    return has


def both(inputs: list[Tensor], layer: Layer, path: str, **options: Any) -> tuple[Tensor, Tensor]:
    """The outputs, and those of the reference."""
    outputs: list[Tensor] = []
    for backend in ("cpu", "torch"):
        with ops.use_backend(backend):
            outputs.append(ops.few_bit_linear(inputs, path=path, **layer.kwargs(), **options))
    return outputs[0], outputs[1]


def assert_same(y: Tensor, want: Tensor, inputs: list[Tensor], layer: Layer, path: str) -> None:
    assert y.dtype == want.dtype and y.shape == want.shape
    if path == "a8-int8" and layer.up is None:
        assert torch.equal(y, want)
        return
    numbers, size = expect(inputs, layer, path)
    if path == "a8-int8" or y.dtype != torch.bfloat16:
        assert_close(y, numbers, size)
        return
    error = abs(y.double().numpy().reshape(numbers.shape) - numbers)
    assert (error <= BF16 * size + 2.0**-9 * abs(numbers) + 2**-126).all()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    path=st.sampled_from(PATHS),
    form=st.sampled_from(FORMATS),
    n=st.sampled_from([1, 5, 33, 65]),
    m=st.sampled_from([0, 1, 7, 16, 33]),
    segments=st.sampled_from([(64,), (100,), (1,), (7, 65), (130,), (64, 72), (3, 64, 5)]),
    rank=st.sampled_from([0, 16, 40]),
    smooth=st.booleans(),
    bias=st.booleans(),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from(DTYPES),
    zero_rows=st.booleans(),
)
def test_agrees_with_the_reference(
    instructions: bool,
    seed: int,
    path: str,
    form: tuple[str, int | None],
    n: int,
    m: int,
    segments: tuple[int, ...],
    rank: int,
    smooth: bool,
    bias: bool,
    kind: str,
    dtype: torch.dtype,
    stored: torch.dtype,
    zero_rows: bool,
) -> None:
    layer = random_layer(seed, n, segments, *form, rank, smooth, bias, stored, zero_rows)
    inputs = random_inputs(seed + 1, kind, m, segments, dtype)
    assert_same(*both(inputs, layer, path), inputs, layer, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weight", "group"), [("int4", 64), ("ternary", None)])
def test_sizes_of_more_than_one_piece(
    monkeypatch: pytest.MonkeyPatch, instructions: bool, path: str, dtype: torch.dtype, weight: str, group: int | None
) -> None:
    monkeypatch.setattr(cpu, "PIECE", 2**12)
    monkeypatch.setattr(cpu, "BLOCK", 2**15)
    monkeypatch.setattr(cpu, "TILE", 2**13)
    for m in (7, 33, 512):
        layer = random_layer(m, 259, (1030, 70), weight, group, 32, smooth=True)
        inputs = random_inputs(m + 1, "gaussian", m, (1030, 70), dtype)
        y, want = both(inputs, layer, path, gelu_from=100)
        error = (y.float() - want.float()).norm() / want.float().norm()
        assert error <= {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [7, 33])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_token(
    instructions: bool, path: str, dtype: torch.dtype, m: int, value: float
) -> None:
    layer = random_layer(0, 33, (130,), rank=16, smooth=True)
    inputs = random_inputs(1, "gaussian", m, (130,), dtype)
    clean, _ = both(inputs, layer, path)
    inputs[0][3, 50] = value
    y, _ = both(inputs, layer, path)
    others = torch.arange(m) != 3
    assert not y[3].isfinite().any()
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_same_every_time_and_on_two_threads(path: str, dtype: torch.dtype) -> None:
    layer = random_layer(0, 70, (256,), rank=16)
    inputs = random_inputs(1, "gaussian", 40, (256,), dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, again = both(inputs, layer, path)[0], both(inputs, layer, path)[0]
        torch.set_num_threads(2)
        two = both(inputs, layer, path)[0]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, again)
    torch.testing.assert_close(two, first)


@pytest.mark.parametrize("isa", ["AVX2", "ALL"])
def test_int8_products_that_saturate_are_not_used(isa: str) -> None:
    code = (
        "import torch; from bittern.ops import cpu; x = torch.full((64, 3000), 127, dtype=torch.int8); "
        "x[:, ::3] = -127; exact = (x.double() @ x.double().T); "
        "print(not cpu.multiplies_integers() or torch.equal(torch._int_mm(x, x.T).double(), exact))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("path", PATHS)
def test_torchs_defaults_change_nothing(path: str) -> None:
    layer, inputs = random_layer(0, 33, (130,), rank=16), random_inputs(1, "gaussian", 20, (130,), torch.float32)
    want, _ = both(inputs, layer, path)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            y, _ = both(inputs, layer, path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 40])
def test_no_large_copy_of_a_weight(monkeypatch: pytest.MonkeyPatch, path: str, m: int) -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, Tensor)]
            self.elements = max([self.elements, *made])
            return out

    monkeypatch.setattr(cpu, "PIECE", 2**13)
    monkeypatch.setattr(cpu, "BLOCK", 2**14)
    monkeypatch.setattr(cpu, "TILE", 2**13)
    layer = random_layer(0, 1024, (512,), rank=16)
    inputs = random_inputs(1, "gaussian", m, (512,), torch.float32)
    operands = [inputs, *layer.args()[:6], layer.weight, layer.group_size, path, ()]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Largest() as largest:
            cpu.few_bit_linear(*operands)
    finally:
        torch.set_num_threads(before)
    # The weight would be 2 MiB in float32; the codes are 256 KiB.
    assert largest.elements <= 2**18


@pytest.mark.parametrize(("limit", "value"), [("_MOST_INPUTS", 64), ("SMALL", 5 * 128 + 1)])
def test_layers_beyond_the_limits_are_the_references(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    layer, inputs = random_layer(0, 5, (65,)), random_inputs(1, "gaussian", 3, (65,), torch.float32)
    asked: list[str] = []

    def run(*args: Any) -> Tensor:
        asked.append(args[9])
        return torch.zeros(3, 5)

    monkeypatch.setattr(reference, "few_bit_linear", run)
    cpu.few_bit_linear(inputs, *layer.args(), "a8-int8", ())
    assert asked == []
    monkeypatch.setattr(cpu, limit, value)
    cpu.few_bit_linear(inputs, *layer.args(), "a8-int8", ())
    assert asked == ["a8-int8"]
