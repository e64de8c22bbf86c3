"""LoRAs on a few-bit FLUX, through diffusers' and peft's own doors."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from layers_helpers import TARGETS, draw, lora_state, make_few_bit
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from bittern.errors import UserError
from bittern.layers import FewBitWeight, QuantLinear, paths, quant_layers


@pytest.fixture
def pipe(new_tiny_random_pipeline: Callable[[], FluxPipeline]) -> Iterator[FluxPipeline]:
    """A pipeline with a few-bit transformer."""
    pipe = new_tiny_random_pipeline()
    make_few_bit(pipe.transformer)
    with warnings.catch_warnings():
        # Peft tells that a model has several adapters, which is what these tests are about.
        warnings.simplefilter("ignore", UserWarning)
        yield pipe


def test_few_bits_draw_nearly_the_same_picture(
    pipe: FluxPipeline, new_tiny_random_pipeline: Callable[[], FluxPipeline]
) -> None:
    original, few = draw(new_tiny_random_pipeline()), draw(pipe)
    assert 0 < (few - original).abs().max() < 0.01
    assert paths(pipe.transformer) == {"a8-int8": len(TARGETS)}


def test_loras_load_mix_switch_and_leave(pipe: FluxPipeline) -> None:
    plain = draw(pipe)
    pipe.load_lora_weights(lora_state(pipe.transformer, [*TARGETS, "x_embedder"], seed=1), adapter_name="a")
    with_a = draw(pipe)
    assert (with_a - plain).abs().max() > 0.05
    assert set(quant_layers(pipe.transformer)) == set(TARGETS)

    pipe.load_lora_weights(lora_state_of_wrapped(pipe, TARGETS[:5], seed=2), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 0.3])
    mixed = draw(pipe)
    assert (mixed - with_a).abs().max() > 0.01
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), mixed)

    pipe.set_adapters("a")
    assert torch.equal(draw(pipe), with_a)
    pipe.delete_adapters("b")
    assert torch.equal(draw(pipe), with_a)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)
    assert all(isinstance(pipe.transformer.get_submodule(path), QuantLinear) for path in TARGETS)


def lora_state_of_wrapped(pipe: FluxPipeline, targets: list[str], seed: int) -> dict[str, Tensor]:
    unwrapped = copy.deepcopy(pipe.transformer)
    unwrapped.unload_lora()
    return lora_state(unwrapped, targets, seed)


def test_a_lora_does_what_it_does_to_the_dequantized_model(pipe: FluxPipeline) -> None:
    dense = copy.deepcopy(pipe)
    for path, layer in quant_layers(pipe.transformer).items():
        layer.path = "a16"
        linear = torch.nn.Linear(layer.in_features, layer.out_features)
        linear.load_state_dict({"weight": layer.weight.dequantize(), "bias": layer.bias})
        dense.transformer.set_submodule(path, linear)
    state = lora_state(pipe.transformer, TARGETS, seed=1)
    for each in (pipe, dense):
        each.load_lora_weights(dict(state))
    assert torch.allclose(draw(pipe), draw(dense), atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}])
def test_loras_save_and_load_as_files(pipe: FluxPipeline, tmp_path: Path, options: dict[str, bool]) -> None:
    state = lora_state(pipe.transformer, TARGETS, seed=1)
    pipe.load_lora_weights(dict(state), adapter_name="a", **options)
    with_a = draw(pipe)
    saved = get_peft_model_state_dict(pipe.transformer, adapter_name="a")
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=saved)
    assert {key: value.shape for key, value in load_file(tmp_path / "pytorch_lora_weights.safetensors").items()} == {
        key: value.shape for key, value in state.items()
    }
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, **options)
    assert torch.equal(draw(pipe), with_a)


def test_a_lora_of_fewer_inputs_is_widened(pipe: FluxPipeline) -> None:
    state = lora_state(pipe.transformer, TARGETS[:1], seed=1)
    key = f"transformer.{TARGETS[0]}.lora_A.weight"
    narrow = {**state, key: state[key][:, :48]}
    pipe.load_lora_weights(narrow)
    widened = draw(pipe)
    pipe.unload_lora_weights()
    state[key][:, 48:] = 0
    pipe.load_lora_weights(state)
    assert torch.equal(draw(pipe), widened)


@pytest.mark.parametrize("safe", [False, True])
def test_fusing_a_lora_fails_and_harms_nothing(pipe: FluxPipeline, safe: bool) -> None:
    pipe.load_lora_weights(lora_state(pipe.transformer, TARGETS, seed=1))
    before = draw(pipe)
    with pytest.raises(UserError, match=r"read-only.*fuse them with bittern.fuse_loras"):
        pipe.fuse_lora(safe_fusing=safe)
    assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_initialisations_that_would_change_the_weight_fail(pipe: FluxPipeline, method: str) -> None:
    with pytest.raises(UserError, match="read-only"):
        pipe.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=method, target_modules=["to_q"]))


def test_the_state_dict_is_what_a_checkpoint_needs(pipe: FluxPipeline, tmp_path: Path) -> None:
    state = pipe.transformer.state_dict()
    facades = {key for key, value in state.items() if isinstance(value, FewBitWeight)}
    assert facades == {f"{path}.weight" for path in TARGETS}
    stored = {key: value for key, value in state.items() if key not in facades}
    save_file(stored, tmp_path / "model.safetensors")
    other = copy.deepcopy(pipe)
    for buffer in other.transformer.buffers():
        buffer.zero_()
    other.transformer.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(draw(other), draw(pipe))


def test_copies_draw_the_same_and_dtypes_follow(pipe: FluxPipeline) -> None:
    plain = draw(pipe)
    assert torch.equal(draw(copy.deepcopy(pipe)), plain)
    other = copy.deepcopy(pipe)
    other.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(draw(other), plain)
    other.to(torch.bfloat16)
    assert other.transformer.dtype == torch.bfloat16
    assert 0 < (draw(other) - plain).abs().max() < 0.05
    assert torch.equal(draw(pipe), plain)


def test_parameters_are_those_that_stayed_dense(pipe: FluxPipeline) -> None:
    transformer = pipe.transformer
    dense = sum(p.numel() for name, p in transformer.named_parameters())
    few = sum(layer.in_features * layer.out_features for layer in quant_layers(transformer).values())
    original = sum(value.numel() for key, value in transformer.state_dict().items() if key.endswith(("weight", "bias")))
    assert transformer.num_parameters() == dense == original - few
    buffers = sum(t.nbytes for layer in quant_layers(transformer).values() for t in layer.tensors().values())
    assert transformer.get_memory_footprint() == 4 * dense + buffers


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_trains_on_a_few_bit_model(pipe: FluxPipeline, checkpointing: bool) -> None:
    transformer = pipe.transformer.train()
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "proj_out", "proj_mlp", "linear"]))
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    trained = [p for p in transformer.parameters() if p.requires_grad]
    assert len(trained) == 22
    g = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(2, 64, 16, generator=g),
        "timestep": torch.tensor([0.3, 0.7]),
        "pooled_projections": torch.randn(2, 32, generator=g),
        "encoder_hidden_states": torch.randn(2, 16, 32, generator=g),
        "txt_ids": torch.zeros(16, 3),
        "img_ids": torch.rand(64, 3, generator=g),
    }
    target = torch.randn(2, 64, 16, generator=g)
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses: list[float] = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (transformer(**call).sample - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
