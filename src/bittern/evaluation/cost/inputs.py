"""Random inputs of one denoising step, of the shapes that a pipeline gives its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bittern.errors import UserError
from bittern.evaluation.cost.models import Subject

Inputs = dict[str, Any]


@dataclass(frozen=True)
class _Maker:
    """Draws the inputs of one model.

    Attributes:
        model: On the device where the inputs are wanted.
        batch: Pictures.
        side: Of the latent.
        text: Tokens of a prompt.
        device: Where the inputs are wanted.
        dtype: What the model computes in.
        generator: Of their numbers.
    """

    model: nn.Module
    batch: int
    side: int
    text: int
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    @property
    def config(self) -> Any:
        return self.model.config

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def full(self, value: float) -> Tensor:
        return torch.full((self.batch,), value, device=self.device, dtype=self.dtype)

    def guidance(self) -> Inputs:
        return {"guidance": self.full(3.5)} if self.config.get("guidance_embeds") else {}

    def words(self, width: int) -> Tensor:
        return self.normal(self.batch, self.text, width)

    def picture(self) -> Tensor:
        return self.normal(self.batch, self.config.in_channels, self.side, self.side)

    def tokens(self) -> Tensor:
        """A latent in patches of 2 x 2."""
        return self.normal(self.batch, (self.side // 2) ** 2, self.config.in_channels)

    def places(self, axes: int) -> Tensor:
        """Row and column of each patch on the second and the third axis."""
        side = torch.arange(self.side // 2, device=self.device, dtype=self.dtype)
        ids = torch.zeros(len(side), len(side), axes, device=self.device, dtype=self.dtype)
        ids[..., 1], ids[..., 2] = side[:, None], side[None, :]
        return ids.flatten(0, 1)


def _flux(make: _Maker) -> Inputs:
    return {
        "hidden_states": make.tokens(),
        "encoder_hidden_states": make.words(make.config.joint_attention_dim),
        "pooled_projections": make.normal(make.batch, make.config.pooled_projection_dim),
        "timestep": make.full(0.5),
        "img_ids": make.places(3),
        "txt_ids": torch.zeros(make.text, 3, device=make.device, dtype=make.dtype),
        **make.guidance(),
    }


def _flux2(make: _Maker) -> Inputs:
    words = torch.zeros(make.text, 4, device=make.device, dtype=make.dtype)
    words[:, 3] = torch.arange(make.text, device=make.device)
    return {
        "hidden_states": make.tokens(),
        "encoder_hidden_states": make.words(make.config.joint_attention_dim),
        "timestep": make.full(0.5),
        "img_ids": make.places(4),
        "txt_ids": words,
        **make.guidance(),
    }


def _sd3(make: _Maker) -> Inputs:
    return {
        "hidden_states": make.picture(),
        "encoder_hidden_states": make.words(make.config.joint_attention_dim),
        "pooled_projections": make.normal(make.batch, make.config.pooled_projection_dim),
        "timestep": make.full(500.0),
    }


def _pixart(make: _Maker) -> Inputs:
    sizes: Inputs = {"resolution": None, "aspect_ratio": None}
    if make.model.use_additional_conditions:
        sizes = {"resolution": make.normal(make.batch, 2), "aspect_ratio": make.normal(make.batch, 1)}
    return {
        "hidden_states": make.picture(),
        "encoder_hidden_states": make.words(make.config.caption_channels),
        "timestep": make.full(500.0),
        "added_cond_kwargs": sizes,
    }


def _sana(make: _Maker) -> Inputs:
    return {
        "hidden_states": make.picture(),
        "encoder_hidden_states": make.words(make.config.caption_channels),
        "timestep": make.full(500.0),
        **make.guidance(),
    }


def _qwen_image(make: _Maker) -> Inputs:
    return {
        "hidden_states": make.tokens(),
        "encoder_hidden_states": make.words(make.config.joint_attention_dim),
        "timestep": make.full(0.5),
        "img_shapes": [[(1, make.side // 2, make.side // 2)]] * make.batch,
        **make.guidance(),
    }


def _z_image(make: _Maker) -> Inputs:
    return {
        "x": [make.normal(make.config.in_channels, 1, make.side, make.side) for _ in range(make.batch)],
        "t": make.full(0.5),
        "cap_feats": [make.normal(make.text, make.config.cap_feat_dim) for _ in range(make.batch)],
    }


def _unet(make: _Maker) -> Inputs:
    config = make.config
    inputs: Inputs = {
        "sample": make.picture(),
        "timestep": make.full(500.0),
        "encoder_hidden_states": make.words(config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": make.normal(make.batch, width),
            "time_ids": make.normal(make.batch, 6),
        }
    return inputs


_BY_CLASS: dict[str, Callable[[_Maker], Inputs]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "SD3Transformer2DModel": _sd3,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _sana,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "UNet2DConditionModel": _unet,
}


def check_request(subject: Subject, size: int, batch: int) -> None:
    """Refuses what no input can be made for, before a model is built.

    Raises:
        UserError: for a class whose inputs are not known, a side that is no whole number of patches, or an empty batch.
    """
    if subject.class_name not in _BY_CLASS:
        raise UserError(
            f"model class {subject.class_name!r} cannot be benchmarked: expected one of {', '.join(_BY_CLASS)}"
        )
    patch = 2 * subject.factor
    if size < patch or size % patch:
        raise UserError(f"size is {size}: expected a multiple of {patch} pixels")
    if batch < 1:
        raise UserError(f"batch is {batch}: expected a whole number from 1 up")


def inputs(
    model: nn.Module, subject: Subject, size: int, batch: int, device: torch.device | str, dtype: torch.dtype
) -> Inputs:
    """Keyword arguments of a model's forward; the same numbers whatever the model's weights.

    Raises:
        UserError: as `check_request` does.
    """
    check_request(subject, size, batch)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    make = _Maker(model, batch, size // subject.factor, subject.text, device, dtype, generator)
    return _BY_CLASS[subject.class_name](make)
