"""One step of a FLUX.1-dev-shaped transformer with random weights: time, weights, peak memory, and where time goes.

    python benchmarks/step.py --json benchmarks/results/step_h100.json [--compile] [--profile]

Random weights tell speed and memory and nothing of quality. A step is timed as it is called (eager, or compiled
block by block), and as the replay of a CUDA graph of those calls, which leaves out what launching costs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from bittern import recipes
from bittern.architectures import plan
from bittern.layers import QuantLinear, join_group
from bittern.quantization.jobs import swap

BF16 = torch.bfloat16


def skeleton() -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True).to(BF16).eval().requires_grad_(False)


def fill(model: nn.Module) -> None:
    """Random numbers for every parameter that is still on the meta device."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.empty_like(parameter, device="cuda").normal_(0, 0.02)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)


def few_bit(recipe: str) -> FluxTransformer2DModel:
    model = skeleton()
    made = plan(model, recipes.load(recipe))
    for job in made.jobs:
        layers = [
            QuantLinear.empty(k, n, job.scheme, job.segments, True, "meta", BF16).eval().requires_grad_(False)
            for n, k in job.shapes
        ]
        if len(layers) > 1:
            join_group(layers)
        for path, layer in zip(job.paths, layers, strict=True):
            for leaf, tensor in layer.tensors().items():
                layer.load(leaf, random(leaf, tensor, job.scheme.weight))
            swap(model, path, layer)
    made.architecture.install(model)
    fill(model)
    return model


def random(leaf: str, like: Tensor, weight: str) -> Tensor:
    if leaf == "codes":
        codes = torch.randint(0, 256, like.shape, dtype=torch.uint8, device="cuda")
        # Two bits 11 are no ternary code.
        return codes & ~((codes & (codes >> 1) & 0x55) * 2) if weight == "ternary" else codes
    if leaf in ("scales", "smooth"):
        low = 0.5 if leaf == "smooth" else 0.002
        return (torch.rand(like.shape, device="cuda") * low + low).to(like.dtype)
    return (torch.randn(like.shape, device="cuda") * 0.02).to(like.dtype)


def inputs(side: int = 64, text: int = 512) -> dict[str, Tensor]:
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device="cuda", dtype=BF16)

    ids = torch.zeros(side, side, 3, device="cuda")
    ids[..., 1] += torch.arange(side, device="cuda")[:, None]
    ids[..., 2] += torch.arange(side, device="cuda")[None, :]
    return {
        "hidden_states": normal(1, side * side, 64),
        "encoder_hidden_states": normal(1, text, 4096),
        "pooled_projections": normal(1, 768),
        "timestep": torch.tensor([0.5], device="cuda", dtype=BF16),
        "guidance": torch.tensor([3.5], device="cuda", dtype=BF16),
        "img_ids": ids.reshape(-1, 3).to(BF16),
        "txt_ids": torch.zeros(text, 3, device="cuda", dtype=BF16),
    }


def median(call: Any, repeats: int) -> float:
    times: list[float] = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


@torch.no_grad()
def measure(name: str, compiled: bool, profile: bool) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    began = time.perf_counter()
    if name == "bf16":
        model = skeleton()
        fill(model)
    else:
        model = few_bit(name)
    resident = torch.cuda.memory_allocated()
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
    x = inputs()

    def step() -> Tensor:
        return model(**x, return_dict=False)[0]

    for _ in range(3):
        y = step()
    torch.cuda.synchronize()
    ready = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    row = {"model": name, "compiled": compiled, "ms": round(median(step, 10), 2)}
    row |= {
        "resident_gib": round(resident / 2**30, 3),
        "peak_above_resident_gib": round((torch.cuda.max_memory_allocated() - resident) / 2**30, 3),
        "finite": bool(y.isfinite().all()),
        "seconds_to_ready": round(ready, 1),
    }
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    row["graph_ms"] = round(median(graph.replay, 10), 2)
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        with profiler(activities=[ProfilerActivity.CUDA]) as recorded:
            graph.replay()
            torch.cuda.synchronize()
        events = sorted(recorded.key_averages(), key=lambda e: -e.device_time_total)
        row["kernels"] = [
            {"name": e.key[:70], "calls": e.count, "ms": round(e.device_time_total / 1e3, 3)} for e in events[:14]
        ]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="*", default=["bf16", "svdquant-fast", "ternary-fast"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows.append(measure(name, args.compile, args.profile))
        torch._dynamo.reset()
        print({k: v for k, v in rows[-1].items() if k != "kernels"}, flush=True)
        for kernel in rows[-1].get("kernels", []):
            print(f"    {kernel['ms']:8.3f} ms {kernel['calls']:5} x {kernel['name']}", flush=True)
        if args.json:
            result = {
                "command": " ".join(sys.argv),
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "rows": rows,
            }
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
