"""Train tiny-flux, the embedded FLUX pipeline, from scratch on the scenes world.

    python tools/train_tiny_flux.py --work WORK --minutes 9 --planned-minutes 18
    torchrun --nproc-per-node 2 tools/train_tiny_flux.py --work WORK ...
    python tools/train_tiny_flux.py --work WORK --device cpu --max-steps 2 --bank 8 --batch 4 --final-prompts 12

Flow matching [Lipman et al. 2023, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206] with logit-normal times. The
rest is in `training/`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from training import run
from training.parts import (
    IMAGE_SIZE,
    LATENT_CHANNELS,
    TEXT_TOKENS,
    TEXT_WIDTH,
    autoencoder,
    clip_text_encoder,
    clip_tokenizer,
    t5_tokenizer,
)
from training.student import Student, tokenize


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """The whole pipeline with random weights, float32."""
    torch.manual_seed(seed)
    clip_tok, t5_tok = clip_tokenizer(), t5_tokenizer()
    clip = clip_text_encoder(clip_tok)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tok),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=384,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            # T5's additive bias through the fused kernels crashes in the backward pass.
            attn_implementation="eager",
        )
    )
    vae = autoencoder((32, 64, 96, 128), norm_groups=16)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    _initialise(transformer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tok,
        text_encoder_2=t5,
        tokenizer_2=t5_tok,
        transformer=transformer,
    )


def _initialise(transformer: FluxTransformer2DModel) -> None:
    # adaLN-zero: every block starts as the identity, and the last layer predicts zero. [Peebles & Xie 2022]
    for name, module in transformer.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if name == "proj_out" or (".norm" in f".{name}" and name.endswith("linear")):
            torch.nn.init.zeros_(module.weight)
        elif "time_text_embed" in name:
            torch.nn.init.normal_(module.weight, std=0.02)
        else:
            torch.nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)


class TinyFlux(Student):
    """The transformer and both text encoders."""

    setting = "shift"
    choices = (1.0, 1.5, 2.0, 2.5, 3.0)

    def __init__(self, pipe: FluxPipeline):
        super().__init__(pipe)
        self.transformer, self.clip, self.t5 = pipe.transformer, pipe.text_encoder, pipe.text_encoder_2
        self.chosen = pipe.scheduler.config.shift
        side = IMAGE_SIZE // 16
        ids = FluxPipeline._prepare_latent_image_ids(1, side, side, pipe.device, torch.float32)
        self.register_buffer("image_ids", ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(TEXT_TOKENS, 3, device=pipe.device), persistent=False)

    @property
    def denoiser(self) -> nn.Module:
        return self.transformer

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H/2 * W/2, 4 C], as FluxPipeline packs."""
        b, c, h, w = latents.shape
        return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)

    def read(self, captions: list[str]) -> tuple[Tensor, ...]:
        tokenizers = (self.pipe.tokenizer_2, self.pipe.tokenizer)
        return tuple(tokenize(one, captions).to(self.pipe.device) for one in tokenizers)

    def loss(self, clean: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        """The squared error of the velocity; clean: [B, image tokens, channels]."""
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(len(clean), device=clean.device))
        text = self.t5(tokens[0], attention_mask=torch.zeros_like(self.causal_mask))[0]
        velocity = self.transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
            encoder_hidden_states=text,
            pooled_projections=self.clip(tokens[1], attention_mask=self.causal_mask).pooler_output,
            timestep=sigma,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity.float(), noise - clean)

    def compile_step(self) -> None:
        self.transformer.compile_repeated_blocks(fullgraph=True)

    def choose(self, value: float) -> None:
        self.chosen = value
        self.pipe.scheduler.register_to_config(shift=value)
        self.pipe.scheduler.set_shift(value)

    def call_options(self) -> dict[str, Any]:
        return {"guidance_scale": 0.0, "max_sequence_length": TEXT_TOKENS}


if __name__ == "__main__":
    run.main(build_pipeline, TinyFlux, run.arguments(__doc__))
