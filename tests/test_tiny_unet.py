"""The embedded U-Net: whole, small, offline, and it draws what it is asked for."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from bittern import pipelines, tiny_unet
from bittern.evaluation import scenes
from bittern.evaluation.generate import generate


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    loaded = pipelines.load(tiny_unet.NAME, dtype=torch.float32)
    assert isinstance(loaded, StableDiffusionPipeline)
    return loaded


def test_it_fits_its_size_and_names_no_place() -> None:
    files = [file for file in tiny_unet.path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    configs = [json.loads(file.read_text()) for file in files if file.suffix == ".json"]
    assert configs and not any("_name_or_path" in config for config in configs)


def test_it_draws_held_out_prompts(pipe: StableDiffusionPipeline) -> None:
    prompts = scenes.held_out(24)
    images = generate(pipe, [prompt.prompt for prompt in prompts], steps=12)
    record = json.loads((tiny_unet.path() / "training.json").read_text())
    # Three standard errors of a share on 24 prompts below what its training record claims.
    claimed = record["curve"][-1]["overall"]
    assert claimed >= 0.6
    assert sum(scenes.judge(images, prompts)) / 24 >= claimed - 3 * (claimed * (1 - claimed) / 24) ** 0.5


def test_its_guidance_is_the_one_that_scored_best(pipe: StableDiffusionPipeline) -> None:
    record = json.loads((tiny_unet.path() / "training.json").read_text())
    assert pipelines.defaults(pipe).guidance == record["curve"][-1]["guidance"]
