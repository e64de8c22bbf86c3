"""Blocks that are calibrated behind few-bit ones: what they meet, and that nothing else depends on how it is done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from test_calibration_memory import Tight, weights
from torch import nn

import bittern
from bittern import pipelines, recipes
from bittern.architectures import plan
from bittern.errors import UserError
from bittern.layers import quant_layers, set_path
from bittern.quantization import Limits, calibration, component, conductor, stream
from bittern.quantization.predecessors import Predecessors
from bittern.recipes import Recipe
from bittern.trajectories import Skipping, State, dependence, record, sample

PROMPTS = ["a red circle", "two stars", "a cat on a mat"]
PLENTY = Limits(None, 2**40)
NAMES = {"flux": FluxTransformer2DModel, "unet": UNet2DConditionModel}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    quick = {"rank": 2, "svd_iterations": 1, "smoothing": "none", "sensitivity": False, "bias_correction": True}
    return recipes.load("svdquant").override(
        name="behind", samples=3, rows=64, predecessors="few-bit", default=quick, convolution={"rounding": "nearest"}
    )


@pytest.fixture(params=["flux", "unet"])
def folder(request: pytest.FixtureRequest, tiny_random_folder: Path) -> Path:
    return tiny_random_folder if request.param == "flux" else request.getfixturevalue("unet_folder")


def test_every_way_gives_the_same_bytes(
    folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory; from disk; with sensitivities a block at a time, offloaded, and no room for outputs; interrupted."""
    recipe = recipe.override(default={"sensitivity": True})
    pipe = pipelines.load(folder)
    bittern.quantize(pipe, recipe, prompts=PROMPTS, limits=PLENTY)
    component(pipe).save_pretrained(tmp_path / "memory")
    expected = (tmp_path / "memory/diffusion_pytorch_model.safetensors").read_bytes()
    assert {layer.path for layer in quant_layers(component(pipe)).values()} == {"auto"}
    said: list[str] = []
    tight = Tight.around(folder, recipe)
    pipelines.quantize_folder(
        folder, recipe, tmp_path / "tight", prompts=PROMPTS, limits=tight, progress=lambda what, *_: said.append(what)
    )
    assert weights(tmp_path / "tight") == expected
    assert sum(what.startswith("recording sensitivities") for what in said) > 2
    assert any("all of them run every time" in what for what in said)

    def interrupt(what: str, done: float, _total: float) -> None:
        said.append(what)
        if what.startswith("solving") and done == 1:
            raise KeyboardInterrupt

    said.clear()
    given: Any = {"prompts": PROMPTS, "limits": PLENTY}
    with pytest.raises(KeyboardInterrupt):
        pipelines.quantize_folder(folder, recipe, tmp_path / "out", **given, progress=interrupt)
    pipelines.quantize_folder(folder, recipe, tmp_path / "out", **given, progress=lambda what, *_: said.append(what))
    assert weights(tmp_path / "out") == expected
    assert not any("all of them run" in what for what in said)
