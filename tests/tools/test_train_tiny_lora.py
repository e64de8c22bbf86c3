"""The LoRA's training: latents that the decoder draws lines from, adapters that alone learn, a file that loads."""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bittern import pipelines
from bittern.evaluation import scenes
from train_tiny_lora import TinyFluxLora, fit
from training import run
from training.latents import SceneStream
from training.student import Progress

CPU = torch.device("cpu")
OUTLINE = scenes.EFFECTS["outline"]
PROMPTS = tuple(prompt for prompt in scenes.training_prompts()[::200] if OUTLINE.concerns(prompt))


def some_scenes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return SceneStream(PROMPTS, CPU, torch.Generator().manual_seed(seed), OUTLINE)(count)


def test_a_seed_gives_the_same_outlined_scenes() -> None:
    (images, captions), (again, same) = some_scenes(4), some_scenes(4)
    assert torch.equal(images, again) and torch.equal(captions, same)
    assert not torch.equal(images, some_scenes(4, seed=1)[0])
    prompts = [PROMPTS[index] for index in captions]
    drawn = [scenes.outlines(((image + 1) * 127.5).round().to(torch.uint8)) for image in images]
    assert all(found.success for found in drawn)
    assert all(scenes.judge(torch.stack([found.filled for found in drawn]), prompts))


@pytest.mark.slow
def test_fitted_latents_are_decoded_to_the_drawing() -> None:
    vae = pipelines.load("tiny-flux", dtype=torch.float32).vae.eval().requires_grad_(False)
    images = some_scenes(2)[0][:, :, 32:96, 64:]
    _, encoded = fit(vae, images, steps=0)
    fitted, error = fit(vae, images, steps=8)
    assert error < 0.6 * encoded
    with torch.no_grad():
        assert (vae.decode(fitted).sample - images).square().mean().item() == pytest.approx(error, rel=0.05)


def test_adapters_alone_learn_and_their_file_draws_what_they_learned(tmp_path: Path) -> None:
    pipe = pipelines.load("tiny-flux", dtype=torch.float32)
    before = copy.deepcopy(pipe.transformer.state_dict())
    torch.manual_seed(0)
    model = TinyFluxLora(pipe, rank=8).train()
    images, caption = some_scenes(2)
    with torch.no_grad():
        mean = pipe.vae.encode(images).latent_dist.mean
    bank = SimpleNamespace(
        device=CPU,
        latents=model.pack((mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor).bfloat16(),
        caption=torch.arange(2),
        tokens=model.read([PROMPTS[index].prompt for index in caption]),
    )

    @torch.no_grad()
    def loss() -> float:
        torch.manual_seed(7)
        return model.loss(bank.latents.float(), bank.tokens).item()

    first = loss()
    settings = Namespace(batch=2, lr=4e-3, ema=0.5, warmup=2, max_steps=8)
    trainer = run.Trainer(model, bank, settings, Progress(), None, 1)
    for step in range(settings.max_steps):
        trainer.advance(step / settings.max_steps)
    trainer.export()
    assert loss() < 0.97 * first
    state = pipe.transformer.state_dict()
    assert all(torch.equal(state.get(key, state.get(_wrapped(key))), value) for key, value in before.items())

    file = tmp_path / "few.safetensors"
    model.save(file)
    assert file.stat().st_size < 1_000_000
    other = pipelines.load("tiny-flux", dtype=torch.float32)
    plain, learned = (_velocity(each.transformer) for each in (other, pipe))
    pipelines.load_lora(other, file)
    # The file holds bf16, so that what it adds is off by less than a hundredth.
    assert (_velocity(other.transformer) - learned).norm() < 0.01 * (learned - plain).norm()


def _wrapped(key: str) -> str:
    module, _, name = key.rpartition(".")
    return f"{module}.base_layer.{name}"


@torch.no_grad()
def _velocity(transformer: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return transformer(
        hidden_states=torch.randn(1, 64, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 24, 128, generator=generator),
        pooled_projections=torch.randn(1, 128, generator=generator),
        timestep=torch.tensor([0.6]),
        img_ids=torch.zeros(64, 3),
        txt_ids=torch.zeros(24, 3),
        return_dict=False,
    )[0]
