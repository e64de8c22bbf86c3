from __future__ import annotations

import io

import peft
import pytest
import torch
from layers_helpers import INT4, TERNARY, few_bit
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from bittern.layers import group_linear, set_path
from bittern.scheme import Scheme


class Block(nn.Module):
    """A group that shares an input, a layer with two inputs, and a member called on its own."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.q, self.k, self.v, self.mlp = few_bit([64, 64, 64, 128], 64, scheme)
        (self.out,) = few_bit([64], 192, scheme, (64, 128))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, mlp = group_linear([self.q, self.k, self.v, self.mlp], x)
        attention = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out([attention, nn.functional.gelu(mlp)]) + self.k(x)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", [INT4, TERNARY])
@pytest.mark.parametrize("path", ["auto", "a4"])
def test_compiles_whole(scheme: Scheme, path: str) -> None:
    block = Block(scheme)
    set_path(block, path)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for rows in (10, 12, 9):
        x = torch.randn(2, rows, 64)
        assert torch.allclose(compiled(x), block(x), atol=1e-5)


def test_repeated_blocks_compile_once() -> None:
    model = nn.Sequential(*(Block(INT4) for _ in range(12))).requires_grad_(False)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.nodes))
        return graph

    for block in model:
        block.compile(fullgraph=True, backend=backend)
    x = torch.randn(2, 10, 64)
    for block in model:
        block(x)
    assert len(graphs) == 1


def test_a_layer_that_was_just_loaded_compiles() -> None:
    block, other = Block(INT4), Block(INT4).to("meta")
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, 5, 64)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), block(x), atol=1e-5)


def test_gradients_pass_through_the_compiled_layer() -> None:
    block = Block(INT4)
    x = torch.randn(2, 5, 64)
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    block(eager).sum().backward()
    torch.compile(block, fullgraph=True, backend="aot_eager")(compiled).sum().backward()
    assert torch.allclose(eager.grad, compiled.grad, atol=1e-5)


def test_exports() -> None:
    block = Block(INT4).requires_grad_(False)
    x = torch.randn(2, 5, 64)
    program = torch.export.export(block, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), block(x))


def test_a_wrapped_layer_compiles_whole() -> None:
    block = Block(INT4)
    x = torch.randn(2, 5, 64)
    plain = block(x)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q", "mlp"], init_lora_weights=False), block)
    assert not torch.allclose(block(x), plain, atol=1e-2)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), block(x), atol=1e-5)


def test_the_weight_can_be_asked_within_a_compiled_function() -> None:
    (layer,) = few_bit([20], 64)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def cast(x: Tensor) -> Tensor:
        return layer(x.to(layer.weight.dtype)) @ layer.weight

    x = torch.randn(3, 64, dtype=torch.bfloat16)
    compiled = torch.compile(cast, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    assert torch.allclose(compiled(x), cast(x), atol=1e-5)
    # Asked for its dtype it costs nothing; asked for its numbers it is one operation.
    assert [str(node.target) for node in graphs[0].graph.nodes].count("bittern.dequantize.default") == 1


@pytest.mark.slow
def test_inductor_compiles_whole() -> None:
    block = Block(INT4).requires_grad_(False)
    x = torch.randn(2, 10, 64)
    assert torch.allclose(torch.compile(block, fullgraph=True)(x), block(x), atol=1e-5)
