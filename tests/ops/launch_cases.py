"""What a layer launches, and how often it plans; run by `test_launches.py` in a process of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import fake_gpu
import pytest
import torch
from ops_oracle import Layer, random_inputs, random_layer
from torch import Tensor
from triton import knobs

from bittern import ops
from bittern.ops import dispatch
from bittern.ops.triton import config, direct, launch, linear

fake_gpu.install()

BF16 = torch.bfloat16
# (path, segments, rank, tokens, launches).
CASES: list[tuple[str, tuple[int, ...], int, int, int]] = [
    ("a8-fp8", (256,), 16, 2048, 3),
    ("a8-int8", (128, 256), 16, 2048, 5),
    ("a8-fp8", (256,), 0, 7, 2),
    ("a8-int8", (128, 768), 40, 33, 5),
    ("a8-fp8", (256,), 16, 1024, 4),
    ("a8-fp8", (128, 256), 48, 2048, 5),
    ("a4", (128, 256), 16, 2048, 5),
    ("a16", (256,), 0, 1, 1),
    ("a16", (128, 256), 0, 5, 3),
    ("a16", (256,), 16, 64, 3),
    ("a16", (128, 768), 40, 5, 5),
]


# What the vendor's GEMM projects, where it does: memory of its own, which no distance could name.
LOW = torch.zeros(2048, 48)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "projected", lambda inputs, down: LOW)
    dispatch._plans.clear()
    fake_gpu.launched.clear()
    fake_gpu.searches.clear()


def make(path: str, segments: tuple[int, ...], rank: int, m: int, seed: int = 0) -> tuple[Layer, list[Tensor]]:
    layer = random_layer(seed, 128, segments, rank=rank, smooth=rank > 0)
    return layer, [x.contiguous() for x in random_inputs(seed, "gaussian", m, segments, BF16)]


def call(inputs: list[Tensor], layer: Layer, path: str) -> Tensor:
    with ops.use_backend("triton"):
        return ops.few_bit_linear(inputs, path=path, **layer.kwargs())


def described(launches: list[Any], tensors: list[Tensor]) -> list[Any]:
    """Launches with tensors and distances in the place of addresses; for scratch the distance from the lowest."""
    arguments = [flat(arguments) for *_, arguments in launches]
    names: dict[int, tuple[int, int]] = {}
    own: list[int] = []
    for address in {a for each in arguments for a in each if isinstance(a, int) and a > 2**32}:
        distances = ((i, address - t.data_ptr()) for i, t in enumerate(tensors))
        within = [(i, d) for i, d in distances if 0 <= d < tensors[i].untyped_storage().nbytes()]
        if within:
            names[address] = within[0]
        else:
            own.append(address)
    names |= {a: (-1, a - min(own)) for a in own}
    return [
        (*head, [names.get(a, a) if isinstance(a, int) else a for a in each])
        for (*head, _), each in zip(launches, arguments, strict=True)
    ]


def flat(values: Any) -> list[Any]:
    return [x for v in values for x in (flat(v) if isinstance(v, (list, tuple)) else [v])]


@pytest.mark.parametrize(("path", "segments", "rank", "m", "launches"), CASES)
def test_calls_of_a_known_signature_plan_nothing_and_search_nothing(
    path: str, segments: tuple[int, ...], rank: int, m: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[str] = []
    checks = dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *args: plans.append(args[0]) or checks(*args))
    layer, inputs = make(path, segments, rank, m)
    call(inputs, layer, path)
    assert (len(plans), len(fake_gpu.searches), len(fake_gpu.launched)) == (1, launches, launches)
    for seed in (1, 2):
        # Another layer of the same shapes, as the next block has.
        layer, inputs = make(path, segments, rank, m, seed)
        call(inputs, layer, path)
    assert (len(plans), len(fake_gpu.searches), len(fake_gpu.launched)) == (1, launches, 3 * launches)


@pytest.mark.parametrize(("path", "segments", "rank", "m", "launches"), CASES)
def test_what_is_repeated_is_what_triton_would_launch(
    path: str, segments: tuple[int, ...], rank: int, m: int, launches: int
) -> None:
    first, others = make(path, segments, rank, m), make(path, segments, rank, m, seed=1)
    planned = linear.plan(path, m)
    planned(first[1], *first[0].args(), path, ())
    tensors = [LOW, *others[1], *[t for t in others[0].args() if isinstance(t, Tensor)]]
    found: list[list[Any]] = []
    for plan in (planned, linear.plan(path, m)):
        fake_gpu.launched.clear()
        y = plan(others[1], *others[0].args(), path, ())
        found.append(described(fake_gpu.launched, [*tensors, y]))
    assert len(fake_gpu.searches) == 2 * launches
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("path", "segments", "rank", "m", "launches"),
    [
        ("a8-fp8", (256,), 16, 40, 3),
        ("a8-int8", (256,), 0, 100, 2),
        ("a16", (128, 256), 0, 70, 3),
        ("a16", (256,), 16, 256, 3),
    ],
)
def test_launches_of_weights_unpacked_in_the_product_are_repeated(
    path: str, segments: tuple[int, ...], rank: int, m: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "fused_unpack_for", lambda *_: config.FusedUnpackConfig(descriptors=True))
    test_what_is_repeated_is_what_triton_would_launch(path, segments, rank, m, launches)
    assert "fused_unpack_kernel" in {name for name, *_ in fake_gpu.launched}


@pytest.mark.parametrize(
    ("n", "segments", "m", "launches"),
    [(128, (256,), 2048, 3), (128, (128, 256), 2048, 5), (3072, (1024,), 4608, 4), (128, (256,), 512, 4)],
)
def test_layers_in_16_bits_with_a_bias_search_once(
    n: int, segments: tuple[int, ...], m: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As real ones are; many tokens go to the GEMM that has warps that load, a last wave to tiles of its own."""
    monkeypatch.setattr(linear, "multiprocessors", lambda device: 132)
    layer = random_layer(0, n, segments, rank=16, smooth=True)
    halved = {name: getattr(layer, name).bfloat16() for name in ("scales", "smooth", "down", "up", "bias")}
    layer = dataclasses.replace(layer, **halved)
    inputs = [x.contiguous() for x in random_inputs(0, "gaussian", m, segments, BF16)]
    for searches in (launches, 0, 0):
        fake_gpu.searches.clear()
        call(inputs, layer, "a8-fp8")
        assert len(fake_gpu.searches) == searches
    assert len(fake_gpu.launched) == 3 * launches


