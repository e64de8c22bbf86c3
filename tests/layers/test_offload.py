"""Accelerate's and diffusers' ways to keep a model elsewhere, with the CPU in the GPU's place."""

from __future__ import annotations

from collections.abc import Callable

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import FluxPipeline
from layers_helpers import draw, make_few_bit

from bittern.architectures import install


@pytest.fixture
def pipe(new_tiny_random_pipeline: Callable[[], FluxPipeline]) -> FluxPipeline:
    """A pipeline with a few-bit transformer."""
    pipe = new_tiny_random_pipeline()
    make_few_bit(pipe.transformer)
    return pipe


def test_the_whole_model_comes_and_goes(pipe: FluxPipeline) -> None:
    plain = draw(pipe)
    _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    assert torch.equal(draw(pipe), plain)
    hook.offload()
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("buffers", [False, True])
def test_layer_by_layer(pipe: FluxPipeline, buffers: bool, grouped: bool) -> None:
    if grouped:
        # As after quantizing: our forwards, which read some tensors themselves.
        install(pipe.transformer)
    plain = draw(pipe)
    accelerate.cpu_offload(pipe.transformer, execution_device="cpu", offload_buffers=buffers)
    assert all(p.is_meta for p in pipe.transformer.parameters())
    assert torch.equal(draw(pipe), plain)
    remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(draw(pipe), plain)
    assert not any(p.is_meta for p in pipe.transformer.parameters())


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_by_group(pipe: FluxPipeline, kind: str) -> None:
    plain = draw(pipe)
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    assert torch.equal(draw(pipe), plain)


def test_layerwise_casting_leaves_the_codes_alone(pipe: FluxPipeline) -> None:
    plain = draw(pipe)
    buffers = {name: buffer.clone() for name, buffer in pipe.transformer.named_buffers()}
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert (draw(pipe) - plain).abs().max() < 0.1
    for name, buffer in pipe.transformer.named_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype


def test_fused_qkv_projections_compute_the_same(pipe: FluxPipeline) -> None:
    plain = draw(pipe)
    pipe.transformer.fuse_qkv_projections()
    # Diffusers' fused layer is dense, and so it has no 8-bit activations.
    assert 0 < (draw(pipe) - plain).abs().max() < 1e-2
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(draw(pipe), plain)
