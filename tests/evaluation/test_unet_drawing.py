"""A Stable Diffusion pipeline is drawn with and judged like a FLUX pipeline, with its guidance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline, StableDiffusionPipeline, UNet2DConditionModel

from bittern import pipelines
from bittern.cli import main
from bittern.evaluation.drawing import Settings, draw

PROMPTS = ["a red star", "two green triangles"]


@pytest.fixture(scope="module")
def folder(new_tiny_random_pipeline: Callable[[], FluxPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = new_tiny_random_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=parts.text_encoder.config.hidden_size,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    pipe = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    place = tmp_path_factory.mktemp("unet") / "sd"
    pipe.save_pretrained(place)
    return place


def test_the_defaults_are_the_pipelines_own(folder: Path) -> None:
    pipe = pipelines.load(folder)
    call = pipelines.defaults(pipe)
    assert call == pipelines.CallDefaults(height=32, width=32, steps=24, max_sequence_length=None, guidance=5.0)
    pipe.vae.register_to_config(sample_size=512)
    assert (pipelines.defaults(pipe).steps, pipelines.defaults(pipe).guidance) == (50, 7.5)


def test_pictures_are_those_of_the_pipeline_itself(folder: Path) -> None:
    drawing = draw(str(folder), PROMPTS, Settings(seed=3, steps=2))
    assert (drawing.path, drawing.paths, drawing.steps) == ("fp32", {}, 2)
    pipe = pipelines.load(folder)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    guided = pipe(PROMPTS, guidance_scale=5.0, generator=generators, **call).images
    assert torch.equal(drawing.images, (guided * 255).round().to(torch.uint8))
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    alone = pipe(PROMPTS, guidance_scale=1.0, generator=generators, **call).images
    assert not torch.equal(drawing.images, (alone * 255).round().to(torch.uint8))


def test_the_commands_take_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.png"
    assert main.run(["generate", str(folder), PROMPTS[0], "--steps", "1", "--out", str(picture)]) == 0
    assert picture.stat().st_size > 100
    capsys.readouterr()
    arguments = ["evaluate", str(folder), "--reference", str(folder), "--limit", "6", "--steps", "1", "--json"]
    assert main.run(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 6 and result["fidelity"]["ssim"] == pytest.approx(1.0) and result["path"] == "fp32"
