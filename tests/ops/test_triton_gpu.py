"""The Triton kernels on a GPU: the cases of the interpreter, real sizes, compilation and CUDA graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kernel_cases import *  # noqa: F403
from kernel_cases import moved
from ops_oracle import random_layer
from torch import Tensor

from bittern import ops
from bittern.errors import UserError
from bittern.ops import reference
from bittern.ops.triton import config, linear
from bittern.ops.triton.config import GemmConfig

pytestmark = pytest.mark.gpu

PATHS = ["a8-int8", "a8-fp8"]
# (N, segments, weight, group, rank): FLUX's, and some that fit no tile.
LARGE: list[tuple[int, tuple[int, ...], str, int | None, int]] = [
    (3072, (3072,), "int4", 64, 32),
    (3072, (3072, 12288), "int4", 64, 32),
    (1544, (1000,), "int4", 64, 40),
    (1001, (777, 3000), "ternary", 128, 16),
    (2048, (15360,), "ternary", None, 0),
    (3072, (3072, 12288), "nvfp4", 16, 32),
    (1001, (777, 3000), "nvfp4", 16, 16),
]


def random_gpu_layer(case: Any) -> Any:
    n, segments, weight, group, rank = case
    return moved(random_layer(0, n, segments, weight, group, rank, smooth=rank > 0))


def random_gpu_inputs(m: int, segments: tuple[int, ...], kind: str = "gaussian") -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(m)
    x = torch.randn(m, sum(segments), generator=g, device="cuda")
    if kind == "outliers":
        x[:, :10] *= 20
    return [part.bfloat16() for part in x.split(segments, dim=-1)]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("path", [*PATHS, "a4", "a16"])
@pytest.mark.parametrize("case", LARGE)
def test_every_number_of_rows_against_the_reference(path: str, case: Any) -> None:
    layer = random_gpu_layer(case)
    for m in (0, 1, 7, 16, 33, 65, 128, 200, 256, 512, 4608):
        inputs = random_gpu_inputs(m, case[1], "outliers")
        y = ops.few_bit_linear(inputs, path=path, **layer.kwargs())
        again = ops.few_bit_linear(inputs, path=path, **layer.kwargs())
        with ops.use_backend("torch"):
            want = ops.few_bit_linear(inputs, path=path, **layer.kwargs())
        assert y.shape == want.shape and torch.equal(y, again)
        assert m == 0 or relative(y, want) <= 5e-3


@pytest.mark.parametrize("kind", ["gaussian", "outliers"])
@pytest.mark.parametrize(
    "case", [*(case for case in LARGE if case[2] == "int4" and case[4] == 32), (1001, (2432,), "int4", None, 24)]
)
def test_folded_branches_at_full_size(case: Any, kind: str) -> None:
    """Against the reference, and against the layer in float32, whose outliers have the error of e4m3 here."""
    layer = random_gpu_layer(case)
    for m in (1024, 1100, 4608):
        inputs = random_gpu_inputs(m, case[1], kind)
        plan = linear.plan("a8-fp8-folded", m)
        y = plan(inputs, *layer.args(), "a8-fp8-folded", ())
        assert torch.equal(plan(inputs, *layer.args(), "a8-fp8-folded", ()), y)
        want = reference.few_bit_linear(inputs, *layer.args(), "a8-fp8-folded", ())
        exact = reference.few_bit_linear([x.float() for x in inputs], *layer.args(), "a16", ())
        assert relative(y, want) <= 5e-3 and 0.03 < relative(y, exact) <= 0.04


@pytest.mark.parametrize(("path", "limit"), [("a8-int8", 1.5e-2), ("a8-fp8", 4.0e-2)])
def test_error_against_the_canonical_layer(path: str, limit: float) -> None:
    layer = random_gpu_layer((3072, (3072,), "int4", 64, 0))
    inputs = random_gpu_inputs(512, (3072,))
    with ops.use_backend("torch"):
        want = ops.few_bit_linear([x.float() for x in inputs], path="a16", **layer.kwargs())
    assert relative(ops.few_bit_linear(inputs, path=path, **layer.kwargs()), want) <= limit


@pytest.mark.parametrize(
    "chosen",
    [
        GemmConfig(128, 256, 128, 8, 8, 3, True, True),
        GemmConfig(128, 256, 128, 16, 8, 3, True, True, early=True),
        GemmConfig(128, 256, 128, 8, 8, 4, True, True, halves=True),
        GemmConfig(128, 128, 128, 8, 4, 4, True, False),
        GemmConfig(64, 128, 128, 8, 4, 3, False, False, 2),
        GemmConfig(),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_every_kind_of_configuration(chosen: GemmConfig, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if chosen.descriptors and torch.cuda.get_device_capability() < (9, 0):
        chosen = GemmConfig()
    assert chosen.problem(config.device_of(torch.device("cuda", 0)).shared_memory, 24) is None
    monkeypatch.setattr(config, "gemm_for", lambda *args: chosen)
    layer = random_gpu_layer((1544, (1000, 300), "int4", 64, 24))
    inputs = random_gpu_inputs(300, (1000, 300))
    y = linear.plan(path, 300)(inputs, *layer.args(), path, ())
    with ops.use_backend("torch"):
        want = ops.few_bit_linear(inputs, path=path, **layer.kwargs())
    assert relative(y, want) <= 5e-3


@pytest.mark.parametrize("path", [*PATHS, "a4", "a16"])
def test_compiles_whole_and_replays_from_a_graph(path: str) -> None:
    layer = random_gpu_layer((512, (256,), "int4", 64, 32))

    def call(x: Tensor) -> Tensor:
        return torch.relu(ops.few_bit_linear([x * 2], path=path, **layer.kwargs())) + 1

    (x,) = random_gpu_inputs(48, (256,))
    want = call(x)
    compiled = torch.compile(call, fullgraph=True)
    assert relative(compiled(x), want) <= 5e-3
    graph, still = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = call(still)
    (fresh,) = random_gpu_inputs(47 + 1, (256,))
    still.copy_(fresh.flip(0))
    graph.replay()
    assert torch.equal(y, call(fresh.flip(0)))


@pytest.mark.parametrize("path", [*PATHS, "a4"])
@pytest.mark.parametrize("gelu_from", [0, 1000, 2900])
def test_gelu_at_full_size(path: str, gelu_from: int) -> None:
    layer = random_gpu_layer((3072, (3072,), "int4", 64, 32))
    inputs = random_gpu_inputs(4608, (3072,))
    y = ops.few_bit_linear(inputs, path=path, gelu_from=gelu_from, **layer.kwargs())
    with ops.use_backend("torch"):
        want = ops.few_bit_linear(inputs, path=path, gelu_from=gelu_from, **layer.kwargs())
    assert relative(y, want) <= 5e-3


@pytest.mark.parametrize("path", [*PATHS, "a4", "a16"])
@pytest.mark.parametrize("segments", [(3072,), (3072, 12288)])
@pytest.mark.parametrize("n", [3072, 1001])
def test_a_branch_whose_middle_is_beyond_float16_at_full_size(path: str, segments: tuple[int, ...], n: int) -> None:
    """Tokens of all sizes side by side: what one is divided by is not another's."""
    layer = moved(random_layer(0, n, segments, rank=32, smooth=True, stored=torch.float16))
    layer = dataclasses.replace(layer, down=layer.down * 2**12, up=layer.up * 2.0**-12)
    for m in (7, 64, 100, 600, 4608):
        sizes = 2.0 ** torch.randint(-6, 9, (m, 1), generator=torch.Generator().manual_seed(m)).cuda()
        inputs = [(x.float() * sizes).half() for x in random_gpu_inputs(m, segments)]
        y = ops.few_bit_linear(inputs, path=path, **layer.kwargs())
        with ops.use_backend("torch"):
            want = ops.few_bit_linear(inputs, path=path, **layer.kwargs())
        error = (y.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)
        assert error.max() <= 5e-3


