"""Errors along the trajectory, where they are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from diffusers import FluxPipeline

import bittern
from bittern.errors import UserError
from bittern.evaluation.drawing import Settings
from bittern.evaluation.suites import evaluate
from bittern.evaluation.walk import departure, walk

PROMPTS = ["a", "bc", "d"]
WAY = {"prompts": PROMPTS, "seed": 5, "steps": 4}


def louder(pipe: FluxPipeline, factor: float) -> FluxPipeline:
    """The same pipeline, with a velocity that is so many times as large: its last layer is linear."""
    pipe.transformer.proj_out.weight.data *= factor
    pipe.transformer.proj_out.bias.data *= factor
    return pipe


def test_a_model_does_not_leave_its_own_path(tiny_random_pipeline: FluxPipeline) -> None:
    found = departure(tiny_random_pipeline, walk(tiny_random_pipeline, **WAY, keep_calls=True), **WAY)
    assert found.velocity == 0 and found.latents == [0.0] * 4 and found.prompts == 3


def test_a_velocity_that_is_a_tenth_too_large_is_wrong_by_a_tenth(
    new_tiny_random_pipeline: Callable[[], FluxPipeline],
) -> None:
    reference = walk(new_tiny_random_pipeline(), **WAY, keep_calls=True)
    found = departure(louder(new_tiny_random_pipeline(), 1.1), reference, **WAY)
    assert found.velocity == pytest.approx(0.1, rel=1e-4)
    # After the first step the latents differ by a tenth of the step taken, and later by more and more.
    pipe = new_tiny_random_pipeline()
    first = reference.calls[0].kwargs["hidden_states"]
    step = reference.latents[0] - first
    assert found.latents[0] == pytest.approx(float(0.1 * step.norm() / reference.latents[0].norm()), rel=1e-3)
    assert found.latents == sorted(found.latents) and found.latents[-1] > 2 * found.latents[0]
    # The walk is the one that pictures are drawn by.
    images = pipe(
        prompt=PROMPTS,
        generator=[torch.Generator().manual_seed(5 + i) for i in range(3)],
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=0.0,
        max_sequence_length=16,
        output_type="latent",
    ).images
    torch.testing.assert_close(reference.latents[-1], images, rtol=0, atol=0)


def test_models_of_two_dtypes_can_be_compared(new_tiny_random_pipeline: Callable[[], FluxPipeline]) -> None:
    reference = walk(new_tiny_random_pipeline(), **WAY, keep_calls=True)
    found = departure(new_tiny_random_pipeline().to(torch.bfloat16), reference, **WAY)
    assert 0 < found.velocity < 0.05 and 0 < found.latents[-1] < 0.05


def test_the_fidelity_suite_walks(tiny_random_pipeline: FluxPipeline, new_tiny_random_pipeline: Callable) -> None:
    few = new_tiny_random_pipeline()
    bittern.quantize(few, "ternary-fast")
    found = evaluate(
        few, "fidelity", reference=tiny_random_pipeline, prompts=list("abcdef"), settings=Settings(steps=2)
    )
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))["fidelity"]
    assert 0 < told["velocity_error"] < 2 and told["trajectory_prompts"] == 4
    assert len(told["latent_error_by_step"]) == 2 and told["latent_error"] == told["latent_error_by_step"][-1] > 0
    assert told["ms_ssim"] is None  # 32 pixels have no fifth scale


def test_a_reference_of_another_size_is_refused(
    tiny_random_pipeline: FluxPipeline, new_tiny_random_pipeline: Callable[[], FluxPipeline]
) -> None:
    larger = new_tiny_random_pipeline()
    larger.vae.register_to_config(sample_size=64)
    drawn: list[str] = []
    with pytest.raises(UserError, match=r"draws 32x32 pictures and FluxPipeline draws 64x64: expected one size"):
        evaluate(
            tiny_random_pipeline, reference=larger, limit=6, settings=Settings(steps=1),
            progress=lambda *what: drawn.append(str(what)),
        )  # fmt: skip
    # The reference's six were drawn, and none of the model's.
    assert len(drawn) == 1


def test_denoisers_of_two_kinds_are_compared_by_their_pictures_alone(
    tiny_random_pipeline: FluxPipeline,
    new_tiny_random_pipeline: Callable[[], FluxPipeline],
) -> None:
    class Other(type(tiny_random_pipeline.transformer)):
        pass

    other = new_tiny_random_pipeline()
    other.transformer.__class__ = Other
    told = evaluate(other, "fidelity", reference=tiny_random_pipeline, limit=2, settings=Settings(steps=1)).to_dict()
    assert "velocity_error" not in told["fidelity"] and told["fidelity"]["psnr"] == 100
