from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bittern.layers import QuantLinear, join_group
from bittern.scheme import Scheme
from bittern.solvers import Solution, SolverOptions, solve

INT4 = Scheme(group_size=32, rank=8, smooth=True, activations=8)
TERNARY = Scheme(weight="ternary", group_size=None, activations=16)
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
GROUPS = [
    [f"{DOUBLE}.attn.to_q", f"{DOUBLE}.attn.to_k", f"{DOUBLE}.attn.to_v"],
    [f"{DOUBLE}.attn.to_out.0"],
    [f"{DOUBLE}.ff.net.0.proj"],
    [f"{DOUBLE}.ff.net.2"],
    [f"{DOUBLE}.norm1.linear"],
    [f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_k", f"{SINGLE}.attn.to_v", f"{SINGLE}.proj_mlp"],
    [f"{SINGLE}.proj_out"],
]
TARGETS = [path for group in GROUPS for path in group]


def solved(
    linears: Sequence[nn.Linear], scheme: Scheme = INT4, segments: Sequence[int] | None = None
) -> tuple[list[QuantLinear], list[Solution]]:
    """Few-bit layers of linears that share an input, not joined, and the solutions they are made of."""
    segments = tuple(segments or (linears[0].in_features,))
    options = SolverOptions(smoothing="span" if scheme.smooth else "none")
    solutions = solve([linear.weight.detach() for linear in linears], scheme, options, segments, 0)
    layers = [
        QuantLinear.from_solution(linear, scheme, segments, solution)
        for linear, solution in zip(linears, solutions, strict=True)
    ]
    return layers, solutions


def few_bit(
    outputs: Sequence[int], k: int, scheme: Scheme = INT4, segments: Sequence[int] | None = None, bias: bool = True
) -> list[QuantLinear]:
    """Random few-bit layers that share an input, joined if there are several."""
    with torch.random.fork_rng():
        torch.manual_seed(len(outputs) + k)
        layers, _ = solved([nn.Linear(k, n, bias=bias) for n in outputs], scheme, segments)
    if len(layers) > 1:
        join_group(layers)
    return layers


def make_few_bit(transformer: Any, scheme: Scheme = INT4) -> None:
    """Swaps the block linears of the tiny random transformer."""
    for paths in GROUPS:
        linears = [transformer.get_submodule(path) for path in paths]
        layers, _ = solved(linears, scheme, (64, 256) if paths[0].endswith("proj_out") else None)
        if len(layers) > 1:
            join_group(layers)
        for path, layer in zip(paths, layers, strict=True):
            transformer.set_submodule(path, layer)


def draw(pipe: Any) -> Tensor:
    """One picture, always from the same noise, in float32."""
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(0)
    return pipe("a red cat", **size, guidance_scale=0.0, output_type="pt", generator=generator).images.float()


def lora_state(transformer: Any, paths: Sequence[str], seed: int, rank: int = 4) -> dict[str, Tensor]:
    """A random LoRA as a file for a FluxPipeline has it."""
    g = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for path in paths:
        module = transformer.get_submodule(path)
        state[f"transformer.{path}.lora_A.weight"] = 0.2 * torch.randn(rank, module.in_features, generator=g)
        state[f"transformer.{path}.lora_B.weight"] = 0.2 * torch.randn(module.out_features, rank, generator=g)
    return state
