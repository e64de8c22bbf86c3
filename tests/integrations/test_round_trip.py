"""Few-bit models through plain diffusers: what is saved, loaded, sharded and moved stays the same, bit for bit."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, FluxPipeline, FluxTransformer2DModel, PipelineQuantizationConfig
from safetensors import safe_open
from torch import nn

import bittern
from bittern import recipes
from bittern.errors import UserError
from bittern.layers import QuantLinear, quant_layers

NewPipeline = Callable[[], FluxPipeline]
RECIPES = [name for name in recipes.names() if not recipes.load(name).calibrated]
TRITS = recipes.load("ternary-fast").override(name="trits", default={"packing": "trits", "group_size": None})


def draw(pipe: DiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        ["a red circle", "blue"],
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="np",
    ).images


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def same_tensors(one: nn.Module, other: nn.Module) -> None:
    others = other.state_dict()
    assert one.state_dict().keys() == others.keys()
    for name, tensor in one.state_dict().items():
        if not name.endswith(".weight"):
            assert tensor.dtype == others[name].dtype, name
            assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [*RECIPES, TRITS], ids=str)
def test_a_reloaded_pipeline_draws_the_same_pictures(
    tiny_random_folder: Path, recipe: str | bittern.Recipe, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_random_folder, dtype=dtype)
    original = draw(pipe)
    bittern.quantize(pipe, recipe)
    memory = draw(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert np.array_equal(draw(loaded), memory)
    assert not np.array_equal(memory, original)
    assert np.isfinite(memory).all()
    same_tensors(pipe.transformer, loaded.transformer)
    assert not loaded.transformer.training
    assert isinstance(loaded.transformer.single_transformer_blocks[0].proj_out, QuantLinear)


@pytest.mark.parametrize("recipe", [*RECIPES, TRITS], ids=str)
def test_however_made_the_checkpoint_is_the_same(
    tiny_random_folder: Path, recipe: str | bittern.Recipe, tmp_path: Path
) -> None:
    source = {"pretrained_model_name_or_path": tiny_random_folder, "subfolder": "transformer", "dtype": torch.bfloat16}
    memory = FluxTransformer2DModel.from_pretrained(**source)
    bittern.quantize(memory, recipe)
    memory.save_pretrained(tmp_path / "memory")
    saved = hashes(tmp_path / "memory")
    assert set(saved) == {"config.json", "diffusion_pytorch_model.safetensors"}

    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "memory", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "again")
    assert hashes(tmp_path / "again") == saved
    on_load = FluxTransformer2DModel.from_pretrained(**source, quantization_config=bittern.QuantizationConfig(recipe))
    on_load.save_pretrained(tmp_path / "on_load")
    assert hashes(tmp_path / "on_load") == saved
    # A second save of the same object, and a copy's, too.
    memory.save_pretrained(tmp_path / "memory")
    copy.deepcopy(memory).save_pretrained(tmp_path / "copy")
    assert hashes(tmp_path / "memory") == hashes(tmp_path / "copy") == saved


def test_two_processes_write_the_same_bytes(tiny_random_folder: Path, tmp_path: Path) -> None:
    code = """
import sys, torch, bittern
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
bittern.quantize(pipe, "svdquant-fast")
pipe.save_pretrained(sys.argv[2])
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tiny_random_folder), str(tmp_path / "there")],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    pipe = DiffusionPipeline.from_pretrained(str(tiny_random_folder), dtype=torch.bfloat16)
    bittern.quantize(pipe, "svdquant-fast")
    pipe.save_pretrained(tmp_path / "here")
    here = hashes(tmp_path / "here")
    assert here == hashes(tmp_path / "there")
    assert "transformer/diffusion_pytorch_model.safetensors" in here


