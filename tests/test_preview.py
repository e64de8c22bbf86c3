"""`inspect --dry-run`: what a recipe would do, told from configs and headers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import bittern
from bittern import folders, pipelines, quantization
from bittern.cli import main
from bittern.errors import UserError
from families import FAMILIES

SDXL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
}


def written(folder: Path, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_it_foresees_what_quantize_does(tiny_random_folder: Path, tmp_path: Path) -> None:
    foreseen = quantization.preview(tiny_random_folder, "svdquant-fast").to_dict()
    pipe = pipelines.load(tiny_random_folder)
    before = sum(tensor.nbytes for tensor in pipe.transformer.state_dict().values())
    report = bittern.quantize(pipe, "svdquant-fast").to_dict()
    for target in report["targets"]:
        target["error"] = None
    assert {key: foreseen[key] for key in report} == report
    pipe.transformer.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert foreseen["predicted_bytes"] == file.stat().st_size
    assert foreseen["original_bytes"] == before
    assert foreseen["groups"] == json.loads((tmp_path / "config.json").read_text())["quantization_config"]["groups"]
    assert foreseen["architecture"] == "flux" and foreseen["notes"] == []
    assert {row["path"]: row["reason"] for row in foreseen["kept"]}["x_embedder"] == "first layer"
    assert {row["path"]: row["bytes"] for row in foreseen["kept"]}["x_embedder"] == 4 * 64 * 16


@pytest.mark.parametrize("name", ["sd3", "wan", "sana"])
def test_it_foresees_buffers_and_layers_in_float32(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family.build().to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    foreseen = quantization.preview(tmp_path / "whole", "int4")
    config = bittern.QuantizationConfig("int4")
    load = getattr(diffusers, family.class_name).from_pretrained
    few = load(tmp_path / "whole", dtype=torch.bfloat16, quantization_config=config)
    few.save_pretrained(tmp_path / "few")
    assert foreseen.report.file_bytes == sum(file.stat().st_size for file in (tmp_path / "few").glob("*.safetensors"))
    whole = load(tmp_path / "whole", dtype=torch.bfloat16)
    assert foreseen.original_bytes == sum(tensor.nbytes for tensor in whole.state_dict().values())


def test_sizes_follow_the_dtype_of_the_files_and_no_weight_is_read(tiny_random_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_random_folder / "transformer", tmp_path / "half")
    (file,) = folder.glob("*.safetensors")
    # Numbers that cannot be quantized: only a reader of weights would notice.
    save_file({k: torch.full_like(v, torch.nan).half() for k, v in load_file(file).items()}, file)
    full, half = (quantization.preview(place, "int4") for place in (tiny_random_folder, folder))
    kept = [sum(kept.bytes for kept in each.kept) for each in (full, half)]
    assert kept[0] == 2 * kept[1] > 0
    assert half.report.bits_per_weight == full.report.bits_per_weight
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read"):
        quantization.preview(folder, "int4")


def test_a_few_bit_folder_is_refused(tiny_random_folder: Path, tmp_path: Path) -> None:
    folders.quantize_folder(tiny_random_folder, "int4", tmp_path / "few")
    with pytest.raises(UserError, match=r"few' is already quantized \(bittern\): give the original"):
        quantization.preview(tmp_path / "few", "int4")


def test_a_config_alone_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "sdxl", SDXL)
    assert main.run(["inspect", str(folder), "--recipe", "svdquant-fast", "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["architecture"] == "unet" and shown["parameters"] == 2_567_463_684
    assert shown["original_bytes"] == 2 * 2_567_463_684
    assert shown["notes"] == ["no weight files: sizes are those of layers kept in bf16"]
    kernels = [row for row in shown["targets"] if row["kernel"] == [3, 3]]
    assert all(row["activations"] == 16 and row["bits_per_weight"] == 4.25 for row in kernels)
    assert len(kernels) == 17 * 2 + 4
    assert main.run(["inspect", str(folder), "--recipe", "svdquant-fast", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "first layer" in text and "1280 x 1280 x 3 x 3" in text and "2567.46 M parameters" in text


def test_an_unknown_family_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(
        tmp_path / "aura",
        {"_class_name": "AuraFlowTransformer2DModel", "num_mmdit_layers": 2, "num_single_dit_layers": 2},
    )
    assert main.run(["inspect", str(folder), "--recipe", "int4", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "note: AuraFlowTransformer2DModel is no known family: its blocks were found by looking" in shown
    assert "shared inputs were found by one pass on fake tensors" in shown


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"_class_name": "SanaTransformer3DModel"}, "", "config.json says: did you mean '"),
        # No listing of hundreds.
        ({"_class_name": "Zqx"}, "", "config.json says: expected the name of one of its models\n"),
        ({"_class_name": "AutoencoderTiny"}, "", "blocks of model class 'AutoencoderTiny' cannot be found"),
        ({"hidden": 3}, "", "is not a model's config: KeyError"),
        ([], "", "is not a model's config: TypeError"),
        ({"_class_name": "FluxTransformer2DModel", "num_layers": "2"}, "", "makes no FluxTransformer2DModel"),
        ({"_class_name": "SD3Transformer2DModel", "quantization_config": {"quant_method": "gguf"}}, "", "already"),
        (SDXL, "recipe only", "--recipe and --dry-run belong together"),
        (SDXL, "dry run only", "--recipe and --dry-run belong together"),
    ],
)
def test_mistakes_are_one_line(
    config: object, arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "model", config)
    given = {"recipe only": ["--recipe", "int4"], "dry run only": ["--dry-run"]}
    assert main.run(["inspect", str(folder), *given.get(arguments, ["--recipe", "int4", "--dry-run"])]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err, shown.err


def test_a_model_that_would_grow_is_warned_of(
    tiny_random_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, grows in (("64", True), ("4", False)):
        yaml = tmp_path / "r.yaml"
        # tiny-random is in float32: only branches of that type outweigh it.
        yaml.write_text(f"default: {{weight: int4, rank: {rank}, branch_dtype: fp32, svd_iterations: 1, rounds: 0}}\n")
        assert main.run(["inspect", str(tiny_random_folder), "--recipe", str(yaml), "--dry-run", "--json"]) == 0
        foretold = json.loads(capsys.readouterr().out)
        before = (tiny_random_folder / "transformer/diffusion_pytorch_model.safetensors").stat().st_size
        line = (
            f"warning: the few-bit model is larger than the original, {foretold['predicted_bytes'] / 1e6:.2f} MB and "
            f"not {before / 1e6:.2f} MB: lower `rank` in the recipe"
        )
        assert (foretold["predicted_bytes"] > before) == grows == (line in foretold["notes"])
        out = tmp_path / f"out{rank}"
        assert main.run(["quantize", str(tiny_random_folder), "--recipe", str(yaml), "--out", str(out)]) == 0
        assert (line in capsys.readouterr().err) == grows
        said: list[str] = []
        bittern.quantize(pipelines.load(tiny_random_folder), yaml, say=said.append)
        assert said == [line] * grows
