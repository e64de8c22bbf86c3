"""Blocks of three profiles, as `--fit` makes them, compile once each: no more graphs, and none after warm-up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import bittern
from bittern import recipes
from bittern.layers import quant_layers
from families import FAMILIES

BLOCKS = 7
"""More than three profiles would compile if each block were one of its own."""

RANKS = (0, 16, 32)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def _model(ranks: tuple[int, ...]) -> nn.Module:
    config = {**FAMILIES["flux"].tiny, "num_layers": BLOCKS, "num_single_layers": BLOCKS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.FluxTransformer2DModel(**config).eval().requires_grad_(False)
    overrides = {
        f"{kind}.{index}.*": {"rank": ranks[index % len(ranks)]}
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for index in range(BLOCKS)
    }
    bittern.quantize(model, recipes.load("svdquant-fast").override(overrides=overrides))
    return model


def _inputs(images: int) -> dict[str, torch.Tensor]:
    return {name: value if name.endswith("_ids") else value[:images] for name, value in FAMILIES["flux"].call().items()}


def _counting(model: Any, images: int) -> tuple[Counter[str], Callable[[], torch.Tensor]]:
    """The graphs that each kind of block is compiled to, as they come, and a step of the model."""
    graphs: Counter[str] = Counter()

    def backend_of(kind: str) -> Callable[..., GraphModule]:
        def backend(graph: GraphModule, _example: list[torch.Tensor]) -> GraphModule:
            graphs[kind] += 1
            return graph

        return backend

    for kind in type(model)._repeated_blocks:
        model._repeated_blocks = [kind]
        model.compile_repeated_blocks(fullgraph=True, backend=backend_of(kind))

    def step() -> torch.Tensor:
        return model(**_inputs(images), return_dict=False)[0]

    return graphs, step


@pytest.mark.parametrize("images", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_three_profiles_are_three_graphs_a_kind_of_block(images: int) -> None:
    model = _model(RANKS)
    ranks = {layer.scheme.rank for path, layer in quant_layers(model).items() if "norm" not in path}
    assert ranks == set(RANKS)
    with torch.no_grad():
        plain = model(**_inputs(images), return_dict=False)[0]
        graphs, step = _counting(model, images)
        assert torch.allclose(step(), plain, rtol=1e-4, atol=1e-5)
        assert graphs == {"FluxTransformerBlock": 3, "FluxSingleTransformerBlock": 3}
        step()
    assert sum(graphs.values()) == 6


@pytest.mark.parametrize("images", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_profile_is_one_graph(images: int) -> None:
    model = _model((16,))
    with torch.no_grad():
        graphs, step = _counting(model, images)
        step()
    assert graphs == {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1}
