"""Train tiny-unet, the embedded Stable Diffusion pipeline, from scratch on the scenes world.

    python tools/train_tiny_unet.py --work WORK --minutes 8
    python tools/train_tiny_unet.py --work WORK --device cpu --max-steps 2 --bank 64 --batch 4 --final-prompts 12

Stable Diffusion's way throughout [Rombach et al. 2022, arXiv:2112.10752]: its noise schedule, with a last step that is
pure noise [Lin et al. 2023, arXiv:2305.08891], the velocity as target [Salimans & Ho 2022, arXiv:2202.00512], and one
caption in ten left out, for classifier-free guidance [Ho & Salimans 2022, arXiv:2207.12598]. The rest is in
`training/`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from training import run
from training.parts import IMAGE_SIZE, LATENT_CHANNELS, TEXT_WIDTH, autoencoder, clip_text_encoder, clip_tokenizer
from training.student import Student, tokenize

CAPTIONS_LEFT_OUT = 0.1


def build_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """The whole pipeline with random weights, float32."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4),  # diffusers' name for the number of heads; they are 32 wide
        norm_num_groups=16,
    )
    _initialise(unet)
    return StableDiffusionPipeline(
        vae=autoencoder((16, 32, 48, 64), norm_groups=8),
        text_encoder=clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _initialise(unet: UNet2DConditionModel) -> None:
    # Every residual branch starts as zero, and so does the prediction, as in Stable Diffusion.
    last = [unet.conv_out]
    last += [module.conv2 for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    last += [module.proj_out for module in unet.modules() if isinstance(module, Transformer2DModel)]
    for module in last:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


class TinyUNet(Student):
    """The U-Net and its text encoder."""

    shifts = False
    setting = "guidance"
    choices = (1.0, 2.0, 3.0, 5.0)
    chosen = 3.0

    def __init__(self, pipe: StableDiffusionPipeline):
        super().__init__(pipe)
        self.unet, self.clip = pipe.unet, pipe.text_encoder
        self.unet.to(memory_format=torch.channels_last)
        alphas = pipe.scheduler.alphas_cumprod.to(pipe.device)
        self.register_buffer("signal", alphas.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - alphas).sqrt(), persistent=False)
        (empty,) = self.read([""])
        self.register_buffer("empty", empty, persistent=False)

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    def read(self, captions: list[str]) -> tuple[Tensor, ...]:
        return (tokenize(self.pipe.tokenizer, captions).to(self.pipe.device),)

    def loss(self, clean: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
        """The squared error of the velocity; clean: [B, C, H, W]."""
        batch, device = len(clean), clean.device
        left_out = torch.rand(batch, 1, device=device) < CAPTIONS_LEFT_OUT
        text = self.clip(torch.where(left_out, self.empty, tokens[0]), attention_mask=self.causal_mask)[0]
        # One time from every slice of the schedule: the loss of a batch varies less.
        slices = torch.arange(batch, device=device) + torch.rand(batch, device=device)
        time = (slices * (len(self.signal) / batch)).long().clamp(max=len(self.signal) - 1)
        signal, noise = self.signal[time][:, None, None, None], self.noise[time][:, None, None, None]
        clean = clean.contiguous(memory_format=torch.channels_last)
        random = torch.randn_like(clean)
        velocity = self.unet(signal * clean + noise * random, time, text, return_dict=False)[0]
        return F.mse_loss(velocity.float(), signal * random - noise * clean)

    def compile_step(self) -> None:
        # Block by block: blocks of one shape share what is compiled, which the whole would compile for each.
        torch._dynamo.config.recompile_limit = 64
        for module in self.unet.modules():
            if isinstance(module, ResnetBlock2D | Transformer2DModel):
                module.compile(fullgraph=True, dynamic=False)

    def choose(self, value: float) -> None:
        self.chosen = value

    def call_options(self) -> dict[str, float]:
        return {"guidance_scale": self.chosen}


if __name__ == "__main__":
    run.main(build_pipeline, TinyUNet, run.arguments(__doc__, batch=256, compile_vae=False))
