"""Grouped FLUX blocks: the numbers of diffusers' own blocks, in fewer operations."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models import activations
from diffusers.models.transformers import transformer_flux
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bittern
from bittern import recipes
from bittern.architectures import flux_forward


class Operations(TorchDispatchMode):
    """Counts operations, and remembers the widths of concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.joined: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count[func._schema.name] += 1
        if func is torch.ops.aten.cat.default:
            self.joined.add(out.shape[-1])
        return out


def ungrouped(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A copy that runs diffusers' own code."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, transformer_flux.FluxAttention):
            module.set_processor(transformer_flux.FluxAttnProcessor())
        elif isinstance(module, flux_forward.FluxSingleTransformerBlock):
            module.__class__ = transformer_flux.FluxSingleTransformerBlock
        elif isinstance(module, flux_forward.GELU):
            module.__class__ = activations.GELU
    return model


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden_states": random(2, 16, 16),
        "encoder_hidden_states": random(2, 8, 32),
        "pooled_projections": random(2, 32),
        "timestep": torch.tensor([0.3, 0.8]).to(dtype),
        "img_ids": torch.arange(48).reshape(16, 3).float(),
        "txt_ids": torch.zeros(8, 3),
    }


@torch.no_grad()
def run(model: FluxTransformer2DModel, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    return model(**inputs(dtype), **kwargs).sample


@pytest.fixture
def model(new_tiny_random_pipeline: Callable[[], FluxPipeline]) -> FluxTransformer2DModel:
    return new_tiny_random_pipeline().transformer


# The stacked GEMM sums in another order; where a rounding to few bits follows, a value on the edge may flip.
TOLERANCES = {"int4": 1e-5, "svdquant-fast": 2e-3, "ternary-fast": 2e-3}


@pytest.mark.parametrize("recipe", [name for name in recipes.names() if not recipes.load(name).calibrated])
def test_same_numbers_as_diffusers(model: FluxTransformer2DModel, recipe: str) -> None:
    bittern.quantize(model, recipe)
    grouped, single = run(model), run(ungrouped(model))
    assert (grouped - single).norm() <= TOLERANCES[recipe] * single.norm()
    assert single.norm() > 0


def test_a_group_is_one_operation_and_nothing_is_concatenated(model: FluxTransformer2DModel) -> None:
    bittern.quantize(model, "svdquant-fast")
    with Operations() as ours:
        run(model)
    with Operations() as theirs:
        run(ungrouped(model))
    name = "bittern::few_bit_linear"
    # Double: 2 modulations, qkv, added qkv, 2 outputs, 4 of the MLPs. Single: modulation, qkv + mlp, output.
    assert ours.count[name] == 10 + 3
    assert theirs.count[name] == 14 + 6
    assert 64 + 256 not in ours.joined
    assert 64 + 256 in theirs.joined


def test_what_goes_into_a_gelu_is_not_written(model: FluxTransformer2DModel) -> None:
    bittern.quantize(model, "svdquant-fast")
    gelus = [module for module in model.modules() if isinstance(module, activations.GELU)]
    expected = run(model)
    with Operations() as theirs:
        run(ungrouped(model))
    with Operations() as ours:
        run(model)
    assert (theirs.count["aten::gelu"], ours.count["aten::gelu"]) == (3, 0)
    assert all(type(module) is flux_forward.GELU for module in gelus)
    seen: list[str] = []
    single = model.single_transformer_blocks[0]
    handles = [m.register_forward_hook(lambda *_: seen.append("layer")) for m in (gelus[0].proj, single.proj_mlp)]
    handles.append(single.act_mlp.register_forward_hook(lambda *_: seen.append("act")))
    assert (run(model) - expected).norm() <= 2e-3 * expected.norm()
    assert seen == ["layer", "layer", "act"]
    for handle in handles:
        handle.remove()


def test_fp16_stays_finite_where_diffusers_clips(model: FluxTransformer2DModel) -> None:
    bittern.quantize(model.to(torch.float16), "int4")
    with torch.no_grad():
        model.single_transformer_blocks[0].proj_out.bias.fill_(6e4)
    assert torch.isfinite(run(model, torch.float16)).all()


def test_a_16_bit_model_is_untouched_by_the_install(model: FluxTransformer2DModel) -> None:
    before = run(model)
    flux_forward.install(model)
    assert torch.allclose(run(model), before, atol=1e-6)


def test_others_in_place_run_diffusers_code(model: FluxTransformer2DModel) -> None:
    bittern.quantize(model, "int4")
    expected = run(model)
    attn = model.single_transformer_blocks[0].attn
    seen: list[str] = []
    handle = attn.register_forward_hook(lambda *_: seen.append("attn"))
    assert torch.allclose(run(model), expected, atol=1e-5)
    assert seen == ["attn"]
    handle.remove()
    run(model)
    assert seen == ["attn"]
    attn.set_processor(transformer_flux.FluxAttnProcessor())
    assert torch.allclose(run(model), expected, atol=1e-5)


def test_adapters_on_members_and_output(model: FluxTransformer2DModel) -> None:
    from peft import LoraConfig

    bittern.quantize(model, "int4")
    expected = run(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_k", "proj_mlp", "single_transformer_blocks.0.proj_out"]))
    assert torch.allclose(run(model), expected, atol=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    assert not torch.allclose(run(model), expected, atol=1e-3)


def test_copies_and_pickles_stay_grouped(model: FluxTransformer2DModel) -> None:
    bittern.quantize(model, "svdquant-fast")
    expected = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with Operations() as operations:
            assert torch.equal(run(other), expected)
        assert operations.count["bittern::few_bit_linear"] == 13


def test_blocks_keep_the_names_by_which_diffusers_finds_them(model: FluxTransformer2DModel) -> None:
    bittern.quantize(model, "int4")
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._repeated_blocks) <= names
    assert set(model._no_split_modules) <= names


def test_compiles_without_a_break(model: FluxTransformer2DModel) -> None:
    bittern.quantize(model, "svdquant-fast")
    expected = run(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(model), expected, rtol=1e-4, atol=1e-5)
