"""A whole Stable Diffusion pipeline: quantized in a folder, drawn with, and dressed with a LoRA on its convolutions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

import bittern
from bittern import folders, pipelines, quantization, recipes
from bittern.cli import main
from bittern.errors import UserError
from bittern.layers import QuantConv2d, quant_layers


@pytest.fixture(scope="module")
def folder(unet_folder: Path) -> Path:
    return unet_folder


@pytest.fixture(scope="module")
def few(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unet") / "few"
    folders.quantize_folder(folder, "int4", out)
    return out


def draw(pipe: DiffusionPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    return pipe("a red cat", **size, guidance_scale=3.0, output_type="pt", generator=generator).images


def test_a_unet_is_quantized_in_its_folder_and_draws_nearly_the_same(folder: Path, few: Path) -> None:
    assert json.loads((few / "unet" / "config.json").read_text())["quantization_config"]["recipe"]["name"] == "int4"
    assert {place.name for place in folder.iterdir()} <= {place.name for place in few.iterdir()}
    original, copy = pipelines.load(folder), pipelines.load(few)
    assert 0 < (draw(copy) - draw(original)).abs().max() < 0.05
    kinds = {type(layer).__name__ for layer in quant_layers(copy.unet).values()}
    assert kinds == {"QuantLinear", "QuantConv2d"}
    assert quantization.inspect(copy).bits_per_weight == quantization.inspect(few).bits_per_weight


def test_quantizing_while_loading_gives_the_same_bytes(folder: Path, few: Path, tmp_path: Path) -> None:
    config = bittern.QuantizationConfig("int4")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", quantization_config=config)
    unet.save_pretrained(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (few / "unet" / name).read_bytes()


def test_the_command_line_knows_a_unet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main.run(["quantize", str(folder), "--recipe", "int4", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["real_bytes"] == result["predicted_bytes"] < result["original_bytes"]
    assert result["real_bytes"] == sum(file.stat().st_size for file in (out / "unet").glob("*.safetensors"))
    kernels = {tuple(target["kernel"]) for target in result["targets"] if target["kernel"]}
    assert kernels == {(1, 1), (3, 3)}
    assert main.run(["inspect", str(out)]) == 0
    assert "32 x 32 x 3 x 3" in capsys.readouterr().out
    assert main.run(["inspect", str(folder), "--recipe", "int4", "--dry-run", "--json"]) == 0
    foreseen = json.loads(capsys.readouterr().out)
    assert foreseen["predicted_bytes"] == result["real_bytes"]


def test_a_lora_on_convolutions_loads_as_onto_the_dequantized_model(folder: Path, few: Path) -> None:
    ours, dense = pipelines.load(few), pipelines.load(folder)
    for path, layer in quant_layers(ours.unet).items():
        module = dense.unet.get_submodule(path)
        module.weight = nn.Parameter(layer.weight.dequantize().contiguous())
        assert isinstance(layer, QuantConv2d) == isinstance(module, nn.Conv2d)
    state: dict[str, Tensor] = {}
    g = torch.Generator().manual_seed(0)
    for path in ("down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv2"):
        n, c, high, wide = dense.unet.get_submodule(path).weight.shape
        state[f"unet.{path}.lora_A.weight"] = 0.3 * torch.randn(4, c, high, wide, generator=g)
        state[f"unet.{path}.lora_B.weight"] = 0.3 * torch.randn(n, 4, 1, 1, generator=g)
    plain = draw(ours)
    assert torch.allclose(plain, draw(dense), atol=1e-4)
    for pipe in (ours, dense):
        pipe.load_lora_weights(dict(state))
    dressed = draw(ours)
    assert (dressed - plain).abs().max() > 0.001
    assert torch.allclose(dressed, draw(dense), atol=1e-4)
    ours.unload_lora_weights()
    assert torch.equal(draw(ours), plain)


def test_a_recipe_may_keep_convolutions_or_give_them_a_branch(folder: Path) -> None:
    unet = pipelines.load(folder).unet
    recipe = recipes.load("svdquant-fast").override(default={"rank": 8, "rounds": 0})
    kept = quantization.preview(unet, recipe.override(convolution=None)).kept
    reasons = {row.path: row.reason for row in kept}
    assert reasons["mid_block.resnets.0.conv1"] == "the recipe keeps convolutions"
    assert "mid_block.attentions.0.proj_in" not in reasons
    fat = {row.path: row for row in quantization.predict(unet, recipe.override(convolution={"rank": 16})).rows}
    assert (fat["mid_block.resnets.0.conv1"].rank, fat["mid_block.resnets.0.conv1"].activations) == (16, 16)
    quantization.quantize(unet, recipe.override(convolution={"rank": 16}))
    assert unet.mid_block.resnets[0].conv1.down.shape == (16, 48 * 9)


def test_ternary_with_data_solves_linears_and_if_told_convolutions(folder: Path, tmp_path: Path) -> None:
    fewer = {"refits": 1, "sweeps": 1}
    recipe = recipes.load("ternary").override(
        name="t", samples=2, rows=64, default=fewer, convolution={"weight": "ternary"}, keep=["up_blocks.*"]
    )
    report = folders.quantize_folder(folder, recipe, tmp_path / "out", prompts=["a star", "two red squares"])
    assert report.file_bytes == quantization.predict_size(pipelines.load(folder).unet, recipe)
    assert report.bytes == quantization.inspect(tmp_path / "out" / "unet").bytes
    assert {row.format for row in report.rows} == {"ternary"}
    assert any(row.kernel == (3, 3) for row in report.rows)
    for row in report.rows:
        assert row.stages is not None
        assert list(row.stages.values())[-1] < 0.9 * row.stages["nearest"]
    assert torch.isfinite(draw(pipelines.load(tmp_path / "out"))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kernel": [9, 1]},
            r"conv1' has shape \[32, 288\] and kernel \[9, 1\]: expected \[32, 288\] and kernel \[3, 3\]",
        ),
        ({"kernel": None}, r"'down_blocks\.0\.resnets\.0\.conv1' is no linear of UNet2DConditionModel"),
        ({"shape": [32, 576]}, r"conv1' has shape \[32, 576\] and kernel \[3, 3\]: expected \[32, 288\]"),
    ],
)
def test_a_config_of_another_kernel_is_refused(
    few: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    shutil.copytree(few / "unet", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["targets"]["down_blocks.0.resnets.0.conv1"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        UNet2DConditionModel.from_pretrained(tmp_path)
