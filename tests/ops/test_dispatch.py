from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops_oracle import random_layer

from bittern import ops
from bittern.errors import UserError
from bittern.ops import dispatch, reference
from bittern.scheme import Scheme


@pytest.fixture
def registry() -> Iterator[None]:
    """Takes back what a test registers."""
    before = list(dispatch._kernels)
    yield
    dispatch._kernels[:] = before
    dispatch._plans.clear()


@pytest.mark.parametrize(("activations", "path"), [(4, "a8-int8"), (8, "a8-int8"), (16, "a16")])
def test_paths_on_a_cpu(activations: int, path: str) -> None:
    choice = ops.choose_path(Scheme(activations=activations), "cpu")
    assert (choice.path, choice.backend) == (path, "cpu") and choice.reason


@pytest.mark.parametrize(
    ("capability", "path"),
    [
        ((7, 0), "a16"),
        ((7, 5), "a8-int8"),
        ((8, 6), "a8-int8"),
        ((8, 9), "a8-int8"),
        ((9, 0), "a8-fp8"),
        ((12, 0), "a8-fp8"),
    ],
)
def test_eight_bit_paths_on_gpus(capability: tuple[int, int], path: str) -> None:
    for activations in (4, 8):
        choice = ops.choose_path(Scheme(activations=activations), "cuda", capability=capability)
        assert choice.path == path and choice.reason


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("capability", "activations", "path"),
    [((8, 6), 4, "a4"), ((8, 6), 8, "a8-int8"), ((9, 0), 4, "a8-fp8"), ((8, 6), 16, "a16")],
)
def test_four_bits_need_a_native_kernel_and_a_scheme_that_allows_them(
    capability: tuple[int, int], activations: int, path: str
) -> None:
    ops.register(ops.Kernel("a4", "made up", reference.few_bit_linear, devices=("cuda",)))
    choice = ops.choose_path(Scheme(activations=activations), "cuda", capability=capability)
    assert choice.path == path
    assert choice.backend == ("made up" if path == "a4" else "triton")


@pytest.mark.usefixtures("registry")
def test_a_native_kernel_beats_an_emulation_of_a_narrower_path() -> None:
    ops.register(ops.Kernel("a16", "made up", reference.few_bit_linear, devices=("cuda",), rows=(1, 16)))
    scheme = Scheme(activations=8)
    # Triton has no kernels for so old a GPU, and the reference emulates.
    assert ops.choose_path(scheme, "cuda", 1, capability=(7, 5)).path == "a16"
    assert ops.choose_path(scheme, "cuda", 100, capability=(7, 5)).path == "a8-int8"


def test_emulated_four_bits_run_when_forced_and_say_why_not_otherwise() -> None:
    for capability in ((8, 0), (9, 0), (12, 0)):
        choice = ops.choose_path(Scheme(activations=4), "cuda", path="a4", capability=capability)
        assert (choice.path, choice.backend) == ("a4", "triton")
    verdicts = ops.explain(Scheme(activations=4), "cuda", capability=(8, 6))
    reasons = {v.backend: v.reason for v in verdicts if v.path == "a4" and not v.accepted}
    assert "emulated 4 bits are slower" in reasons["triton"]
    assert ops.choose_path(Scheme(activations=4), "cuda", path="a4", capability=(7, 5)).backend == "torch"


def test_every_verdict_has_its_reason() -> None:
    for capability in (None, (7, 0), (8, 6), (9, 0)):
        for activations in (4, 8, 16):
            device = "cpu" if capability is None else "cuda"
            verdicts = ops.explain(Scheme(activations=activations), device, capability=capability)
            assert {v.path for v in verdicts} == set(ops.PATHS)
            assert all(v.reason for v in verdicts)
            assert any(v.path == "a16" and v.accepted for v in verdicts)