@pytest.mark.parametrize("recipe", ["svdquant-fast", TRITS], ids=str)
def test_shards(tiny_random_folder: Path, recipe: str | bittern.Recipe, tmp_path: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(tiny_random_folder, subfolder="transformer", dtype=torch.bfloat16)
    report = bittern.quantize(model, recipe)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 60_000 for shard in shards)
    same_tensors(model, FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16))
    inspected = bittern.inspect(tmp_path)
    assert (inspected.rows, inspected.bytes) == (report.rows, report.bytes)


def test_what_the_file_holds(new_tiny_random_pipeline: NewPipeline, tmp_path: Path) -> None:
    model = new_tiny_random_pipeline().transformer
    bittern.quantize(model, "svdquant-fast")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        names = set(file.keys())
        # More than one key makes the file's bytes depend on the order of a hash map.
        assert file.metadata() == {"format": "pt"}
    block = "single_transformer_blocks.0."
    leaves = {"codes", "scales", "up", "bias"}
    assert {name for name in names if name.startswith(block + "proj_mlp.")} == {
        f"{block}proj_mlp.{leaf}" for leaf in leaves
    }
    first = {f"{block}attn.to_q.{leaf}" for leaf in (*leaves, "down", "smooth")}
    assert {name for name in names if name.startswith(block + "attn.to_q.")} == first
    assert "x_embedder.weight" in names
    config = json.loads((tmp_path / "config.json").read_text())
    assert "_name_or_path" not in config
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["format_version"]) == ("bittern", 1)
    assert quantization["recipe"]["name"] == "svdquant-fast"
    assert quantization["targets"][block + "proj_out"]["shape"] == [64, 320]
    assert quantization["segments"] == {block + "proj_out": [64, 256]}
    assert [block + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")] in quantization["groups"]
    assert len(quantization["errors"]) == 20


def test_dtype_never_casts_what_is_stored(new_tiny_random_pipeline: NewPipeline, tmp_path: Path) -> None:
    model = new_tiny_random_pipeline().transformer
    with torch.no_grad():
        # Scales of about 1e-6 would lose bits, or vanish, in fp16.
        model.transformer_blocks[0].attn.to_q.weight.mul_(1e-5)
    bittern.quantize(model, recipes.load("svdquant-fast").override(default={"scale_dtype": "fp32"}))
    model.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16, None):
        loaded = FluxTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.dtype == (dtype or torch.float32)
        for path, layer in quant_layers(loaded).items():
            assert layer.bias.dtype == layer.weight.dtype == loaded.dtype
            for leaf, tensor in layer.tensors().items():
                expected = quant_layers(model)[path].tensors()[leaf]
                assert tensor.dtype == expected.dtype, (path, leaf)
                assert torch.equal(tensor, expected), (path, leaf)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(new_tiny_random_pipeline: NewPipeline, device_map: Any, tmp_path: Path) -> None:
    model = new_tiny_random_pipeline().transformer
    bittern.quantize(model, "svdquant-fast")
    model.save_pretrained(tmp_path)
    same_tensors(model, FluxTransformer2DModel.from_pretrained(tmp_path, device_map=device_map))
    with pytest.raises(UserError, match="device_map puts few-bit layers on disk"):
        FluxTransformer2DModel.from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "off")


