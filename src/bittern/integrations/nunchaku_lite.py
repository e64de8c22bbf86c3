"""Nunchaku Lite folders through diffusers, on devices where its own reader of them refuses.

Diffusers reads them with kernels that it downloads, on NVIDIA GPUs other than Hopper's. Where it would refuse, bittern
takes its place: the layers become few-bit layers of ours while they are loaded, and the model saves as one of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

# Everything of our own that is heavy is imported where it is used: registering must cost nothing.
if TYPE_CHECKING:
    from bittern.checkpoints.nunchaku import Incoming

METHOD = "nunchaku_lite"


def can_read(config: Mapping[str, Any]) -> bool:
    """Whether diffusers itself reads such a folder here."""
    from diffusers.quantizers import auto

    try:
        auto.AUTO_QUANTIZER_MAPPING[METHOD](_THEIRS[0].from_dict(dict(config))).validate_environment()
    except (ImportError, ValueError, TypeError):
        return False
    return True


class LiteConfig:
    """In diffusers' registry: gives its own config where that works, and ours otherwise."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """The config of whoever reads the folder here.

        Raises:
            UserError: for a description that contradicts itself.
        """
        from bittern.integrations.diffusers import QuantizationConfig

        if can_read(config_dict):
            return _THEIRS[0].from_dict(dict(config_dict), **kwargs)
        return QuantizationConfig.of_lite(config_dict)


_THEIRS: list[Any] = []


def register() -> None:
    """Puts `LiteConfig` before diffusers' own; a diffusers that knows no Lite folders is left alone."""
    from diffusers.quantizers import auto

    mapping = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    if METHOD in mapping and mapping[METHOD] is not LiteConfig:
        _THEIRS[:] = [mapping[METHOD]]
        mapping[METHOD] = LiteConfig


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """What a folder says that its floats are; bfloat16 if it says nothing."""
    from bittern.checkpoints.nunchaku import lite

    return getattr(torch, lite(config, "config.json").dtype)


def prepare(model: nn.Module, config: Mapping[str, Any], files: Iterable[Path]) -> Incoming:
    """What a folder's tensors become in a model on meta.

    Raises:
        UserError: for files that do not fit the description or the model.
    """
    from bittern.checkpoints import read_headers
    from bittern.checkpoints.files import opened
    from bittern.checkpoints.nunchaku import incoming, lite, lite_groups, lite_units

    said = lite(config, "config.json")
    headers = read_headers(files)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    units = lite_units(model, said.targets, said.awq)
    with opened(headers) as read:
        groups = lite_groups(model, units)
        return incoming(headers, units, shapes, read, groups=groups, **said.expected, name="nunchaku-lite")


def tensors(found: Incoming) -> dict[str, Tensor]:
    """All tensors, converted.

    Raises:
        UserError: for numbers that are not finite.
    """
    from bittern.checkpoints.files import opened
    from bittern.checkpoints.native import check_value

    out: dict[str, Tensor] = {}
    with opened(found.headers) as read:
        for name, tensor in found.tensors(read):
            check_value(name, tensor, found.config)
            out[name] = tensor
    return out