def test_reasons_name_what_is_missing() -> None:
    reasons = {v.path: v.reason for v in ops.explain(Scheme(activations=8), "cuda", capability=(8, 6))}
    assert "solved for 8-bit" in reasons["a4"] and "8.6 has no fp8" in reasons["a8-fp8"]
    folded = {v.path: v for v in ops.explain(Scheme(activations=8), "cuda", capability=(9, 0))}["a8-fp8-folded"]
    assert not folded.accepted and "less precise beside inputs far beyond the others" in folded.reason
    assert "has no int4 matrix" in {v.path: v.reason for v in ops.explain(Scheme(activations=4), "cpu")}["a4"]


@pytest.mark.parametrize("path", ops.PATHS)
def test_any_path_can_be_forced(path: str) -> None:
    assert ops.choose_path(Scheme(activations=16), "cpu", path=path).path == path


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown path 'a8-int': did you mean 'a8-int8'"):
        ops.choose_path(Scheme(), "cpu", path="a8-int")
    with pytest.raises(UserError, match="unknown backend 'trition'"), ops.use_backend("trition"):
        pass


def test_an_absent_gpu_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device is available here; expected 'cpu'"):
        ops.choose_path(Scheme(), "cuda")


@pytest.mark.usefixtures("registry")
def test_a_kernel_takes_only_the_calls_it_accepts() -> None:
    calls: list[int] = []

    def run(inputs: Any, *args: Any) -> Any:
        calls.append(len(inputs[0]))
        return reference.few_bit_linear(inputs, *args)

    layer = random_layer(0, 8, (64,))
    ops.register(
        ops.Kernel("a16", "made up", run, dtypes=(torch.bfloat16,), weights=("int4",), rows=(4, 8), devices=("cpu",))
    )

    def call(rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
        ops.few_bit_linear([torch.randn(rows, 64, dtype=dtype)], path="a16", **layer.kwargs())

    for rows in (3, 4, 8, 9):
        call(rows)
    call(5, torch.float32)
    assert calls == [4, 8]
    with ops.use_backend("torch"):
        call(5)
    assert calls == [4, 8]
    with ops.use_backend("made up"):
        call(6)
        with pytest.raises(UserError, match="made up takes 4 to 8 rows, not 9"):
            call(9)
        with pytest.raises(UserError, match=r"made up takes torch.bfloat16, not torch.float32"):
            call(5, torch.float32)
    assert calls == [4, 8, 6]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (ops.Call("int4", "cuda", (9, 0)), "needs compute capability 7.5 to 8.9, not 9.0"),
        (ops.Call("int4", "cpu"), "runs on cuda, not on cpu"),
        (ops.Call("ternary", "cuda", (8, 0)), "takes int4 weights, not ternary"),
        (ops.Call("int4", "cuda", (8, 0), rows=0), "takes 1 to any number of rows, not 0"),
        (ops.Call("int4", "cuda"), "needs a GPU of NVIDIA's, of compute capability 7.5 or more"),
        (ops.Call("int4", "cuda", (8, 0), group=32), "takes weight groups of whole rows, 64, not 32"),
        (ops.Call("int4", "cuda", (8, 0), segments=3), "takes at most 2 inputs, not 3"),
        (ops.Call("int4", "cuda", (8, 0), outputs=0), "takes at least 1 output, not 0"),
        (ops.Call("int4", "cuda", (8, 0)), None),
    ],
)
def test_declared_constraints(call: ops.Call, reason: str | None) -> None:
    kernel = ops.Kernel(
        "a4",
        "made up",
        reference.few_bit_linear,
        devices=("cuda",),
        capability=((7, 5), (8, 9)),
        weights=("int4",),
        rows=(1, None),
        groups=(0, 64),
        segments=2,
        outputs=1,
    )
    assert kernel.refusal(call) == reason


def test_a_kernel_whose_package_is_absent_says_so() -> None:
    kernel = ops.Kernel("a16", "made up", reference.few_bit_linear, lacks="tritium")
    assert kernel.refusal(ops.Call("int4", "cpu")) == "needs the package tritium, which is not installed"