def test_every_key_that_diffusers_sizes_has_a_buffer(
    new_tiny_random_pipeline: NewPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU in the device map, diffusers asks the model for the tensor of every key before it loads."""
    from diffusers.models import modeling_utils

    model = new_tiny_random_pipeline().transformer
    bittern.quantize(model, "svdquant-fast")
    model.save_pretrained(tmp_path)
    sizes: dict[str, int] = {}

    def warm_up(model: nn.Module, expanded: dict[str, Any], dtype: Any, quantizer: Any) -> None:
        for name in expanded:
            try:
                sizes[name] = model.get_parameter(name).numel()
            except AttributeError:
                sizes[name] = model.get_buffer(name).numel()
        assert quantizer.get_cuda_warm_up_factor() == 2

    monkeypatch.setattr(modeling_utils, "_caching_allocator_warmup", warm_up)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, device_map="cpu")
    assert "get_buffer" not in vars(loaded)
    expected = {name: t.numel() for name, t in loaded.state_dict().items()}
    for path in quant_layers(loaded):
        del expected[f"{path}.weight"]
    assert sizes == expected


def test_quantizing_while_loading(tiny_random_folder: Path, tmp_path: Path) -> None:
    config = bittern.QuantizationConfig("ternary-fast", seed=3)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict() == config.to_diff_dict()
    as_model = AutoModel.from_pretrained(
        str(tiny_random_folder), subfolder="transformer", quantization_config=config, device_map="auto"
    )
    assert config.checkpoint is None
    assert len(quant_layers(as_model)) == 20
    assert as_model.hf_quantizer.quantization_config.checkpoint is not None
    assert bittern.inspect(as_model).recipe == "ternary-fast"
    pipe = DiffusionPipeline.from_pretrained(
        tiny_random_folder, quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config})
    )
    same_tensors(as_model, pipe.transformer)
    by_dict = AutoModel.from_pretrained(
        str(tiny_random_folder),
        subfolder="transformer",
        quantization_config={"quant_method": "bittern", "recipe": "ternary-fast", "seed": 3},
    )
    same_tensors(as_model, by_dict)
    sharded = tmp_path / "sharded"
    plain = FluxTransformer2DModel.from_pretrained(tiny_random_folder, subfolder="transformer")
    plain.save_pretrained(sharded, max_shard_size="200KB")
    same_tensors(as_model, AutoModel.from_pretrained(str(sharded), quantization_config=config))


def test_quantizing_while_loading_refuses_what_quantize_refuses(tiny_random_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'int5': did you mean 'int4'\?"):
        bittern.QuantizationConfig("int5")
    plain = FluxTransformer2DModel.from_pretrained(tiny_random_folder, subfolder="transformer")
    recipe = recipes.load("int4").override(keep=["*.to_z"])
    config = bittern.QuantizationConfig(recipe)
    with pytest.raises(UserError, match="matches no layer"):
        AutoModel.from_pretrained(str(tiny_random_folder), subfolder="transformer", quantization_config=config)
    with torch.no_grad():
        plain.single_transformer_blocks[0].proj_mlp.weight[0, 0] = float("nan")
    plain.save_pretrained(tmp_path)
    config = bittern.QuantizationConfig("int4")
    with pytest.raises(UserError, match=r"1 weights of single_transformer_blocks\.0\.proj_mlp are NaN"):
        AutoModel.from_pretrained(str(tmp_path), quantization_config=config)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["single_transformer_blocks.0.proj_mlp.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"tensor 'single_transformer_blocks\.0\.proj_mlp\.weight' is missing"):
        AutoModel.from_pretrained(str(tmp_path), quantization_config=config)


def test_copies_pickles_and_casts(new_tiny_random_pipeline: NewPipeline) -> None:
    pipe = new_tiny_random_pipeline()
    bittern.quantize(pipe, "svdquant-fast")
    same_tensors(pipe.transformer, copy.deepcopy(pipe.transformer))
    same_tensors(pipe.transformer, pickle.loads(pickle.dumps(pipe.transformer)))
    # Diffusers refuses to cast a quantized model; `dtype=` while loading is the way.
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipe.transformer.to(torch.bfloat16)


def test_saving_refuses_pickles_and_adapters(tiny_random_pipeline: FluxPipeline, tmp_path: Path) -> None:
    from peft import LoraConfig

    bittern.quantize(tiny_random_pipeline, "int4")
    model = tiny_random_pipeline.transformer
    with pytest.raises(UserError, match="bittern writes safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    report = bittern.inspect(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_k"]))
    assert bittern.inspect(model) == report
    with pytest.raises(UserError, match="wears an adapter: unload it before saving"):
        model.save_pretrained(tmp_path)