@pytest.mark.parametrize("segments", [(512,), (384, 640)])
def test_a_last_wave_of_narrower_tiles_is_the_same(segments: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_gpu_layer((3072, segments, "int4", 64, 32))
    inputs = random_gpu_inputs(4608, segments)
    y = linear.plan("a8-fp8", 4608)(inputs, *layer.args(), "a8-fp8", ())

    def whole(device: config.Device, m: int, n: int, k: int, count: int, rank: int, processors: int) -> Any:
        chosen = config.specialized_for(device, m, count, rank)
        return None if chosen is None else [(0, n, chosen)]

    monkeypatch.setattr(config, "specialized_parts", whole)
    assert torch.equal(y, linear.plan("a8-fp8", 4608)(inputs, *layer.args(), "a8-fp8", ()))


def test_a_shift_on_four_bits() -> None:
    layer = random_gpu_layer((3072, (3072, 12288), "int4", 64, 32))
    inputs = random_gpu_inputs(512, (3072, 12288))
    shift = (0.0, 0.171875)
    y = ops.few_bit_linear(inputs, path="a4", shift=shift, **layer.kwargs())
    with ops.use_backend("torch"):
        want = ops.few_bit_linear(inputs, path="a4", shift=shift, **layer.kwargs())
    assert relative(y, want) <= 5e-3


@pytest.mark.parametrize("path", [*PATHS, "a4", "a16"])
def test_launches_are_repeated(path: str) -> None:
    layer = random_gpu_layer((512, (256, 128), "int4", 64, 32))
    plan = linear.plan(path, 48)
    inputs = random_gpu_inputs(48, (256, 128))
    first = plan(inputs, *layer.args(), path, ())
    assert isinstance(plan, linear.LayerPlan) and plan.launches is not None
    assert torch.equal(plan(inputs, *layer.args(), path, ()), first)
    other = [x.flip(0).contiguous() for x in inputs]
    want = linear.plan(path, 48)(other, *layer.args(), path, ())
    assert torch.equal(plan(other, *layer.args(), path, ()), want) and not torch.equal(want, first)


def test_the_backend_that_runs_is_the_one_asked_for() -> None:
    layer = random_gpu_layer((512, (256,), "int4", 64, 0))
    inputs = random_gpu_inputs(65, (256,))
    with ops.use_backend("triton"):
        ops.few_bit_linear(inputs, path="a8-int8", **layer.kwargs())
        with pytest.raises(UserError, match=r"triton takes torch.bfloat16, torch.float16, not torch.float32"):
            ops.few_bit_linear([x.float() for x in inputs], path="a16", **layer.kwargs())


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_the_prologue_is_reached_through_the_operation(format: str) -> None:
    (x,) = random_gpu_inputs(33, (300,))
    with ops.use_backend("torch"):
        want = ops.quantize_activations(x, None, None, format)
    got = ops.quantize_activations(x, None, None, format)
    assert torch.equal(got[0].float(), want[0].float()) and torch.equal(got[1], want[1])


def test_reciprocals_of_16_bit_numbers_are_correctly_rounded() -> None:
    from kernel_cases import reciprocals

    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(1, 2**15, dtype=torch.int16, device="cuda").view(dtype)
        tiny = 2**-120 if dtype == torch.bfloat16 else 2**-14
        every = every[(every >= tiny) & (every <= 1 / tiny)]
        assert torch.equal(reciprocals(every), every.float().reciprocal())
