"""Damaged few-bit checkpoints, as plain `from_pretrained` meets them: one clear line each, before anything is moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import bittern
from bittern import recipes
from bittern.errors import UserError

LEAF = "single_transformer_blocks.0.proj_out"
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(
    new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A sound checkpoint: its config and its tensors."""
    model = new_tiny_random_pipeline().transformer
    bittern.quantize(model, recipes.load("ternary-fast").override(default={"rank": 4}))
    folder = tmp_path_factory.mktemp("sound")
    model.save_pretrained(folder)
    return {"config": json.loads((folder / "config.json").read_text()), "tensors": load_file(folder / FILE)}


VALUES = ("out of range", "are NaN")
"""What no header tells."""


def write(saved: dict[str, Any], folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    config = json.loads(json.dumps(saved["config"]))
    tensors = {name: tensor.clone() for name, tensor in saved["tensors"].items()}
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / FILE, {"format": "pt"})


def poke(tensor: Tensor, value: float) -> None:
    tensor.view(-1)[5] = value


DAMAGES: list[tuple[Callable[..., object], str]] = [
    (lambda c, t: t.pop(f"{LEAF}.scales"), rf"tensor '{LEAF}\.scales' is missing"),
    (lambda c, t: t.pop(f"{LEAF}.bias"), rf"tensor '{LEAF}\.bias' is missing"),
    (lambda c, t: t.pop("x_embedder.weight"), r"tensor 'x_embedder\.weight' is missing"),
    (lambda c, t: t.update({f"{LEAF}.scalse": torch.ones(1)}), r"belongs to no layer: did you mean '\S+scales'\?"),
    (lambda c, t: t.update({f"{LEAF}.weight": torch.ones(64, 320)}), "belongs to no layer"),
    (
        lambda c, t: t.update({f"{LEAF}.codes": t[f"{LEAF}.codes"][:-1].clone()}),
        r"shape \[63, 80\]: expected \[64,",
    ),
    (lambda c, t: t.update({f"{LEAF}.up": t[f"{LEAF}.up"].float()}), r"float32: expected torch\.bfloat16"),
    (lambda c, t: t.update({"proj_out.weight": torch.ones(3, 64)}), r"'proj_out\.weight' .* shape \[3, 64\]"),
    (lambda c, t: poke(t[f"{LEAF}.codes"], 255), r"4 of \d+ codes are out of range"),
    (lambda c, t: poke(t[f"{LEAF}.scales"], float("nan")), r"\.scales' in \S+: 1 of \d+ values are NaN"),
    (lambda c, t: c.update(format_version=2), "format_version 2 is newer than 1, .* upgrade bittern"),
    (lambda c, t: c.update(grups=[]), r"unknown key 'grups': did you mean 'groups'\?"),
    (lambda c, t: c["targets"].update({"block.to_z": c["targets"][LEAF]}), "'block.to_z' is no linear of Flux"),
    (lambda c, t: c["targets"][LEAF].update(shape=[64, 64]), r"segments of '\S+' are \[64, 256\]"),
    (lambda c, t: c["targets"]["transformer_blocks.0.ff.net.2"].update(shape=[64, 64]), r"has shape \[64, 64\]"),
    (lambda c, t: c["schemes"][0].update(activations=3), "activations 3: expected 4, 8 or 16"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_damage_is_one_line(saved: dict[str, Any], tmp_path: Path, change: Callable[..., object], message: str) -> None:
    write(saved, tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        FluxTransformer2DModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [case for case in DAMAGES if not any(w in case[1] for w in VALUES)])
def test_inspect_says_what_loading_says(
    saved: dict[str, Any], tmp_path: Path, change: Callable[..., object], message: str
) -> None:
    write(saved, tmp_path, change)
    with pytest.raises(UserError, match=message) as told:
        bittern.inspect(tmp_path)
    with pytest.raises(UserError) as loading:
        FluxTransformer2DModel.from_pretrained(tmp_path)
    # The config alone goes by another name.
    assert str(told.value).replace(f"{tmp_path}/config.json", "quantization_config") == str(loading.value)


def test_the_sound_checkpoint_is_sound(saved: dict[str, Any], tmp_path: Path) -> None:
    write(saved, tmp_path, lambda config, tensors: None)
    bittern.inspect(tmp_path)
    FluxTransformer2DModel.from_pretrained(tmp_path)


def test_a_truncated_shard(new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path: Path) -> None:
    model = new_tiny_random_pipeline().transformer
    bittern.quantize(model, "int4")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=rf"{shard.name} cannot be read .* write it again"):
        FluxTransformer2DModel.from_pretrained(tmp_path)


def test_a_truncated_file_is_named_by_diffusers(saved: dict[str, Any], tmp_path: Path) -> None:
    """Diffusers opens a single file before it calls us; `bittern.pipelines.load` looks first."""
    write(saved, tmp_path, lambda config, tensors: None)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-10])
    with pytest.raises(OSError, match="Unable to load weights from checkpoint file"):
        FluxTransformer2DModel.from_pretrained(tmp_path)


def test_pickled_weights_are_never_opened(saved: dict[str, Any], tmp_path: Path) -> None:
    write(saved, tmp_path, lambda config, tensors: None)
    (tmp_path / FILE).unlink()
    torch.save(saved["tensors"], tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="is not safetensors: bittern reads no other files"):
        FluxTransformer2DModel.from_pretrained(tmp_path)