@pytest.mark.parametrize(
    ("capability", "path", "accepted", "reason"),
    [
        ((9, 0), "a8-fp8", True, "9.0 has fp8 tensor cores"),
        ((8, 6), "a8-int8", True, "8.6 has int8 tensor cores"),
        ((8, 6), "a8-fp8", False, "needs compute capability 8.9 or more, not 8.6"),
        ((7, 5), "a8-int8", False, "needs compute capability 8.0 or more, not 7.5"),
    ],
)
def test_where_triton_runs(capability: tuple[int, int], path: str, accepted: bool, reason: str) -> None:
    verdicts = ops.explain(Scheme(activations=4), "cuda", capability=capability)
    (verdict,) = (v for v in verdicts if (v.backend, v.path) == ("triton", path))
    assert verdict.accepted is accepted and reason in verdict.reason


def test_nvfp4_runs_in_triton_on_all_paths_but_one() -> None:
    scheme = Scheme(weight="nvfp4", group_size=16, scale_dtype="e4m3", activations=4)
    verdicts = {v.path: v for v in ops.explain(scheme, "cuda", capability=(9, 0)) if v.backend == "triton"}
    assert {path for path, verdict in verdicts.items() if verdict.accepted} == {"a8-fp8", "a8-int8", "a16"}
    assert verdicts["a4"].reason == "takes int4, ternary weights, not nvfp4"
    assert ops.choose_path(scheme, "cuda", capability=(9, 0)).backend == "triton"
    forced = ops.choose_path(scheme, "cuda", path="a4", capability=(9, 0))
    assert (forced.path, forced.backend) == ("a4", "torch")
    call = ops.Call("int4", "cuda", (9, 0), torch.bfloat16, 7, 16, 1)
    assert dispatch.select("a16", call).backend == "triton"
    with ops.use_backend("triton"), pytest.raises(UserError, match="takes weight groups of whole rows, 32, 64"):
        dispatch.select("a4", call)


def test_triton_takes_over_only_what_it_declares() -> None:
    call = ops.Call("int4", "cuda", (9, 0), torch.bfloat16, 4096, 64, 2)
    assert dispatch.select("a8-fp8", call).backend == "triton"
    for change in (
        {"dtype": torch.float32},
        {"rows": 0},
        {"outputs": 0},
        {"group": 48},
        {"segments": 3},
        {"device": "cpu"},
    ):
        assert dispatch.select("a8-fp8", dataclasses.replace(call, **change)).backend == "torch"
    assert dispatch.select("a4", call).backend == "triton"
    assert dispatch.select("a4", dataclasses.replace(call, capability=(7, 5))).backend == "torch"
    with ops.use_backend("torch"):
        assert dispatch.select("a8-fp8", call).backend == "torch"


def test_what_only_the_reference_computes_is_refused_to_other_backends() -> None:
    layer = random_layer(0, 24, (64,), rank=16)
    x = torch.randn(2, 64)

    def dequantize() -> torch.Tensor:
        return ops.dequantize(*layer.args()[:5], "int4", 64, (64,), torch.float32)

    with ops.use_backend("triton"):
        with pytest.raises(UserError, match="dequantize cannot be computed here by the backend 'triton': triton has"):
            dequantize()
        with pytest.raises(UserError, match="triton runs on cuda, not on cpu"):
            ops.quantize_activations(x, None, None, "int8")
        with pytest.raises(UserError, match="quantize_activations to int4 cannot be computed here by the"):
            ops.quantize_activations(x, None, None, "int4")
    with ops.use_backend("torch"):
        codes = ops.quantize_activations(x, None, None, "int4")[0]
        weight = dequantize()
    assert torch.equal(weight, dequantize())
    assert torch.equal(codes, ops.quantize_activations(x, None, None, "int4")[0])
