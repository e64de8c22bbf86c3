"""Text encoders that ran before and went leave the states that the whole pipeline gives, in pipelines of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from bittern.errors import UserError
from bittern.trajectories import choose, defaults, encode_texts, run_on, sample

PROMPTS = ["a red circle", "two stars"]


def with_projection(tokenizer: Any) -> CLIPTextModelWithProjection:
    torch.manual_seed(1)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip


def flux(parts: dict[str, Any]) -> DiffusionPipeline:
    return parts["pipe"]


def sd3(parts: dict[str, Any]) -> DiffusionPipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    clip = with_projection(parts["tokenizer"])
    # SD3 pads the two CLIPs' states to the width of T5's.
    t5 = type(parts["text_encoder_2"])(
        type(parts["text_encoder_2"].config)(vocab_size=30, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=parts["vae"],
        text_encoder=clip, tokenizer=parts["tokenizer"], text_encoder_2=clip, tokenizer_2=parts["tokenizer"],
        text_encoder_3=t5.eval(), tokenizer_3=parts["tokenizer_2"],
    )  # fmt: skip


def pixart(parts: dict[str, Any]) -> DiffusionPipeline:
    """Steps without a callback, a mask beside the text states, and no way to interrupt."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=32, patch_size=8, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, cross_attention_dim=32, caption_channels=32,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer, scheduler=diffusers.DPMSolverMultistepScheduler(), vae=parts["vae"],
        text_encoder=parts["text_encoder_2"], tokenizer=parts["tokenizer_2"],
    )  # fmt: skip


def sdxl(parts: dict[str, Any]) -> DiffusionPipeline:
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    clip = with_projection(parts["tokenizer"])
    return diffusers.StableDiffusionXLPipeline(
        unet=unet, scheduler=diffusers.EulerDiscreteScheduler(), vae=parts["vae"], text_encoder=clip,
        tokenizer=parts["tokenizer"], text_encoder_2=clip, tokenizer_2=parts["tokenizer"],
    )  # fmt: skip


@pytest.mark.parametrize("family", [flux, sd3, pixart, sdxl])
def test_states_are_those_of_the_whole_pipeline(
    family: Callable[[dict[str, Any]], DiffusionPipeline], new_tiny_random_pipeline: Callable[[], FluxPipeline]
) -> None:
    own = new_tiny_random_pipeline()
    parts = {"pipe": own, **own.components}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = family(parts)
    denoiser = (getattr(pipe, "transformer", None) or pipe.unet).eval()
    expected = sample(pipe, denoiser, PROMPTS, 11, seed=3)
    chosen = choose(len(PROMPTS), defaults(pipe).steps, 11, seed=3)
    assert set(chosen) == {0, 1}
    texts = encode_texts(pipe, denoiser, dict(enumerate(PROMPTS)))
    for name in [name for name in pipe.components if name.startswith("text_encoder")]:
        setattr(pipe, name, None)
    run_on(pipe, torch.device("cpu"))
    found = sample(pipe, denoiser, PROMPTS, 11, seed=3, texts=texts)
    assert len(found) == len(expected) >= 11 and "encode_prompt" not in vars(pipe)
    assert [(state.prompt, state.step) for state in found] == [(state.prompt, state.step) for state in expected]
    for state, other in zip(found, expected, strict=True):
        assert tensors(state.args) + tensors(state.kwargs)
        for one, two in zip(tensors([state.args, state.kwargs]), tensors([other.args, other.kwargs]), strict=True):
            assert torch.equal(one, two)


def test_a_pipeline_that_encodes_in_its_own_way_is_named(tiny_random_pipeline: FluxPipeline) -> None:
    class Other:
        pass

    with pytest.raises(UserError, match=r"Other has no encode_prompt, .* call bittern\.quantize"):
        encode_texts(Other(), tiny_random_pipeline.transformer, {0: "a"})  # type: ignore[arg-type]


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]
