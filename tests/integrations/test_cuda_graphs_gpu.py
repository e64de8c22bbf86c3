"""CUDA graphs of whole pipelines on a GPU: pictures are as near to those without as these are to one another."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import bittern
from bittern import pipelines
from bittern.graphs import record
from bittern.integrations.cuda_graphs import MOST
from bittern.layers import set_path
from bittern.quantization import component

pytestmark = pytest.mark.gpu
STEPS = 6


@pytest.fixture(scope="module")
def solved() -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in ("tiny-flux", "tiny-unet"):
        made[name] = pipelines.load(name, dtype=torch.bfloat16, device="cuda")
        made[name].set_progress_bar_config(disable=True)
        bittern.quantize(made[name], "svdquant-fast")
    return made


@pytest.fixture(params=["tiny-flux", "tiny-unet"])
def pipe(request: pytest.FixtureRequest, solved: dict[str, Any]) -> Any:
    return copy.deepcopy(solved[request.param])


@pytest.fixture
def flux(solved: dict[str, Any]) -> Any:
    return copy.deepcopy(solved["tiny-flux"])


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*without CUDA graphs")
        yield


def drawn(pipe: Any, prompts: int = 1, size: int | None = None) -> Tensor:
    call = pipelines.defaults(pipe)
    more = {} if size is None else {"height": size, "width": size}
    generators = [torch.Generator().manual_seed(seed) for seed in range(prompts)]
    options = call.options(STEPS) | {"output_type": "pt"} | more
    return pipe(prompt=["a photo of a red circle"] * prompts, generator=generators, **options).images


def check(pipe: Any, **how: Any) -> int:
    """Two pictures, each against one without graphs; how many calls were replays."""
    model: Any = component(pipe)
    graphs = model._compiled_call_impl
    before = graphs.replayed
    got = [drawn(pipe, **how) for _ in range(2)]
    model._compiled_call_impl = None
    want, again, once_more = (drawn(pipe, **how) for _ in range(3))
    model._compiled_call_impl = graphs
    assert torch.isfinite(want).all()
    # Nothing apart, unless a library's kernels add in another order from run to run.
    spread = max((again - want).abs().max().item(), (once_more - want).abs().max().item())
    apart = [(one - want).abs().max().item() for one in got]
    assert max(apart) <= 2 * spread, f"{apart} where ordinary pictures are {spread} apart: {graphs}"
    return graphs.replayed - before


def test_plain_sizes_and_batches(pipe: Any) -> None:
    graphs: Any = bittern.enable_cuda_graphs(pipe)
    assert check(pipe) == 2 * STEPS - 2
    assert check(pipe, prompts=3) == 2 * STEPS - 2
    assert check(pipe, size=64) == 2 * STEPS - 2
    assert check(pipe) == 2 * STEPS and graphs.recorded == 3


def test_paths_and_backends(pipe: Any) -> None:
    graphs: Any = bittern.enable_cuda_graphs(pipe)
    assert check(pipe) == 2 * STEPS - 2
    set_path(component(pipe), "a8-int8")
    assert check(pipe) == 2 * STEPS - 2
    set_path(component(pipe), "a16")
    assert check(pipe) == 2 * STEPS - 2
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert check(pipe) == 2 * STEPS - 2
    assert check(pipe) == 2 * STEPS and graphs.recorded == 4


def test_loaded_loras_and_their_strengths(pipe: Any) -> None:
    graphs: Any = bittern.enable_cuda_graphs(pipe)
    plain = drawn(pipe)
    model: Any = component(pipe)
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    model.add_adapter(config, "a")
    assert check(pipe) == 2 * STEPS - 2
    strong = drawn(pipe)
    model.set_adapters(["a"], [0.3])
    assert check(pipe) == 2 * STEPS - 2
    assert not torch.equal(drawn(pipe), strong) and not torch.equal(strong, plain)
    model.disable_adapters()
    assert check(pipe) == 2 * STEPS - 2 and graphs.recorded == 4


def test_fused_loras_and_their_strengths(pipe: Any) -> None:
    graphs: Any = bittern.enable_cuda_graphs(pipe)
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    component(pipe).add_adapter(config, "a")
    bittern.fuse_loras(pipe)
    assert check(pipe) == 2 * STEPS - 2
    strong = drawn(pipe)
    bittern.set_lora_strengths(pipe, {"a": 0.3})
    assert check(pipe) == 2 * STEPS and graphs.recorded == 1
    assert not torch.equal(drawn(pipe), strong)
    bittern.unfuse_loras(pipe)
    assert check(pipe) == 2 * STEPS - 2


def test_to_the_cpu_and_back(flux: Any) -> None:
    bittern.enable_cuda_graphs(flux)
    assert check(flux) == 2 * STEPS - 2
    flux.to("cpu")
    other = torch.randn(2**25, device="cuda")
    flux.to("cuda")
    assert check(flux) >= 2 * STEPS - 2
    del other


def test_memory_comes_back(flux: Any) -> None:
    drawn(flux)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    bittern.enable_cuda_graphs(flux)
    for prompts in range(1, MOST + 3):
        drawn(flux, prompts=prompts)
    bittern.disable_cuda_graphs(flux)
    torch.cuda.synchronize()
    # What cuBLAS keeps for a stream that it has met stays.
    assert torch.cuda.memory_allocated() - before < 80 * 2**20


def test_what_cannot_be_recorded_runs_as_before(flux: Any) -> None:
    model = flux.transformer
    plain = type(model.proj_out).forward

    class Asking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            float(x.sum())  # waits for the device
            return plain(self, x)

    model.proj_out.__class__ = Asking
    want = drawn(flux)
    graphs: Any = bittern.enable_cuda_graphs(flux)
    with pytest.warns(UserWarning, match="recording failed"):
        got = drawn(flux)
    assert torch.equal(got, want) and graphs.replayed == 0
    # The device, its stream and its random numbers go on.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(4, device="cuda").isfinite().all()
    torch.cuda.empty_cache()
    model.proj_out.__class__ = nn.Linear
    assert check(flux) == 2 * STEPS - 2


def test_compiled_blocks_and_their_graph(flux: Any) -> None:
    model = flux.transformer
    model.compile_repeated_blocks(fullgraph=True)
    want = drawn(flux)
    graphs: Any = bittern.enable_cuda_graphs(flux)
    assert torch.equal(drawn(flux), want) and graphs.replayed == STEPS - 2
    assert torch.equal(drawn(flux), want) and graphs.replayed == 2 * STEPS - 2


def test_within_somebody_elses_recording() -> None:
    layer: Any = nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    graphs: Any = bittern.enable_cuda_graphs(layer)
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    want = [layer(x) for _ in range(3)][-1]
    # What would have to be let go now stays until it may be.
    layer.weight.data = 2 * layer.weight.data
    graph, y = record(lambda: layer(x))
    graph.replay()
    assert not torch.equal(y, want) and torch.equal(y, layer(x)) and graphs.recorded == 1


def test_streams_and_threads(flux: Any) -> None:
    graphs: Any = bittern.enable_cuda_graphs(flux)
    want = drawn(flux)
    found: list[Tensor] = []

    def elsewhere() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(drawn(flux))
            torch.cuda.current_stream().synchronize()

    elsewhere()
    with torch.inference_mode():
        found.append(drawn(flux))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(found) == 3 and all(torch.equal(one, want) for one in found)
    assert graphs.recorded == 1 and graphs.replayed == 4 * STEPS - 2
