"""Biases that take the mean error of an output: what they are, and that they travel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import bittern
from bittern import folders, pipelines, recipes
from bittern.errors import UserError
from bittern.layers import quant_layers, set_path
from bittern.quantization import Calibration, component, conductor, inspect, predict, predict_size
from bittern.recipes import Recipe

if TYPE_CHECKING:
    from diffusers import FluxPipeline

NewPipeline = Callable[[], "FluxPipeline"]
PROMPTS = ["a red circle", "two stars"]


def corrected(name: str, **default: Any) -> Recipe:
    return recipes.load(name).override(
        name="b", samples=3, rows=64, default={"bias_correction": True, "scales": "absmax"} | default
    )


WITH_BRANCH = {"rank": 2, "smoothing": "none", "sensitivity": False}


@pytest.mark.parametrize("recipe", [corrected("int4"), corrected("svdquant", **WITH_BRANCH)])
@pytest.mark.parametrize("folder", ["tiny_random_folder", "unet_folder"])
def test_the_mean_of_what_was_recorded_is_the_full_layers(
    recipe: Recipe, folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipelines.load(request.getfixturevalue(folder))
    model, real, apart = component(pipe), conductor.solve_job, list[float]()

    def spy(job: Any, modules: Any, seed: int, known: Calibration, *rest: Any) -> Any:
        layers, errors, stages = real(job, modules, seed, known, *rest)
        rows = known.statistics[job.paths[0]].rows
        for module, layer, table in zip(modules, layers, stages, strict=True):
            assert layer.bias is not module.bias
            if isinstance(module, nn.Linear):
                layer.path = "a4" if job.scheme.activations == 4 else "auto"
                few, full = layer(rows).mean(0), module(rows).mean(0)
                layer.path = "auto"
                apart.append(float((few - full).norm() / full.norm()))
            if table:
                assert list(table)[-1] == "bias" and table["bias"] <= list(table.values())[-2]
        return layers, errors, stages

    monkeypatch.setattr(conductor, "solve_job", spy)
    bittern.quantize(pipe, recipe, prompts=PROMPTS)
    assert len(apart) > 8 and max(apart) < 1e-5
    assert all(layer.bias is not None for layer in quant_layers(model).values())


@pytest.mark.parametrize("folder", ["tiny_random_folder", "unet_folder"])
def test_it_is_saved_loaded_and_counted(folder: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Also where the model's class has no bias: those of attention in the U-Net."""
    source, recipe = request.getfixturevalue(folder), corrected("int4")
    pipe = pipelines.load(source)
    model = component(pipe)
    before = {path: module.bias for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    predicted, size = predict(model, recipe), predict_size(model, recipe)
    report = bittern.quantize(pipe, recipe, prompts=PROMPTS)
    model.save_pretrained(tmp_path / "memory")
    again = type(model).from_pretrained(tmp_path / "memory")
    gained = 0
    for path, layer in quant_layers(again).items():
        own = model.get_submodule(path).bias
        assert torch.equal(layer.bias, own)
        gained += before[path] is None
        assert before[path] is None or not torch.equal(before[path], own)
    assert gained == 0 if folder == "tiny_random_folder" else gained > 9
    file = tmp_path / "memory/diffusion_pytorch_model.safetensors"
    assert file.stat().st_size == size == predicted.file_bytes
    assert inspect(tmp_path / "memory").bytes == report.bytes == predicted.bytes
    assert inspect(tmp_path / "memory").parameters == predicted.parameters
    folders.quantize_folder(source, recipe, tmp_path / "out", prompts=PROMPTS)
    name = pipelines.denoiser_name(source)
    assert (tmp_path / "out" / name / file.name).read_bytes() == file.read_bytes()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_bias_that_is_missing_is_told(unet_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    pipe = pipelines.load(unet_folder)
    bittern.quantize(pipe, corrected("int4"), prompts=PROMPTS)
    component(pipe).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.bias"]
    save_file(tensors, file, {"format": "pt"})
    for read in (inspect, type(component(pipe)).from_pretrained):
        with pytest.raises(UserError, match=r"attn1\.to_q\.bias' is missing"):
            read(tmp_path)


def test_groups_and_loras_keep_it(unet_folder: Path) -> None:
    """q, k and v of a U-Net gain biases; run as one, one by one, and with an adapter."""
    from peft import LoraConfig

    pipe = pipelines.load(unet_folder)
    model = component(pipe)
    bittern.quantize(pipe, corrected("int4"), prompts=PROMPTS)
    attention = model.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    assert attention.to_q.group is attention.to_v.group is not None and attention.to_q.bias is not None
    x = torch.randn(2, 5, attention.to_q.in_features)
    with torch.no_grad():
        together = attention(x)
        handle = attention.to_q.register_forward_hook(lambda *_: None)
        assert torch.allclose(attention(x), together, atol=1e-5)
        handle.remove()
        set_path(model, "a16")
        expected = attention.to_q(x)
        assert torch.allclose(expected, x @ attention.to_q.weight.dequantize().T + attention.to_q.bias, atol=1e-5)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        with_lora = attention.to_q(x)
        model.disable_adapters()
        assert not torch.equal(with_lora, expected) and torch.equal(attention.to_q(x), expected)


def test_ternary_layers_may_have_one_too(new_tiny_random_pipeline: NewPipeline) -> None:
    pipe = new_tiny_random_pipeline()
    bittern.quantize(pipe, corrected("ternary-fast"), prompts=PROMPTS)
    biases = [(p, layer.bias) for p, layer in quant_layers(pipe.transformer).items()]
    plain = new_tiny_random_pipeline()
    assert all(not torch.equal(bias, plain.transformer.get_submodule(path).bias) for path, bias in biases)


def test_it_needs_prompts_and_a_pipeline(new_tiny_random_pipeline: NewPipeline) -> None:
    pipe = new_tiny_random_pipeline()
    assert corrected("int4").calibrated and not recipes.load("int4").calibrated
    with pytest.raises(UserError, match="give the whole pipeline"):
        bittern.quantize(pipe.transformer, corrected("int4"))
    for changes, message in (
        ({"default": {"bias_correction": "yes"}}, r"default\.bias_correction 'yes': expected"),
        ({"predecessors": "few"}, r"predecessors 'few': expected 'full' or 'few-bit'"),
    ):
        with pytest.raises(UserError, match=message):
            recipes.load("svdquant").override(**changes)
