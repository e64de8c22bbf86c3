"""Every declared family at a tiny size: a model with random weights, and arguments to call it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

BATCH = 2


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        class_name: Its diffusers class.
        tiny: A config for tests.
        call: Makes the arguments of a forward.
        targets: How many layers of the tiny model are quantized.
        full: The published config of a full-size model, where it differs from the class's defaults.
    """

    class_name: str
    tiny: Mapping[str, Any]
    call: Callable[[], dict[str, Any]]
    targets: int
    full: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(diffusers, self.class_name)(**self.tiny).eval()
            # Diffusers starts some output layers at zero, which would hide every difference.
            for name, parameter in model.named_parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02 if name.endswith("bias") else 0.1)
        return model


STEP = torch.tensor([300.0, 700.0])

FAMILIES: dict[str, Family] = {
    "flux": Family(
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": seeded(BATCH, 16, 16),
            "timestep": STEP / 1000,
            "pooled_projections": seeded(BATCH, 32),
            "encoder_hidden_states": seeded(BATCH, 5, 32),
            "txt_ids": torch.zeros(5, 3),
            "img_ids": torch.rand(16, 3, generator=torch.Generator().manual_seed(0)),
        },
        targets=2 * 14 + 2 * 6,
        full={"guidance_embeds": True},
    ),
    "flux2": Family(
        "Flux2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: {
            "hidden_states": seeded(BATCH, 16, 16),
            "timestep": STEP / 1000,
            "guidance": torch.tensor([4.0, 4.0]),
            "encoder_hidden_states": seeded(BATCH, 5, 32),
            "txt_ids": torch.zeros(5, 4),
            "img_ids": torch.rand(16, 4, generator=torch.Generator().manual_seed(0)),
        },
        targets=2 * 12 + 2 * 2,
    ),
    "sd3": Family(
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda: {
            "hidden_states": seeded(BATCH, 4, 8, 8),
            "timestep": STEP,
            "pooled_projections": seeded(BATCH, 32),
            "encoder_hidden_states": seeded(BATCH, 5, 32),
        },
        # The last block has no output and no mlp for its text stream; the first has a second attention.
        targets=3 * 14 + 4 - 3,
        full={
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pos_embed_max_size": 192,
        },
    ),
    "pixart": Family(
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "cross_attention_dim": 64,
            "caption_channels": 32,
        },
        lambda: {
            "hidden_states": seeded(BATCH, 4, 8, 8),
            "timestep": STEP,
            "encoder_hidden_states": seeded(BATCH, 5, 32),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        targets=2 * 10,
        full={"sample_size": 128, "caption_channels": 4096},
    ),
    "sana": Family(
        "SanaTransformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "cross_attention_dim": 64,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16,
            "caption_channels": 32,
        },
        lambda: {
            "hidden_states": seeded(BATCH, 8, 8, 8),
            "timestep": STEP,
            "encoder_hidden_states": seeded(BATCH, 5, 32),
        },
        targets=2 * (8 + 2),
    ),
    "qwen_image": Family(
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": seeded(BATCH, 16, 16),
            "timestep": STEP / 1000,
            "encoder_hidden_states": seeded(BATCH, 5, 32),
            "img_shapes": [[(1, 4, 4)]] * BATCH,
        },
        targets=2 * 14,
    ),
    "z_image": Family(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 32,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 64, 64],
        },
        lambda: {
            "x": [seeded(4, 1, 8, 8), 2 * seeded(4, 1, 8, 8)],
            "t": STEP / 1000,
            "cap_feats": [seeded(5, 32), seeded(7, 32)],
        },
        targets=3 * 8 + 7,
    ),
    "sd15": Family(
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (32, 48),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 16,
        },
        lambda: {"sample": seeded(BATCH, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": seeded(BATCH, 5, 32)},
        # 4 attentions; 8 residual blocks, of which 1 + 4 change width; a down- and an upsampler.
        targets=4 * 12 + 8 * 3 + 5 + 2,
        full={"cross_attention_dim": 768},
    ),
    "sdxl": Family(
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
            "cross_attention_dim": 32,
            "attention_head_dim": (2, 4),
            "norm_num_groups": 16,
        },
        lambda: {
            "sample": seeded(BATCH, 4, 8, 8),
            "timestep": STEP,
            "encoder_hidden_states": seeded(BATCH, 5, 32),
            "added_cond_kwargs": {"text_embeds": seeded(BATCH, 32), "time_ids": seeded(BATCH, 6)},
        },
        # 4 attentions of two transformers; 8 residual blocks, of which 1 + 4 change width; two resamplers.
        targets=4 * (2 + 2 * 10) + 8 * 3 + 5 + 2,
        full={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
        },
    ),
    "wan": Family(
        "WanTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "text_dim": 32,
            "freq_dim": 32,
            "image_dim": 24,
            "added_kv_proj_dim": 64,
        },
        lambda: {
            "hidden_states": seeded(BATCH, 4, 3, 8, 8),
            "timestep": STEP.long(),
            # The model takes all but the last 512 tokens for those of the image.
            "encoder_hidden_states": seeded(BATCH, 512, 32),
            "encoder_hidden_states_image": seeded(BATCH, 7, 24),
        },
        targets=2 * 12,
    ),
    "ltx": Family(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "cross_attention_dim": 64,
            "caption_channels": 32,
        },
        lambda: {
            "hidden_states": seeded(BATCH, 2 * 4 * 4, 8),
            "timestep": STEP.long(),
            "encoder_hidden_states": seeded(BATCH, 5, 32),
            "encoder_attention_mask": torch.ones(BATCH, 5),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
        targets=2 * 10,
    ),
}


def run(model: nn.Module, family: Family) -> Tensor:
    """The prediction as one tensor."""
    with torch.no_grad():
        sample = model(**family.call(), return_dict=False)[0]
    return torch.cat([part.flatten() for part in sample]) if isinstance(sample, list) else sample
