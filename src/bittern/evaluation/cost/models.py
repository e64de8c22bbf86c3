"""What is benchmarked: a folder's model, or a published one by name, of which the config is enough.

Configs are those that the authors published, where they differ from the defaults of the diffusers class. A miniature
has the same class and a toy's width: it shows that a command works, and its times mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bittern.errors import UserError, did_you_mean
from bittern.pipelines import BUILT_IN, denoiser_name, resolve

MINI_SIZE, MINI_TEXT = 64, 16


@dataclass(frozen=True)
class Subject:
    """A model's class and config, and what it is called with.

    Attributes:
        name: What the user called it.
        class_name: The diffusers class.
        config: Its config.
        size: Pixels of a side unless told otherwise.
        factor: Pixels of a side for one of the latent.
        text: Tokens of a prompt.
        folder: Where its weights are; None for random ones.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    size: int = 1024
    factor: int = 8
    text: int = 512
    folder: Path | None = None


@dataclass(frozen=True)
class _Published:
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    mini: Mapping[str, Any] = field(default_factory=dict[str, Any])
    size: int = 1024
    factor: int = 8
    text: int = 512


_FLUX_MINI = {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2,
    "joint_attention_dim": 64, "pooled_projection_dim": 64, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
_SD3_MINI = {
    "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
}  # fmt: skip
_SD3 = {"attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}

PUBLISHED: dict[str, _Published] = {
    "flux.1-dev": _Published("FluxTransformer2DModel", {"guidance_embeds": True}, _FLUX_MINI),
    "flux.1-schnell": _Published("FluxTransformer2DModel", {}, _FLUX_MINI, text=256),
    "flux.2-dev": _Published(
        "Flux2Transformer2DModel",
        mini={
            "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2,
            "joint_attention_dim": 64, "axes_dims_rope": (16, 16, 16, 16),
        },
    ),
    "sd3.5-large": _Published(
        "SD3Transformer2DModel",
        _SD3 | {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
        },
        _SD3_MINI,
        text=333,
    ),
    "sd3.5-medium": _Published(
        "SD3Transformer2DModel",
        _SD3 | {
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
        _SD3_MINI | {"dual_attention_layers": (0,)},
        text=333,
    ),
    "pixart-sigma": _Published(
        "PixArtTransformer2DModel",
        {"sample_size": 128, "caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
        {
            "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "cross_attention_dim": 128,
            "caption_channels": 64,
        },
        text=300,
    ),
    "sana-1.6b": _Published(
        "SanaTransformer2DModel",
        {},
        {
            "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 64, "cross_attention_dim": 128, "caption_channels": 64,
        },
        factor=32,
        text=300,
    ),
    "qwen-image": _Published(
        "QwenImageTransformer2DModel",
        {},
        {
            "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 64,
            "axes_dims_rope": (16, 24, 24),
        },
    ),
    "z-image": _Published(
        "ZImageTransformer2DModel",
        {"axes_lens": [1536, 512, 512]},
        {
            "dim": 128, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64,
            "axes_dims": [16, 24, 24],
        },
    ),
    "sdxl": _Published(
        "UNet2DConditionModel",
        {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816, "attention_head_dim": (5, 10, 20),
        },
        {
            "sample_size": 8, "block_out_channels": (64, 128), "layers_per_block": 1, "cross_attention_dim": 64,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1), "attention_head_dim": (2, 2),
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 112,
        },
        text=77,
    ),
    "sd1.5": _Published(
        "UNet2DConditionModel",
        {"cross_attention_dim": 768},
        {
            "sample_size": 8, "block_out_channels": (64, 128), "layers_per_block": 1, "cross_attention_dim": 64,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2,
        },
        size=512,
        text=77,
    ),
}  # fmt: skip
"""The models that are known by name."""


def subject(model: str, *, mini: bool = False) -> Subject:
    """A model by the name of its architecture, or of a folder.

    Args:
        model: One of `PUBLISHED`, a pipeline's folder, a hub id, or a built-in name.
        mini: The architecture at a toy's width.

    Raises:
        UserError: for a name that is neither, or a miniature of a folder.
    """
    if (found := PUBLISHED.get(model)) is not None:
        config = {**found.config, **(found.mini if mini else {})}
        size, text = (MINI_SIZE, MINI_TEXT) if mini else (found.size, found.text)
        return Subject(model, found.class_name, config, size, found.factor, text)
    if mini:
        raise UserError(
            f"--mini is for an architecture's name, and {model!r} is none: {did_you_mean(model, PUBLISHED)}"
        )
    if not Path(model).expanduser().exists() and "/" not in model and model not in BUILT_IN:
        raise UserError(
            f"unknown model {model!r}: {did_you_mean(model, [*PUBLISHED, *BUILT_IN])}, or give a folder or a hub id"
        )
    return _of_folder(model, resolve(model))


def _of_folder(name: str, folder: Path) -> Subject:
    place = folder / denoiser_name(folder)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    vae = _vae(folder)
    levels = vae.get("encoder_block_out_channels") or vae.get("block_out_channels") or (0,) * 4
    size = vae.get("sample_size")
    like = next((known for known in PUBLISHED.values() if known.class_name == config.get("_class_name")), None)
    return Subject(
        name,
        str(config.get("_class_name")),
        config,
        size if isinstance(size, int) else 1024,
        2 ** (len(levels) - 1),
        like.text if like else 512,
        place,
    )


def _vae(folder: Path) -> dict[str, Any]:
    """The config of a pipeline's VAE, which knows how large its pictures are; empty if there is none."""
    file = folder / "vae" / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
