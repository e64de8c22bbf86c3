"""Magnitudes from the modulation: what a modulated LayerNorm really gives, without running a prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

import bittern
from bittern import recipes
from bittern.architectures import modulated_magnitudes, plan

RECIPE = recipes.load("svdquant-fast").override(default={"rank": 8})


def shaken(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The model with a strong modulation."""
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear")):
            nn.init.normal_(module.weight, std=0.5, generator=generator)
            nn.init.normal_(module.bias, std=0.5, generator=generator)
    return model


def measured(model: FluxTransformer2DModel, conditionings: Tensor) -> dict[str, Tensor]:
    """Root mean squares of the inputs that diffusers' own norms give to white noise, by target."""
    noise = torch.randn(len(conditionings), 4000, model.inner_dim, generator=torch.Generator().manual_seed(2))
    found: dict[str, Tensor] = {}

    def put(x: Tensor, *paths: str) -> None:
        found.update(dict.fromkeys(paths, x.square().mean((0, 1)).sqrt()))

    for i, block in enumerate(model.transformer_blocks):
        at = f"transformer_blocks.{i}"
        streams = (
            (block.norm1, block.norm2, "attn.to_q", "ff.net.0.proj"),
            (block.norm1_context, block.norm2_context, "attn.add_q_proj", "ff_context.net.0.proj"),
        )
        for first, second, q, up in streams:
            x, _, shift, scale, _ = first(noise, emb=conditionings)
            put(x, f"{at}.{q}")
            put(second(noise) * (1 + scale[:, None]) + shift[:, None], f"{at}.{up}")
    for i, block in enumerate(model.single_transformer_blocks):
        put(block.norm(noise, emb=conditionings)[0], f"single_transformer_blocks.{i}.attn.to_q")
    return found


@torch.no_grad()
@pytest.mark.parametrize("guidance", [False, True])
def test_it_is_what_the_norms_give(tiny_random_pipeline: FluxPipeline, guidance: bool) -> None:
    model = tiny_random_pipeline.transformer
    if guidance:
        torch.manual_seed(0)
        model = FluxTransformer2DModel.from_config(model.config, guidance_embeds=True)
    made = plan(shaken(model), RECIPE)
    magnitudes = modulated_magnitudes(made, model, model.get_parameter)
    want = measured(model, made.architecture.conditionings(model, model.get_parameter))
    assert magnitudes.keys() == want.keys()
    for path, rms in want.items():
        assert torch.allclose(magnitudes[path], rms, rtol=0.05), path
        assert rms.max() / rms.min() > 1.5, path


@torch.no_grad()
def test_conditionings_are_those_of_the_embedder(tiny_random_pipeline: FluxPipeline) -> None:
    model = tiny_random_pipeline.transformer
    got = plan(model, RECIPE).architecture.conditionings(model, model.get_parameter)
    pooled = torch.zeros(1, model.config.pooled_projection_dim)
    for i in (0, 7, 15):
        want = model.time_text_embed(torch.tensor([1000.0 * (i + 1) / 16]), pooled)
        assert torch.allclose(got[i : i + 1], want, atol=1e-4)


def test_only_modulated_inputs_are_smoothed(new_tiny_random_pipeline: Callable[[], FluxPipeline]) -> None:
    model = shaken(new_tiny_random_pipeline().transformer)
    jobs = plan(model, RECIPE).jobs
    smoothed = {path for job in jobs if job.scheme.smooth for path in job.paths}
    assert smoothed == {path for job in jobs for path in job.paths if path.endswith(
        ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "net.0.proj", "proj_mlp"))}  # fmt: skip
    assert not any(job.modulated for job in jobs if not job.scheme.smooth)


def test_an_outlier_of_the_modulation_is_smoothed(new_tiny_random_pipeline: Callable[[], FluxPipeline]) -> None:
    model = shaken(new_tiny_random_pipeline().transformer)
    norm = model.single_transformer_blocks[0].norm.linear
    with torch.no_grad():
        norm.bias[model.inner_dim + 5] = 40.0  # the scale of channel 5
    bittern.quantize(model, RECIPE)
    smooth = model.single_transformer_blocks[0].attn.to_q.tensors()["smooth"].float()
    assert smooth.argmax() == 5 and smooth[5] > 2 * smooth.median()


def test_no_magnitudes_unless_asked_for(tiny_random_pipeline: FluxPipeline) -> None:
    def refuse(name: str) -> Tensor:
        raise AssertionError(name)

    model = tiny_random_pipeline.transformer
    assert modulated_magnitudes(plan(model, recipes.load("int4")), model, refuse) == {}
