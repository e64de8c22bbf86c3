"""What a ternary FLUX.1 takes on disk: arithmetic on its shapes, the prediction, and real files at reduced depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import bittern
from bittern import recipes
from bittern.architectures import plan
from bittern.evaluation.cost.models import Subject
from bittern.evaluation.cost.random_weights import few_bit
from bittern.quantization.jobs import finish
from bittern.recipes import Recipe

# (what is changed, most GB of FLUX.1-dev)
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "2 bits, row": ({}, 3.11),
    "1.6 bits, row": ({"packing": "trits"}, 2.55),
    "2 bits, g128": ({"group_size": 128}, 3.28),
    "1.6 bits, g64": ({"group_size": 64, "packing": "trits"}, 2.89),
    "2 bits, row, smoothing": ({"smoothing": "columns"}, 3.11),
    "1.6 bits, row, smoothing": ({"smoothing": "columns", "packing": "trits"}, 2.55),
}
WIDTH = {"attention_head_dim": 64, "num_attention_heads": 2, "axes_dims_rope": (16, 24, 24)}


def variant(name: str) -> Recipe:
    return recipes.load("ternary").override(default=VARIANTS[name][0])


def config(double: int, single: int, **other: Any) -> dict[str, Any]:
    return {"guidance_embeds": True, "num_layers": double, "num_single_layers": single, **other}


def by_hand(model: nn.Module, default: dict[str, Any]) -> int:
    """Bytes of all tensors: codes, scales and smoothing of the blocks' linears, everything else in 16 bits."""
    total = 0
    for name, tensor in model.state_dict().items():
        if "blocks." not in name or not name.endswith(".weight") or tensor.ndim != 2:
            total += 2 * tensor.numel()
            continue
        n, k = tensor.shape
        size = default.get("group_size")
        # proj_out of the single blocks reads attention and mlp, one after the other.
        parts = [k // 5, k - k // 5] if "single" in name and "proj_out" in name else [k]
        padded = [part + -part % (size or 4) for part in parts]
        groups = sum(part // size for part in padded) if size else len(parts)
        total += n * -(-sum(padded) // (5 if default.get("packing") == "trits" else 4)) + 2 * n * groups
        # q, k, v and what reads the same share one.
        first = not name.endswith(("to_k.weight", "to_v.weight", "add_k_proj.weight", "add_v_proj.weight"))
        grouped = "single" in name and "to_q" in name
        if default.get("smoothing") and first and not grouped:
            total += 2 * k
    return total


@pytest.mark.parametrize("name", list(VARIANTS))
def test_flux_1_dev(name: str) -> None:
    default, most = VARIANTS[name]
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config(19, 38)).to(torch.bfloat16)
    report = bittern.predict(model, variant(name))
    assert report.bytes == by_hand(model, default)
    assert report.bytes < report.file_bytes <= most * 1e9
    assert report.ternary_weights == 11_834_228_736
    assert report.ternary_share == pytest.approx(0.9944, abs=5e-5)
    assert report.ternary_share_blocks == 1.0


def write(name: str, shape: dict[str, Any], folder: Path) -> tuple[nn.Module, int]:
    """A model of random codes in a real file, and the size that was predicted for it."""
    recipe = variant(name)
    with torch.device("meta"):
        original = FluxTransformer2DModel(**shape).to(torch.bfloat16)
    made, size = plan(original, recipe), bittern.predict_size(original, recipe)
    model = few_bit(Subject("flux", "FluxTransformer2DModel", shape), recipe, "cpu", torch.bfloat16)
    finish(model, made, recipe, 0, {})
    model.save_pretrained(folder, max_shard_size="10GB")
    return model, size


def check(name: str, shape: dict[str, Any], folder: Path) -> None:
    model, size = write(name, shape, folder)
    assert (folder / "diffusion_pytorch_model.safetensors").stat().st_size == size
    back = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    mine, theirs = model.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys()
    leaves = [key for key in mine if key.endswith((".codes", ".scales", ".smooth"))]
    assert leaves
    assert all(torch.equal(mine[key], theirs[key]) for key in leaves)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_files_are_as_large_as_predicted_and_read_back_alike(name: str, tmp_path: Path) -> None:
    check(name, config(2, 3, **WIDTH, joint_attention_dim=64, pooled_projection_dim=64), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2 bits, row", "1.6 bits, row"])
def test_files_at_the_width_of_flux_1(name: str, tmp_path: Path) -> None:
    check(name, config(1, 1), tmp_path)