@pytest.mark.parametrize(("path", "m", "launches"), [("a8-fp8", 64, 5), ("a8-int8", 64, 5), ("a16", 7, 5)])
def test_nvfp4_is_launched(path: str, m: int, launches: int) -> None:
    layer = random_layer(0, 128, (128, 256), "nvfp4", 16, rank=16, smooth=True)
    inputs = [x.contiguous() for x in random_inputs(0, "gaussian", m, (128, 256), BF16)]
    call(inputs, layer, path)
    assert len(fake_gpu.launched) == launches


def test_addresses_that_are_not_aligned_are_launched_by_triton() -> None:
    layer, (x,) = make("a8-fp8", (256,), 0, 7)
    planned = linear.plan("a8-fp8", 7)
    planned([x], *layer.args(), "a8-fp8", ())
    shifted = torch.empty(7 * 256 + 1, dtype=BF16)[1:].view(7, 256).copy_(x)
    for _ in range(2):
        fake_gpu.searches.clear()
        planned([shifted], *layer.args(), "a8-fp8", ())
        assert len(fake_gpu.searches) == 2
    fake_gpu.searches.clear()
    planned([x], *layer.args(), "a8-fp8", ())
    assert not fake_gpu.searches


@pytest.mark.parametrize(("path", "segments", "rank", "m", "launches"), CASES)
@pytest.mark.parametrize("other", ["hooks", "version", "scratch", "launcher"])
def test_what_is_launched_directly_is_what_triton_would_launch(
    path: str, segments: tuple[int, ...], rank: int, m: int, launches: int, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    layer, inputs = make(path, segments, rank, m)
    planned = linear.plan(path, m)
    assert isinstance(planned, linear.LayerPlan)
    y = planned(inputs, *layer.args(), path, ())
    tensors = [LOW, *inputs, *[t for t in layer.args() if isinstance(t, Tensor)]]
    found: list[list[Any]] = []
    for direct_too in (True, False):
        if not direct_too and other == "hooks":
            knobs.runtime.launch_enter_hook.add(told.append)
        elif not direct_too:
            assert planned.launches is not None
            planned.launches._ready.clear()
            direct._launcher_of.cache_clear()
            if other == "version":
                monkeypatch.setattr(direct.triton, "__version__", "3.9.0")
            elif other == "scratch":
                monkeypatch.setattr(fake_gpu.Launcher, "global_scratch_size", 8)
            else:
                monkeypatch.delattr(fake_gpu.Launcher, "launch_pdl")
        fake_gpu.launched.clear()
        y = planned(inputs, *layer.args(), path, ())
        found.append(described(fake_gpu.launched, [*tensors, y]))
    direct._launcher_of.cache_clear()
    if other == "hooks":
        knobs.runtime.launch_enter_hook.remove(told.append)
        assert len(told) == launches
    assert len(found[0]) == launches and found[0] == found[1]


@pytest.mark.parametrize("name", ["codes", "scales", "up", "down", "smooth", "bias"])
@pytest.mark.parametrize("path", ["a8-fp8", "a8-int8", "a4", "a16"])
def test_tensors_that_are_copied_are_copied_in_every_call(path: str, name: str) -> None:
    """By a call of its own, or as the recording's: never the original by the strides of a copy."""
    layer, inputs = make(path, (256,), 16, 7)
    tensor = getattr(layer, name)
    turned = tensor.T.contiguous().T if tensor.ndim == 2 else torch.stack([tensor, tensor], 1)[:, 0]
    assert turned.stride(-1) != 1
    layer = dataclasses.replace(layer, **{name: turned})
    planned = linear.plan(path, 7)
    whole = range(turned.untyped_storage().data_ptr(), turned.untyped_storage().data_ptr() + turned.nbytes)
    for _ in range(3):
        fake_gpu.launched.clear()
        planned(inputs, *layer.args(), path, ())
        read = [address for *_, arguments in fake_gpu.launched for address in flat(arguments)]
        assert fake_gpu.launched and not any(isinstance(a, int) and a in whole for a in read)


def test_what_is_kept_for_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST_ADDRESSES", 2)
    layer, _ = make("a8-fp8", (256,), 0, 7)
    planned = linear.plan("a8-fp8", 7)
    assert isinstance(planned, linear.LayerPlan)
    inputs = [torch.randn(7, 256, dtype=BF16) for _ in range(5)]
    for x in [inputs[0], *inputs, *inputs[::-1]]:
        fake_gpu.launched.clear()
        y = planned([x], *layer.args(), "a8-fp8", ())
        read = [address for *_, arguments in fake_gpu.launched for address in flat(arguments)]
        assert x.data_ptr() in read and y.data_ptr() in read
        assert planned.launches is not None and len(planned.launches._ready) <= 2


def test_inputs_that_are_copied_or_given_twice_are_launched_by_triton() -> None:
    layer, (x, _) = make("a8-fp8", (256, 256), 0, 7)
    transposed = torch.empty(256, 7, dtype=BF16).T
    for inputs in ([x, x], [transposed, x]):
        planned = linear.plan("a8-fp8", 7)
        planned(inputs, *layer.args(), "a8-fp8", ())
        assert isinstance(planned, linear.LayerPlan) and planned.launches is None


def test_a_plan_serves_one_backend_and_one_signature() -> None:
    layer, inputs = make("a8-int8", (256,), 0, 7)
    call(inputs, layer, "a8-int8")
    with ops.use_backend("torch"):
        y = ops.few_bit_linear(inputs, path="a8-int8", **layer.kwargs())
    assert torch.isfinite(y).all() and len(fake_gpu.launched) == 2
    call([x[:3] for x in inputs], layer, "a8-int8")
    call([torch.stack([x, x], 1)[:, 0] for x in inputs], layer, "a8-int8")
    assert len(dispatch._plans) == 4


def test_plans_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MOST_PLANS", 3)
    layer = random_layer(0, 8, (64,))
    for rows in range(1, 9):
        with ops.use_backend("torch"):
            ops.few_bit_linear([torch.randn(rows, 64)], path="a16", **layer.kwargs())
        assert len(dispatch._plans) <= 3
